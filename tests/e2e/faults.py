"""What can go wrong in a load or in ``llm.run``, how it ends, and what it leaves: the table of ``docs/faults.md``.

Each fault is planted in one test of one run; ``test_fault_matrix.py`` sees that it ends as the table says.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One fault, as the documentation names it and as a test plants it."""

    name: str
    #: What the documentation calls it, and how it ends there.
    what: str
    ends: str
    #: Body of a loader that ends in ``return plain(spec)``, or of ``function(model, tokenizer)`` for ``llm.run``.
    loader: str = ""
    run: str = ""
    #: ``passed``, ``failed`` or ``skipped``, and words of the text that the test ends with.
    outcome: str = "failed"
    told: str = ""


FAULTS = (
    Fault("child_left", "a loader leaves a child that sleeps", "passes; the child is killed with the load",
          loader="import multiprocessing, threading\n"
                 "multiprocessing.get_context('fork').Process(target=threading.Event().wait, daemon=True).start()",
          outcome="passed"),
    Fault("waits_for_all", "a loader waits for all children of its process", "passes",
          loader="import os\n"
                 "try:\n    os.wait()\nexcept ChildProcessError:\n    pass", outcome="passed"),
    Fault("secret", "a loader raises a secret of the environment", "fails; its value is `***` everywhere",
          loader="import os\nprint('key', os.environ['LLM_ENDPOINT_KEY'])\n"
                 "raise ValueError(f\"refused {os.environ['LLM_ENDPOINT_KEY']}\")", told="ValueError: refused ***"),
    Fault("control", "a loader raises control characters", "fails; they are shown as escapes",
          loader="raise ValueError('\\x1b[31mred\\u202e')", told="\\x1b[31mred\\u202e"),
    Fault("closes", "a loader closes all file descriptors", "fails: the load exited",
          loader="import os\nos.closerange(0, 4096)", told="in phase 'load'"),
    Fault("writes", "a loader writes to the connection to pytest", "fails: the load wrote to it, killed",
          loader="import os, stat\n"
                 "for fd in range(3, 256):\n"
                 "    try:\n        kind = os.fstat(fd).st_mode\n    except OSError:\n        continue\n"
                 "    if stat.S_ISSOCK(kind):\n        os.write(fd, b'\\x00' * 8 + b'{}{}{}{}{}{}{}{}')",
          told="wrote to the connection between it and pytest in phase 'load', killed"),
    Fault("clock", "the wall clock goes back a day while a model is loaded", "passes; times are a monotonic clock's",
          loader="import time\n"
                 "time.time = lambda real=time.time: real() - 86400", outcome="passed"),
    Fault("broken", "`llm.run` breaks the model", "the model is loaded anew for the next test",
          run="model.named_parameters = None", outcome="passed"),
    Fault("next_to_broken", "…the next test of that load", "passes, on a whole model",
          run="assert model.named_parameters is not None", outcome="passed"),
    Fault("mute", "an exception whose `__str__` and `__reduce__` raise", "fails, with its class and traceback",
          run="class Mute(RuntimeError):\n    def __str__(self): raise ZeroDivisionError\n"
              "    def __reduce__(self): raise ZeroDivisionError\nraise Mute",
          told="its message cannot be shown, since its __str__ raises ZeroDivisionError"),
    Fault("real_time", "a real-time signal", "fails: killed by signal 40 (SIGRTMIN+6)",
          run="import os\nos.kill(os.getpid(), 40)", told="killed by signal 40 (SIGRTMIN+6) in phase 'run'"),
    Fault("next_to_signal", "…the next test of that load", "passes", run="pass", outcome="passed"),
    Fault("skips", "`pytest.skip` in `llm.run`", "the test is skipped",
          run="import pytest\npytest.skip('not on this machine')", outcome="skipped", told="not on this machine"),
    Fault("exits", "`pytest.exit` in `llm.run`", "the test fails, the run goes on",
          run="import pytest\npytest.exit('enough')", told="enough"),
)  # fmt: skip


def sources() -> dict[str, str]:
    """Return the files of a project with one test for each fault, by name without suffix."""
    loaders = [
        "from transformers import AutoModelForCausalLM\n"
        "def plain(spec): return AutoModelForCausalLM.from_pretrained(spec.model, dtype='auto')\n"
    ]
    tests = ["import pytest\n"]
    for fault in FAULTS:
        if fault.loader:
            body = textwrap.indent(fault.loader, "    ")
            loaders.append(f"def {fault.name}(spec):\n{body}\n    return plain(spec)\n")
            tests.append(
                f'@pytest.mark.strategy("loader", target="loaders:{fault.name}")\n'
                f"def test_{fault.name}(llm): assert llm.outcome == 'loaded'\n"
            )
        else:
            body = textwrap.indent(fault.run, "    ")
            tests.append(f"def {fault.name}(model, tokenizer):\n{body}\n")
            tests.append(f"def test_{fault.name}(llm): llm.run({fault.name})\n")
    return {"loaders": "\n".join(loaders), "test_it": "\n".join(tests)}


def table() -> str:
    """Return the table of the documentation."""
    rows = [f"| {fault.what} | {fault.ends} |" for fault in FAULTS]
    return "\n".join(["| fault | how it ends |", "| --- | --- |", *rows])
