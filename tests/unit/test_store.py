"""Files in the baselines folder: their places, and writing them without losing anything."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import multiprocessing
import os
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sample_loads import baseline_of, load

from pytest_llmload.baselines.model import Baseline, RecordedTime
from pytest_llmload.baselines.store import BaselineFile, Store
from pytest_llmload.core.errors import BaselineError

DEVICE = "nvidia-h100-80gb-hbm3"


@pytest.fixture
def baseline() -> Baseline:
    return baseline_of(None, [load()], update=True)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "baselines")


@pytest.fixture
def path(store: Store) -> Path:
    return store.path_for("polyglot-ko-12.8b", DEVICE, "nf4-dq")


def test_a_variant_is_a_folder_below_the_device(tmp_path: Path) -> None:
    assert Store(tmp_path).path_for("org--model", "cpu-x86_64", "nf4-dq+lora") == (
        tmp_path / "org--model" / "cpu-x86_64" / "nf4-dq+lora.json"
    )
    assert Store(tmp_path, "nightly").path_for("org--model", "cpu-x86_64", "nf4") == (
        tmp_path / "org--model" / "cpu-x86_64" / "nightly" / "nf4.json"
    )


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "/etc", "a\\b", "a\0b", "a\nb", "x" * 256])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path)
    for names in ((name, DEVICE, "nf4"), ("m", name, "nf4"), ("m", DEVICE, name)):
        with pytest.raises(ValueError, match=r"cannot be a|too long for a file name"):
            store.path_for(*names)
    with pytest.raises(ValueError, match=r"cannot be a baseline variant|too long for a file name"):
        Store(tmp_path, name)


def test_a_slug_too_long_for_a_file_is_refused_and_the_longest_fits(tmp_path: Path) -> None:
    path = Store(tmp_path).path_for("m", "d", "s" * 250)
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(ValueError, match="too long"):
        Store(tmp_path).path_for("m", "d", "s" * 251)


def test_a_variant_cannot_look_like_a_baseline(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must not end in"):
        Store(tmp_path, "nf4.json")


def test_what_is_written_is_read(store: Store, path: Path, baseline: Baseline) -> None:
    assert store.read(path) is None
    assert store.update(path, lambda old: baseline) is True
    assert store.read(path) == baseline


def test_the_change_sees_what_is_there(store: Store, path: Path, baseline: Baseline) -> None:
    store.update(path, lambda old: baseline)
    seen = []
    store.update(path, lambda old: seen.append(old))
    assert seen == [baseline]


def test_an_update_that_changes_nothing_does_not_touch_the_file(store: Store, path: Path, baseline: Baseline) -> None:
    store.update(path, lambda old: baseline)
    # Laid out by hand: still the same content.
    path.write_text(path.read_text().replace("\n", "\n\n"))
    os.utime(path, ns=(1, 1))
    before = path.read_bytes()
    assert store.update(path, lambda old: baseline) is False
    assert store.update(path, lambda old: None) is False
    assert store.update(path, lambda old: dataclasses.replace(baseline)) is False
    assert path.stat().st_mtime_ns == 1
    assert path.read_bytes() == before


def test_the_folder_holds_nothing_but_baselines(store: Store, path: Path, baseline: Baseline) -> None:
    store.update(path, lambda old: baseline)
    store.update(path, lambda old: dataclasses.replace(baseline, memory={}))
    assert [file for file in store.root.rglob("*") if file.is_file()] == [path]


def test_permissions_and_links_are_kept(store: Store, path: Path, baseline: Baseline, tmp_path: Path) -> None:
    real = tmp_path / "elsewhere.json"
    real.touch()
    real.chmod(0o640)
    path.parent.mkdir(parents=True)
    path.symlink_to(real)
    real.unlink()
    store.update(path, lambda old: baseline)
    real.chmod(0o640)
    store.update(path, lambda old: dataclasses.replace(baseline, memory={}))
    assert path.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert present(store, path).memory == {}


def test_unreadable_files_are_named_and_never_overwritten(store: Store, path: Path, baseline: Baseline) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(b'{"schema": 1, \xff')
    with pytest.raises(BaselineError, match="is not UTF-8 text"):
        store.read(path)
    path.write_text('{"schema": 1')
    with pytest.raises(BaselineError, match=r"nf4-dq.json is not valid JSON"):
        store.update(path, lambda old: baseline)
    assert path.read_text() == '{"schema": 1'


def test_a_folder_in_the_place_of_the_file_is_named(store: Store, path: Path, baseline: Baseline) -> None:
    path.mkdir(parents=True)
    with pytest.raises(BaselineError, match=r"cannot read .*nf4-dq.json: Is a directory"):
        store.update(path, lambda old: baseline)


def in_child(function: Callable[..., str], *args: Any) -> str:
    """The text that ``function`` gives in a forked process, so that it may give up its rights."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(function(*args)))
    child.start()
    child.join(600)
    assert child.exitcode == 0
    return str(queue.get())


