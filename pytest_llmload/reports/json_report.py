"""Write ``--llm-report x.json``: the report document itself, for other programs."""

from __future__ import annotations

import json
from typing import Any


def text(document: dict[str, Any]) -> str:
    """Return everything that was measured and concluded, for other programs."""
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
