"""The ready-made suite's place."""

from __future__ import annotations

from pathlib import Path

#: Folder of the ready-made suite.
SUITE = Path(__file__).resolve().parents[2] / "suite"