def update_as_nobody(store: Store, path: Path, baseline: Baseline) -> str:
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    try:
        store.update(path, lambda old: dataclasses.replace(baseline, memory={}))
    except BaselineError as error:
        return str(error)
    return "written"


def test_a_read_only_folder_is_one_sentence_and_loses_nothing(baseline: Baseline) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        store = Store(root / "baselines")
        path = store.path_for("m", DEVICE, "nf4")
        store.update(path, lambda old: baseline)
        before = path.read_bytes()
        path.parent.chmod(0o555)
        message = in_child(update_as_nobody, store, path, baseline)
        assert message == f"cannot write {path}: Permission denied; nothing was changed"
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]
        path.parent.chmod(0o755)


def update_on_a_full_disk(store: Store, path: Path, baseline: Baseline) -> str:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    try:
        store.update(path, lambda old: dataclasses.replace(baseline, memory={}))
    except BaselineError as error:
        return str(error)
    return "written"


def test_what_cannot_be_written_is_known_before(store: Store, path: Path, baseline: Baseline, tmp_path: Path) -> None:
    store.check_writable(path)
    assert list(tmp_path.rglob("*")) == []
    (tmp_path / "file").touch()
    with pytest.raises(BaselineError, match=r"cannot record .*: Not a directory in .*file;") as caught:
        Store(tmp_path / "file").check_writable(tmp_path / "file" / "model" / "cpu" / "none.json")
    assert caught.value.__suppress_context__


def test_a_write_that_breaks_off_leaves_the_old_file(store: Store, path: Path, baseline: Baseline) -> None:
    store.update(path, lambda old: baseline)
    before = path.read_bytes()
    message = in_child(update_on_a_full_disk, store, path, baseline)
    assert message == f"cannot write {path}: File too large; nothing was changed"
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


ROUNDS = 25


def present(store: Store, path: Path) -> Baseline:
    """Return the baseline in a file that exists."""
    baseline = store.read(path)
    assert baseline is not None
    return baseline


def add_times(store: Store, path: Path, entry: dict[str, dict[str, RecordedTime]]) -> None:
    """Add times to those that are in the file when it is written."""

    def change(old: Baseline | None) -> Baseline:
        assert old is not None
        return dataclasses.replace(old, time={**old.time, **entry})

    store.update(path, change)


def record_times(store: Store, path: Path, host: str, start: Any) -> None:
    """One run of many on one kind of host: each adds an entry of its own to the same file."""
    start.wait()
    timing = {"load": RecordedTime(1.0, ((1.0,),), {"page_cache": "warm"})}
    for number in range(ROUNDS):
        add_times(store, path, {f"{host}-{number}": timing})


def test_two_processes_that_write_at_once_lose_nothing(store: Store, path: Path, baseline: Baseline) -> None:
    store.update(path, lambda old: dataclasses.replace(baseline, time={}))
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)
    runs = [context.Process(target=record_times, args=(store, path, host, start)) for host in ("a", "b")]
    for run in runs:
        run.start()
    for run in runs:
        run.join(600)
    assert [run.exitcode for run in runs] == [0, 0]
    assert set(present(store, path).time) == {f"{host}-{number}" for host in "ab" for number in range(ROUNDS)}


