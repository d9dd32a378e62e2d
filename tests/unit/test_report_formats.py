"""Reports for people: Markdown that fits a comment, and HTML in which foreign text is never markup."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser

import pytest
from report_gallery import DEVICE, HOSTILE, judged, many, measured, report
from sample_loads import NF4

from pytest_llmload.baselines.record import record
from pytest_llmload.core.errors import ReportError
from pytest_llmload.core.runs import Run
from pytest_llmload.core.verdicts import ERROR, FAIL
from pytest_llmload.reports import html, markdown
from pytest_llmload.reports.document import document
from pytest_llmload.reports.html.page import MOST
from pytest_llmload.reports.reading import parse


class Tags(HTMLParser):
    """Every element and attribute of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def page() -> str:
    return html.text(report())


@pytest.fixture(scope="module")
def hostile_page() -> str:
    return html.text(report(HOSTILE))


def test_a_document_is_read_back_as_it_was_written() -> None:
    written = report()
    read = parse(written, "run.json")
    assert document(read.runs, stale=read.stale, notes=read.notes) == written


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": 2}, "schema 2"),
        ({"schema": True}, "is not a report"),
        ({"runs": None}, "runs needs list"),
        ({"runs": ["x"]}, "run 1 needs dict"),
        ({"stale": [3]}, "stale needs str"),
    ],
)
def test_what_is_not_a_report_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ReportError, match=re.escape(says)):
        parse({**report(), **change}, "run.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("metrics", {"gpu.settled": "many"}),
        ("samples", [1]),
        ("manifest", [{"module": "m"}]),
        ("verdicts", {"memory": {"verdict": "ok"}}),
        ("verdicts", {"other": {"verdict": "ok", "whole": False, "reason": "", "metrics": {}}}),
        ("spec", {"model": "m"}),
        ("outcome", "fine"),
        ("tests", "t::a"),
        ("timeline", {"host": [["a", 1]]}),
    ],
)
def test_a_value_of_a_wrong_type_is_refused_wherever_it_stands(name: str, value: object) -> None:
    written = report()
    written["runs"][0] = {**written["runs"][0], name: value}
    with pytest.raises(ReportError, match="run 1"):
        parse(written, "run.json")


def test_names_that_a_newer_release_added_are_ignored() -> None:
    written = report()
    written["runs"][0]["colour"] = written["colour"] = "blue"
    written["runs"][0]["verdicts"]["memory"]["metrics"]["gpu.settled"]["colour"] = "blue"
    assert len(parse(written, "run.json").runs) == len(written["runs"])


# --- Markdown --------------------------------------------------------------------------------------------------------


def test_markdown_says_what_moved_by_how_much_why_and_how_to_accept_it() -> None:
    text = markdown.text(report())
    assert text.startswith("### Model loading: 5 of 12 loads failed")
    for part in (
        "gpu.settled    6.64 GiB -> 7.17 GiB   (+8.0 %, tolerance 2 MiB)",
        "because        160 x Linear4bit: double quant dropped, absmax uint8 -> float32 (+480.00 MiB)",
        "`bitsandbytes 0.50.1 -> 0.50.2 (1 load)`",
        "--llm-update-baselines",
        "llmload accept run.json",
        "GPU 0 is held by pid 4711",
        "baselines/polyglot-ko-12.8b/old.json",
    ):
        assert part in text
    assert text.count("baseline missing") == 1, "three sections without a file are one missing baseline"


def test_a_load_whose_test_failed_is_not_said_to_be_ok() -> None:
    good = measured(NF4)
    fine = judged(NF4, record(None, [good, good], update=True).baseline, good)
    own = dataclasses.replace(
        fine, outcome=FAIL, messages=["t.py::test_own: assert 3 == 4"], failures=["t.py::test_own: assert 3 == 4"]
    )
    machine = dataclasses.replace(
        fine,
        outcome=ERROR,
        messages=["baselines/x.json is not valid JSON"],
        failures=["baselines/x.json is not valid JSON"],
    )
    for run, word in ((own, "test failed"), (machine, "machine")):
        written = document([run])
        text = markdown.text(written)
        assert text.startswith(f"### Model loading: 1 of 1 load failed (1 {word})\n\n#### {word}: `{NF4.id}`")
        assert run.messages[0] in text
        assert f"| **{word}** |" in text
        assert Tags(html.text(written)).texts.count(word) == 4, "the count, the card, the table and the details"
        assert written["runs"][0]["verdict"] == fine.verdict, "what was compared did not fail"


