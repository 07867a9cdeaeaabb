"""`Check`: one question to a set of comparisons, and its answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from flowalign.evaluate.survey import Shown, Survey

Verdict = Literal["ok", "look", "bad"]
VERDICTS: tuple[Verdict, ...] = ("ok", "look", "bad")
EXAMPLES = 12


@dataclass(frozen=True)
class Check:
    """What was asked, how it came out, and which rows to leave out."""

    name: str
    title: str
    verdict: Verdict
    """ok: nothing to do; look: may be meant so, see for yourself; bad: would harm training or its evaluation."""
    says: str
    """One sentence or two for people."""
    numbers: Mapping[str, Any]
    drop: Mapping[int, str] = field(default_factory=dict)
    """Place of a comparison -> why to leave it out."""
    examples: tuple[tuple[Shown, ...], ...] = ()
    """Pictures to show together."""
    notes: tuple[str, ...] = ()
    """What to list beside it, a line each."""


def together(survey: Survey, pairs: Iterable[tuple[int, ...]]) -> tuple[tuple[Shown, ...], ...]:
    """The first examples, by the numbers of their pictures."""
    return tuple(tuple(map(survey.shown, pair)) for pair in islice(pairs, EXAMPLES))


def graded(share: float, look: float, bad: float) -> Verdict:
    """ok up to a share of `look`, bad above `bad`."""
    return "bad" if share > bad else "look" if share > look else "ok"


def worst(*verdicts: Verdict) -> Verdict:
    """Of several parts of a check."""
    return max(verdicts, key=VERDICTS.index)


def be(count: int) -> str:
    """ "is" or "are"."""
    return "is" if count == 1 else "are"


def percent(share: float) -> str:
    """A share for people; what is not zero does not look like zero."""
    if share == 0 or share >= 0.0005:
        return f"{100 * share:.1f} %"
    return "under 0.1 %"


def many(count: int, noun: str) -> str:
    """ "1 picture", "2,000 pictures"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