def test_a_reader_never_sees_half_a_file(store: Store, path: Path, baseline: Baseline) -> None:
    store.update(path, lambda old: baseline)
    small = dataclasses.replace(baseline, memory={}, manifest=())
    done = threading.Event()

    def small_again(old: Baseline | None) -> Baseline:
        return small

    def whole_again(old: Baseline | None) -> Baseline:
        return baseline

    def write() -> None:
        for number in range(60):
            store.update(path, (whole_again, small_again)[number % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(len(present(store, path).memory))
    writer.join()
    assert seen <= {0, len(baseline.memory)}


def record_apart(store: Store, path: Path, host: str, start: Any, folder: str) -> None:
    """Record as a container does: with a TMPDIR of its own, and with a pid that others have too."""
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    os.getpid = lambda: 7
    for number in range(ROUNDS):
        if not number:
            start.wait()
        add_times(store, path, {f"{host}-{number}": {"load": RecordedTime(1.0, ((1.0,),), {"page_cache": "warm"})}})


def six_writers(store: Store, path: Path, tmp_path: Path) -> list[int | None]:
    """Have six processes write their updates, and return their exit statuses."""
    context = multiprocessing.get_context("fork")
    start = context.Barrier(6)
    runs = []
    for host in "abcdef":
        (tmp_path / host).mkdir()
        runs.append(context.Process(target=record_apart, args=(store, path, host, start, str(tmp_path / host))))
        runs[-1].start()
    for run in runs:
        run.join(600)
    return [run.exitcode for run in runs]


def test_six_writers_that_share_nothing_but_the_folder_lose_nothing(
    store: Store, path: Path, baseline: Baseline, tmp_path: Path
) -> None:
    store.update(path, lambda old: dataclasses.replace(baseline, time={}))
    assert six_writers(store, path, tmp_path) == [0] * 6
    assert set(present(store, path).time) == {f"{host}-{number}" for host in "abcdef" for number in range(ROUNDS)}
    assert list(path.parent.iterdir()) == [path]


def test_nor_on_a_volume_that_locks_files_only(
    store: Store, path: Path, baseline: Baseline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS locks what is open for writing, which no folder is."""

    def flock(handle: int, how: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        original(handle, how)

    original = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    store.update(path, lambda old: dataclasses.replace(baseline, time={}))
    assert six_writers(store, path, tmp_path) == [0] * 6
    assert len(present(store, path).time) == 6 * ROUNDS
    assert list(path.parent.iterdir()) == [path]


def test_a_volume_that_locks_nothing_is_one_sentence(
    store: Store, path: Path, baseline: Baseline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuses)
    with pytest.raises(BaselineError, match=r"cannot lock .* to write .*nf4-dq.json: No locks available"):
        store.update(path, lambda old: baseline)
    assert not path.exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, baseline: Baseline) -> None:
    (tmp_path / "file").touch()
    store = Store(tmp_path / "file")
    with pytest.raises(BaselineError, match=r"cannot lock .* to write .*nf4-dq.json: Not a directory"):
        store.update(store.path_for("model", DEVICE, "nf4-dq"), lambda old: baseline)


def test_a_fifo_and_a_huge_file_are_sentences(store: Store, path: Path, baseline: Baseline) -> None:
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    with pytest.raises(BaselineError, match="is not a regular file: delete it"):
        store.read(path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(BaselineError, match="has 17179869184 bytes, but a baseline has at most"):
        store.update(path, lambda old: baseline)


def test_entries_of_a_device_and_of_a_variant(tmp_path: Path, baseline: Baseline) -> None:
    plain, nightly = Store(tmp_path), Store(tmp_path, "nightly")
    for store, model, device, slug in (
        (plain, "a", DEVICE, "nf4"),
        (plain, "b", DEVICE, "int8"),
        (plain, "a", "cpu-x86_64", "nf4"),
        (nightly, "a", DEVICE, "nf4"),
    ):
        store.update(store.path_for(model, device, slug), lambda old: baseline)
    (tmp_path / "a" / DEVICE / ".nf4.json.77.tmp").touch()
    (tmp_path / "README.md").touch()
    assert list(plain.entries(DEVICE)) == [
        BaselineFile("a", DEVICE, "nf4", tmp_path / "a" / DEVICE / "nf4.json"),
        BaselineFile("b", DEVICE, "int8", tmp_path / "b" / DEVICE / "int8.json"),
    ]
    assert [(entry.model, entry.device) for entry in plain.entries()] == [
        ("a", "cpu-x86_64"),
        ("a", DEVICE),
        ("b", DEVICE),
    ]
    assert [entry.path for entry in nightly.entries()] == [tmp_path / "a" / DEVICE / "nightly" / "nf4.json"]
    assert plain.devices("a", "nf4") == ["cpu-x86_64", DEVICE]
    (tmp_path / "a" / "not-fetched").mkdir()
    (tmp_path / "a" / "not-fetched" / "nf4.json").symlink_to("nowhere")
    assert plain.devices("a", "nf4") == ["cpu-x86_64", DEVICE]
    assert list(Store(tmp_path / "none").entries()) == []
