"""``python -m pytest_llmload.cli``: the command, for when its script is not on the PATH."""

import sys

from pytest_llmload.cli import main

sys.exit(main())
