"""What an import string names is looked for without importing it."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

from pytest_llmload.core.references import absence


@pytest.mark.parametrize(
    ("reference", "lacks"),
    [
        ("os.path:join", ""),
        ("json.decoder:JSONDecoder.decode", ""),
        ("json.decoder:JSONDecodr", "decoder.py has no 'JSONDecodr'; did you mean json.decoder:JSONDecoder?"),
        ("json.nodec:x", "there is no module 'json.nodec'"),
        # A folder of the search path must not be taken for one of the package's.
        ("shutil.json:loads", "there is no module 'shutil.json'"),
        ("no_such_module:x", "there is no module 'no_such_module'"),
        # Only the import can tell: a module in C, and one that takes over another's names.
        ("math:no_such_function", ""),
        ("os:no_such_function", ""),
        ("made:any", ""),
        ("plain:found", ""),
        ("plain:any", "plain.py has no 'any'"),
        ("spaced.part:found", ""),
        ("zipped:any", ""),
    ],
)
def test_what_is_absent_is_named(reference: str, lacks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made.py").write_text("def __getattr__(name): return name\n")
    (tmp_path / "plain.py").write_text("import this\nfrom other import found\n")
    (tmp_path / "spaced").mkdir()
    (tmp_path / "spaced" / "part.py").write_text("found = 1\n")
    with zipfile.ZipFile(tmp_path / "parts.zip", "w") as archive:
        archive.writestr("zipped.py", "found = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path / "parts.zip"))
    assert absence(reference) == lacks
    assert not {"made", "plain", "spaced", "this"} & sys.modules.keys()
