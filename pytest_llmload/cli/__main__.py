"""``python -m pytest_llmload.cli``: the command, where its script is not on the path."""

import sys

from pytest_llmload.cli import main

sys.exit(main())
