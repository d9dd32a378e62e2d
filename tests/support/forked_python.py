"""Stand in for ``python``: runs of pytest and xdist's workers are forked from the tests' template, all else is started.

The program has the template's address, then the arguments of ``python``. It imports little: it starts at each call.
"""

from __future__ import annotations

import json
import os
import socket
import sys

#: The program of xdist's workers, as execnet writes it.
_WORKER = ["-u", "-c", "import sys;exec(eval(sys.stdin.readline()))"]


def main(address: str, arguments: list[str]) -> int:
    program = "pytest" if arguments[:2] == ["-m", "pytest"] else "worker" if arguments == _WORKER else ""
    if program:
        request = {
            "program": program,
            "arguments": arguments[2:],
            "cwd": str(os.getcwd()),  # noqa: PTH109
            "environment": dict(os.environ),
        }
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as template:
            template.connect(f"\0{address}")
            socket.send_fds(template, [json.dumps(request).encode()], [0, 1, 2])
            while said := template.recv(1 << 10):
                answer = json.loads(said)
                if "status" in answer:
                    return int(answer["status"])
                if not answer["pid"]:
                    break
    os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
