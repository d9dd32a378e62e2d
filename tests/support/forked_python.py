"""Stand in for ``python`` in a script: a run of pytest is forked from the tests' template, and all else is started.

The program has the template's address, then the arguments of ``python``. It imports little: it starts at each call.
"""

from __future__ import annotations

import json
import os
import socket
import sys


def main(address: str, arguments: list[str]) -> int:
    if arguments[:2] == ["-m", "pytest"]:
        request = {"arguments": arguments[2:], "cwd": str(os.getcwd()), "environment": dict(os.environ)}  # noqa: PTH109
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as template:
            template.connect(f"\0{address}")
            socket.send_fds(template, [json.dumps(request).encode()], [1, 2])
            while said := template.recv(1 << 10):
                answer = json.loads(said)
                if "status" in answer:
                    return int(answer["status"])
    os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
