"""Run as a script: become a command that ends with the process that started it.

The request to be killed with the parent survives the exec, and the server need not know of it.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

parent, *command = sys.argv[1:]
if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
    sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
if os.getppid() != int(parent):
    sys.exit("the process that started the server has ended")
try:
    os.execvp(command[0], command)
except OSError as error:
    sys.exit(f"{command[0]}: {error.strerror}")
