"""Many plugins at once: only in the environment that has them, which ``make test-plugins`` builds."""

from __future__ import annotations

import os

#: Plain ``make test`` has not all of these plugins.
collect_ignore_glob = [] if os.environ.get("LLMLOAD_PLUGINS") else ["test_*.py"]
