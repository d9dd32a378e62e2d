"""``llm.run`` in another process looks to pytest as a call in its own: what it prints, logs, warns of and raises."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

Run = Callable[..., pytest.RunResult]


def test_what_a_function_says_is_the_tests(
    pytester: pytest.Pytester, project: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(
        """
        import logging
        import os
        import subprocess
        import sys
        import warnings

        import pytest

        class OwnWarning(UserWarning):
            def __init__(self, one, two=None):
                super().__init__(one)

        def speaks(model, tokenizer):
            print("to stdout")
            print("to stderr", file=sys.stderr)
            print("\\r1 of 2\\r2 of 2")
            os.write(1, b"by the system\\n")
            subprocess.run(["echo", "by a child"])
            print(os.environ["SOME_API_KEY"])
            return 7

        def logs(model, tokenizer):
            logging.getLogger("app.loader").info("loaded %d layers", 2)
            logging.getLogger("app.loader").debug("not asked for")
            try:
                1 / 0
            except ZeroDivisionError:
                logging.getLogger("app").exception("it broke")

        def warns(model, tokenizer):
            for _ in range(3):
                warnings.warn("old name", DeprecationWarning)
            warnings.warn(OwnWarning("own"))

        def raises(model, tokenizer):
            print("just before")
            warnings.warn("told before")
            inner()

        def inner():
            raise LookupError("nothing there")

        def dies(model, tokenizer):
            print("last words", flush=True)
            os.kill(os.getpid(), 9)

        def test_streams(llm, capsys):
            print("before")
            assert llm.run(speaks) == 7
            print("after")
            out, err = capsys.readouterr()
            assert out == "before\\nto stdout\\n2 of 2\\nby the system\\nby a child\\n***\\nafter\\n"
            assert err == "to stderr\\n"

        def test_files(llm, capfd):
            llm.run(speaks)
            assert "to stdout" in capfd.readouterr().out

        def test_records(llm, caplog):
            with caplog.at_level(logging.INFO, logger="app.loader"):
                llm.run(logs)
            first, second = caplog.records
            assert (first.name, first.levelname, first.getMessage()) == ("app.loader", "INFO", "loaded 2 layers")
            assert (first.pathname, first.funcName) == (__file__, "logs")
            assert "ZeroDivisionError" in second.exc_text
            assert caplog.record_tuples == [
                ("app.loader", logging.INFO, "loaded 2 layers"), ("app", logging.ERROR, "it broke")]
            caplog.clear()
            llm.run(logs)
            assert [record.getMessage() for record in caplog.records] == ["it broke"]

        def test_warnings(llm, recwarn):
            llm.run(warns)
            old, own = recwarn.list
            assert (old.category, str(old.message), old.filename) == (DeprecationWarning, "old name", __file__)
            assert (type(own.message).__name__, str(own.message)) == ("OwnWarning", "own")
            with pytest.warns(DeprecationWarning, match="old name"):
                llm.run(warns)

        def test_fails(llm): llm.run(raises)
        def test_dies(llm): llm.run(dies)
        def test_after(llm, capsys):
            llm.run(speaks)
            assert "last words" not in capsys.readouterr().out
        """
    )
    monkeypatch.setenv("SOME_API_KEY", "swordfish-17")
    result = project()
    text = result.stdout.str()
    result.assert_outcomes(passed=5, failed=2, warnings=1)
    # What a failed test printed is shown with it, and its traceback names the test's file and its lines.
    result.stdout.fnmatch_lines(
        [
            "*test_fails*",
            "*test_what_a_function_says_is_the_tests.py*, in raises",
            "    inner()",
            "*test_what_a_function_says_is_the_tests.py*, in inner",
            '*raise LookupError("nothing there")',
            "*Captured stdout call*",
            "just before",
            "*test_dies*",
            "*killed by SIGKILL in phase 'run'*",
            "*Captured stdout call*",
            "last words",
            "*warnings summary*",
            "*test_what_a_function_says_is_the_tests.py:*: UserWarning: told before",
        ]
    )
    assert "<dynamic-code>" not in text
    assert "process/session.py" not in text
    assert "process/calls.py" not in text


def test_filters_of_warnings_are_pytests_own(pytester: pytest.Pytester, project: Run) -> None:
    pytester.makepyfile(
        """
        import warnings
        import pytest

        def warns(model, tokenizer):
            warnings.warn("old name", FutureWarning)

        def raises(model, tokenizer):
            warns(model, tokenizer)
            raise LookupError("what counts")

        def test_error(llm): llm.run(warns)
        def test_first(llm): llm.run(raises)
        @pytest.mark.filterwarnings("ignore:old name")
        def test_ignored(llm): llm.run(warns)
        """
    )
    result = project("-W", "error")
    result.assert_outcomes(passed=1, failed=2)
    text = result.stdout.str()
    assert re.search(r"FAILED .*::test_error\S* - FutureWarning: old name", text)
    assert re.search(r"FAILED .*::test_first\S* - LookupError: what counts", text)


@pytest.mark.parametrize("call", ["breakpoint()", "import pdb; pdb.set_trace()"])
def test_a_debugger_says_how_to_get_one(pytester: pytest.Pytester, project: Run, call: str) -> None:
    pytester.makepyfile(f"def stops(model, tokenizer):\n    {call}\ndef test_a(llm): llm.run(stops)")
    result = project()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E *RuntimeError: a debugger cannot be used in the load's process*isolation=inline*"])


def test_ranks_say_it_once(pytester: pytest.Pytester, project: Run) -> None:
    pytester.makepyfile(
        """
        import warnings
        import pytest

        def speaks(model, tokenizer):
            print("by every rank")
            warnings.warn("once", UserWarning)

        @pytest.mark.strategy("tp_plan")
        def test_a(llm, capsys):
            with pytest.warns(UserWarning, match="once") as caught:
                llm.run(speaks)
            assert len(caught) == 1
            assert capsys.readouterr().out == "by every rank\\n"
        """
    )
    project().assert_outcomes(passed=1)
