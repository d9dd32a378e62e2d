"""Sizes, times and tolerances as people write and read them."""

from __future__ import annotations

import pytest

from pytest_llmload.core.units import (
    Tolerance,
    counted,
    format_bytes,
    format_change,
    format_movement,
    format_ranges,
    format_seconds,
    format_value,
    parse_bytes,
    parse_seconds,
    parse_tolerance,
    plural,
)


@pytest.mark.parametrize(
    ("number", "texts"),
    [
        (0, ["0 weights", "0 weights are", "do"]),
        (1, ["1 weight", "1 weight is", "does"]),
        (3, ["3 weights", "3 weights are", "do"]),
    ],
)
def test_a_counted_word_fits_its_number(number: int, texts: list[str]) -> None:
    found = [counted(number, "weight"), counted(number, "weight is", "weights are"), plural(number, "does", "do")]
    assert found == texts


@pytest.mark.parametrize(
    ("text", "size"),
    [("9GiB", 9 << 30), ("512 MB", 512_000_000), ("1.5KiB", 1536), ("0B", 0), (" 2 TiB ", 2 << 40), ("10kB", 10_000)],
)
def test_a_size_is_read_in_binary_and_decimal_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["9", "9gib", "GiB", "-1GiB", "9 GiB/s", "", None, 9, True])
def test_what_is_no_size_says_what_to_write(text: bool | int | str | None) -> None:
    with pytest.raises(ValueError, match=r"write a number and one of B, KiB, .* as in '9GiB'"):
        parse_bytes(text)


@pytest.mark.parametrize(("text", "seconds"), [("150ms", 0.15), ("2 min", 120.0), ("850us", 850e-6), ("30s", 30.0)])
def test_a_time_is_read_in_each_unit(text: str, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


def test_what_is_no_time_says_what_to_write() -> None:
    with pytest.raises(ValueError, match=r"'150 MiB' is not a time: .* as in '150ms'"):
        parse_seconds("150 MiB")


@pytest.mark.parametrize(
    ("text", "tolerance", "unit", "shown"),
    [
        ("1%", Tolerance(relative=0.01), "B", "1 %"),
        ("8MiB", Tolerance(absolute=8 << 20), "B", "8 MiB"),
        ("5% | 8MiB", Tolerance(0.05, 8 << 20), "B", "5 % or 8 MiB"),
        ("5ms", Tolerance(absolute=0.005), "s", "5.0 ms"),
        ("3", Tolerance(absolute=3), "1", "3"),
        ("0", Tolerance(), "B", "exact"),
    ],
)
def test_a_tolerance_is_read_and_shown(text: str, tolerance: Tolerance, unit: str, shown: str) -> None:
    assert parse_tolerance(text, unit) == tolerance
    assert parse_tolerance(text, unit).format(unit) == shown


@pytest.mark.parametrize(
    "text", ["", "a lot", "-1%", "1%%", "8mib", None, 0.01, "1%|50%", "8MiB|1GiB", "1%|", "9" * 400]
)
@pytest.mark.parametrize(("unit", "example"), [("B", "8MiB"), ("s", "5ms"), ("1", "3")])
def test_what_is_no_tolerance_says_what_to_write(text: float | str | None, unit: str, example: str) -> None:
    with pytest.raises(ValueError, match=rf"is not a tolerance here: write '1%', '{example}', or '1%\|{example}'"):
        parse_tolerance(text, unit)


@pytest.mark.parametrize(
    ("text", "unit"), [("8MiB", "s"), ("8MiB", "1"), ("5ms", "B"), ("5ms", "1"), ("3", "B"), ("3", "s")]
)
def test_a_tolerance_is_in_the_unit_of_its_metric(text: str, unit: str) -> None:
    with pytest.raises(ValueError, match="is not a tolerance here"):
        parse_tolerance(text, unit)


def test_a_tolerance_is_the_larger_of_both_and_goes_both_ways() -> None:
    tolerance = Tolerance(relative=0.05, absolute=8)
    assert tolerance.room(100) == 8
    assert tolerance.room(1000) == 50
    assert tolerance.allows(1000, 1050)
    assert tolerance.allows(1000, 950)
    assert not tolerance.allows(1000, 1051)
    assert not tolerance.allows(1000, 949)
    assert Tolerance().allows(7, 7)
    assert not Tolerance().allows(7, 8)


@pytest.mark.parametrize(
    ("value", "text"),
    [(7_130_382_336, "6.64 GiB"), (1024, "1.00 KiB"), (1023, "1023 B"), (0, "0 B"), (-(3 << 20), "-3.00 MiB")],
)
def test_bytes_are_shown_in_binary_units(value: int, text: str) -> None:
    assert format_bytes(value) == text


@pytest.mark.parametrize(("value", "text"), [(34.2, "34.20 s"), (0.0123, "12.3 ms"), (0.00085, "850 us")])
def test_a_time_is_shown_in_the_unit_that_fits(value: float, text: str) -> None:
    assert format_seconds(value) == text


@pytest.mark.parametrize(
    ("old", "new", "unit", "text"),
    [
        (0.0028, 0.0029, "s", "2.8 ms -> 2.9 ms"),
        (0.00283, 0.00277, "s", "2.83 ms -> 2.77 ms"),
        (1 << 30, (1 << 30) + (1 << 20), "B", "1.000 GiB -> 1.001 GiB"),
        (1 << 30, (1 << 30) + 1, "B", "1.00 GiB -> 1.00 GiB"),
        (3, 3, "1", "3 -> 3"),
        (2691, 2433, "1", "2,691 -> 2,433"),
    ],
)
def test_two_values_that_differ_are_told_apart(old: float, new: float, unit: str, text: str) -> None:
    assert format_movement(old, new, unit) == text


def test_a_change_always_has_a_sign() -> None:
    assert format_change(512, "B") == "+512 B"
    assert format_change(-(1 << 30), "B") == "-1.00 GiB"
    assert format_change(-0.25, "s") == "-250.0 ms"
    assert format_change(1, "1") == "+1"
    assert format_value(1235, "1") == "1,235"


def test_numbers_as_ranges() -> None:
    assert format_ranges([]) == ""
    assert format_ranges([3, 0, 2, 1]) == "0-3"
    assert format_ranges([0, 1, 4, 7, 8]) == "0-1,4,7-8"
