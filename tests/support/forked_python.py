"""Stand in for ``python``: code, our modules and pytest with its workers are forked from the tests' template.

All else is started as usual. The program has the template's address, then the arguments of ``python``. It imports
little: it starts at each call.
"""

from __future__ import annotations

import json
import os
import socket
import sys

#: The program of xdist's workers, as execnet writes it.
_WORKER = ["-u", "-c", "import sys;exec(eval(sys.stdin.readline()))"]


def main(address: str, arguments: list[str]) -> int:
    is_ours = arguments[:1] == ["-m"] and arguments[1].startswith("pytest")
    if is_ours or arguments[:1] == ["-c"] or arguments == _WORKER:
        request = {
            "program": "worker" if arguments == _WORKER else "python",
            "arguments": arguments,
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
