"""What can go wrong, how it ends, and what it leaves: the tables of ``docs/faults.md``.

Each fault of a load or of ``llm.run`` is planted in one test of one run; ``test_fault_matrix.py`` sees that it ends as
the table says. Those of processes and of the machine are planted by a test each.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path


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
                 "child = multiprocessing.get_context('fork').Process(target=threading.Event().wait, daemon=True)\n"
                 "child.start()\nprint(child.pid, file=open('child.txt', 'w'))",
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


@dataclass(frozen=True)
class Elsewhere:
    """One fault of processes or of the machine, as the documentation names it, and the test that plants it."""

    what: str
    ends: str
    left: str
    #: Under ``tests``, or a benchmark.
    test: str


ELSEWHERE = (
    Elsewhere(
        "the load is killed, segfaults or exits",
        "FAILED: `killed by SIGKILL in phase 'load'`, with its last lines",
        "nothing",
        "e2e/test_processes.py::test_four_ways_to_fail_are_four_failures_and_the_next_test_runs",
    ),
    Elsewhere(
        "memory runs out, on the host or the GPU",
        "FAILED: out of memory, with the figures taken until then",
        "nothing",
        "e2e/test_processes.py::test_what_was_seen_before_memory_ran_out_is_reported",
    ),
    Elsewhere(
        "pytest-timeout ends a test whose load is at work",
        "FAILED: `killed in phase 'load': Timeout …`; the next test loads anew",
        "nothing",
        "plugins/test_together.py::test_a_time_out_is_that_of_the_test_that_had_it",
    ),
    Elsewhere(
        "pytest-timeout or Ctrl-C while a process is prepared for the next load, or while one ends",
        "the test or the run ends; the next load starts in a process of its own",
        "no process, and no GPU that stays locked",
        "host/test_spares.py::test_an_interruption_leaves_no_spare_and_no_lock",
    ),
    Elsewhere(
        "the warm server is killed while a process is prepared for the next load",
        "that load is forked from a new server",
        "nothing",
        "host/test_spares.py::test_a_spare_whose_server_was_killed_leaves_the_load_to_a_new_server",
    ),
    Elsewhere(
        "the load hangs",
        "FAILED after `--llm-timeout`, with the stacks of all threads",
        "nothing",
        "e2e/test_processes.py::test_four_ways_to_fail_are_four_failures_and_the_next_test_runs",
    ),
    Elsewhere(
        "the warm server is killed",
        "ERROR for its load; the next one is forked from a new server",
        "nothing",
        "e2e/test_processes.py::test_a_killed_server_is_replaced",
    ),
    Elsewhere(
        "pytest is killed (SIGKILL, SIGINT, SIGTERM)",
        "every process that it started ends",
        "logs in `TMPDIR`, which the next run removes",
        "e2e/test_processes.py::test_nothing_outlives_pytest",
    ),
    Elsewhere(
        "a job is cancelled (SIGTERM), with `-n` too",
        "the run ends at once",
        "the reports of the loads that were measured",
        "e2e/test_fault_matrix.py::test_a_run_that_is_terminated_leaves_what_was_measured",
    ),
    Elsewhere(
        "a rank dies, hangs or raises",
        "FAILED: `rank 1 was killed by SIGKILL in phase 'load'`",
        "nothing",
        "e2e/test_ranks.py::test_what_is_planted_in_a_rank_is_named_and_the_next_load_runs",
    ),
    Elsewhere(
        "the holder of a GPU lease is killed",
        "the GPU is free at once",
        "nothing: a lease is not a file",
        "host/test_leases.py::test_a_lease_ends_with_its_holder_and_leaves_no_file",
    ),
    Elsewhere(
        "another process uses the GPU",
        "ERROR after `--llm-wait-gpu`, which names it",
        "nothing",
        "host/test_leases.py::test_unused_gpus_come_first",
    ),
    Elsewhere(
        "NVML is missing, lists no process, or gives 0",
        "`gpu.process` is unavailable with its reason, never 0",
        "nothing",
        "worker/test_gpu_probes.py::test_no_nvml_is_a_reason",
    ),
    Elsewhere(
        "the driver counts in a different PID namespace",
        "the same; the ledger uses the growth of the device's use",
        "nothing",
        "worker/test_gpu_probes.py::test_in_a_container_the_figure_is_unavailable_and_the_ledger_goes_by_difference",
    ),
    Elsewhere(
        "six runs write one baseline, in containers with equal pids and no common `TMPDIR`",
        "all 360 updates are kept",
        "nothing but baselines",
        "unit/test_store.py::test_six_writers_that_share_nothing_but_the_folder_lose_nothing",
    ),
    Elsewhere(
        "the volume of the baselines locks no folders (NFS)",
        "the same, by a file that is removed again",
        "nothing",
        "unit/test_store.py::test_nor_on_a_volume_that_locks_files_only",
    ),
    Elsewhere(
        "the disk is full while a baseline is written",
        "ERROR: `cannot write …; nothing was changed`",
        "the old file",
        "unit/test_store.py::test_a_write_that_breaks_off_leaves_the_old_file",
    ),
    Elsewhere(
        "the disk has too little space for an offload",
        "ERROR before anything is loaded: `offload needs … MiB in …, where … MiB are free`",
        "nothing",
        "e2e/test_full_disk.py::test_an_offload_that_would_fill_the_disk_is_an_error_before_it_loads",
    ),
    Elsewhere(
        "the disk fills while weights are offloaded",
        "ERROR: `the disk is full: …`; the next load is whole",
        "nothing",
        "e2e/test_full_disk.py::test_a_disk_that_fills_while_weights_are_offloaded_is_an_error_of_the_machine",
    ),
    Elsewhere(
        "`TMPDIR` cannot be written",
        "ERROR: `cannot make a temporary folder: …`",
        "nothing",
        "e2e/test_fault_matrix.py::test_a_full_temporary_folder_is_one_sentence",
    ),
    Elsewhere(
        "many loads in one session",
        "no growth of memory, threads, files or children",
        "nothing",
        "benchmarks/growth.py",
    ),
    Elsewhere(
        "a load with disk offload is killed",
        "FAILED as above",
        "its folder until the run ends",
        "e2e/test_fault_matrix.py::test_a_killed_loads_folder_is_removed_and_a_living_ones_is_not",
    ),
)


def table_of_elsewhere() -> str:
    """Return the second table of the documentation."""
    head = ["| fault | how it ends | what is left | test |", "| --- | --- | --- | --- |"]
    places = {fault: fault.test.partition("::")[0] for fault in ELSEWHERE}
    names = {fault: place if place.startswith("benchmarks") else Path(place).name for fault, place in places.items()}
    return "\n".join([*head, *(f"| {f.what} | {f.ends} | {f.left} | `{names[f]}` |" for f in ELSEWHERE)])