def test_a_limit_that_was_exceeded_is_the_fate_in_every_report() -> None:
    sentence = "memory ceiling exceeded: the host held 3.24 MiB"
    over = judged(NF4, None, measured(NF4), comparisons=[], outcome=FAIL, messages=[sentence], failures=[sentence])
    over.over_limits = [sentence]
    text = markdown.text(document([over]))
    assert text.startswith("### Model loading: 1 of 1 load failed (1 over limit)")
    assert sentence in text


def test_a_comment_has_room_for_any_run() -> None:
    text = markdown.text(many(400))
    assert 400 < len(text) < markdown.MOST
    assert "40 of 400 loads failed" in text
    long = report("x" * 30_000)
    assert len(markdown.text(long)) < markdown.MOST


def test_foreign_text_is_code_in_markdown() -> None:
    text = markdown.text(report(HOSTILE))
    fence = None
    for line in text.splitlines():
        opened = re.fullmatch(r"(`{3,})(text)?", line)
        if opened and fence is None:
            fence = opened[1]
        elif line == fence:
            fence = None
        elif fence is None:
            spans = r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)"
            rest = re.sub(spans, "", line)
            for sign in ("<img", "<script", "](http", "@all", "onerror"):
                assert sign not in rest, line
            if line.startswith("|"):
                assert len(re.findall(r"(?<!\\)\|", line)) == 9, line
    assert fence is None


@pytest.mark.parametrize("text", ["`", "``a`", "a|b", "\n", "", "a\nb", "`a`b``c", "<b>", "@all #1"])
def test_inline_code_holds_any_text(text: str) -> None:
    made = markdown.code(text)
    fence = re.match("`+", made)[0]  # type: ignore[index]
    assert made.endswith(fence)
    assert len(made) > 2 * len(fence)
    assert fence not in made[len(fence) : -len(fence)].replace("\\|", "|") or not text


# --- HTML ------------------------------------------------------------------------------------------------------------


def test_html_shows_what_was_measured(page: str) -> None:
    found = Tags(page)
    text = " ".join(" ".join(found.texts).split())
    for part in (
        "5 of 12 loads failed",
        "double quant dropped",
        "Memory by load and phase",
        "Memory while loading",
        "Time of the load",
        "prefill.kernels",
        "Modules by kind",
        "Linear4bit",
        "Ledger",
        "context 500.00 MiB",
        "bitsandbytes 0.50.1 -> 0.50.2",
        "160 weights are dense",
        "CUDA out of memory",
        "needs 2 GPUs",
        "improved",
    ):
        assert part in text
    assert found.tags.count("svg") > 50
    assert found.tags.count("h1") == 1


def test_the_median_is_the_same_in_the_picture_and_beside_it() -> None:
    run = Run(NF4, DEVICE, measured(NF4, samples={"ttft": [0.01, 0.03]}), nodeids=["t::a"])
    found = Tags(html.text(document([run])))
    assert "20.0 ms" in found.texts
    label = "2 samples from 10.0 ms to 30.0 ms, median 20.0 ms"
    assert label in [value for name, value in found.attributes if name == "aria-label"]


def test_html_is_one_file_that_asks_for_nothing(page: str, hostile_page: str) -> None:
    for text in (page, hostile_page):
        found = Tags(text)
        assert not {"link", "img", "iframe", "object", "base", "audio", "video"} & set(found.tags)
        names = {name for name, _ in found.attributes}
        assert not {"src", "srcset", "action", "style", "data", "xlink:href"} & names
        assert not [name for name in names if name.startswith("on")]
        assert all((value or "").startswith("#") for name, value in found.attributes if name == "href")
        assert "default-src 'none'" in text


def test_foreign_text_never_becomes_markup(page: str, hostile_page: str) -> None:
    plain, hostile = Tags(page), Tags(hostile_page)
    assert set(hostile.tags) <= set(plain.tags)
    assert hostile.tags.count("script") == plain.tags.count("script") == 1
    assert "onerror" in " ".join(hostile.texts), "it is shown, as text"


def test_a_run_of_any_size_stays_under_the_limit() -> None:
    big = many(200)
    text = html.text(big)
    assert len(text.encode()) < MOST
    assert text.count('class="load"') == 200
    for run in big["runs"]:
        run["notes"] = ["n" * 60_000]
    text = html.text(big)
    assert len(text.encode()) < MOST
    assert "loads are omitted" in text
    assert "20 of 200 loads failed" in text


def test_a_run_without_loads_is_a_report_too() -> None:
    empty = document([])
    assert "nothing was loaded" in markdown.text(empty)
    assert "nothing was loaded" in html.text(empty)
