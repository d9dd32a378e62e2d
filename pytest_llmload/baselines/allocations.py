"""Hold the lines that allocate memory today beside those that the baseline's load allocated it by.

Nothing is judged by them: they explain a red gate. A line is found again by its text, or if the file has changed, by
its file and function.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from pytest_llmload.core.results import AllocationSite

#: The number of a line in ``ourapp/serving.py:12 in load_model``.
_NUMBER = re.compile(r":\d+\b")


def beside(now: Sequence[AllocationSite], recorded: Iterable[AllocationSite]) -> list[AllocationSite]:
    """Return the sites of a load, each with the bytes that the baseline's load held there.

    Those are 0 for a site that is not among the recorded ones; without any recorded site, nothing is known of them.
    """
    left = list(recorded)
    if not left:
        return list(now)
    found: dict[int, int] = {}
    for key in (_exactly, _by_function):
        for index, each in enumerate(now):
            same = next((old for old in left if key(old) == key(each)), None) if index not in found else None
            if same is not None:
                left.remove(same)
                found[index] = same.bytes
    return [replace(each, baseline=found.get(index, 0)) for index, each in enumerate(now)]


def _exactly(each: AllocationSite) -> tuple[str, str, str]:
    return each.moment, each.place, each.site


def _by_function(each: AllocationSite) -> tuple[str, str, str]:
    return each.moment, each.place, _NUMBER.sub("", each.site)
