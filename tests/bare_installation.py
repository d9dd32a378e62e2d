"""Check an installation without extras: run with its Python, from outside the repository's own environment.

pytest must work as if the plugin were not there, and a load must say what to install.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

LOAD = "def test_load(llm): pass\n"


def pytest_in(folder: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest with this interpreter in a folder."""
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def check(done: subprocess.CompletedProcess[str], status: int, *texts: str) -> None:
    """Raise SystemExit unless a run ended with a status and said all of the texts."""
    said = done.stdout + done.stderr
    lacking = [text for text in texts if text not in said]
    if done.returncode != status or lacking:
        raise SystemExit(f"{' '.join(done.args)}: status {done.returncode}, expected {status}; lacks {lacking}\n{said}")


def main() -> None:
    """Run everything that a user without extras may run."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
        Path(folder, "test_plain.py").write_text("def test_plain(): pass\n", encoding="utf-8")
        check(pytest_in(folder, "--markers"), 0, "@pytest.mark.quant(")
        check(pytest_in(folder, "--help"), 0, "--llm-model")
        check(pytest_in(folder, "--fixtures"), 0, "memory_baseline")
        check(pytest_in(folder), 0, "1 passed")
        Path(folder, "test_load.py").write_text(LOAD, encoding="utf-8")
        check(pytest_in(folder), 0, "1 passed", "1 skipped")
        run = pytest_in(folder, "-rs", "--llm-model=org/model", "--llm-device=cpu", "test_load.py")
        check(run, 1, "needs torch", "pip install", "1 skipped")
    print("an installation without extras works")


if __name__ == "__main__":
    main()
