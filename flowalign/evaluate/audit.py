"""`audit`: what is wrong with a set of comparisons, before it is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowalign.data.audit import audit as count
from flowalign.data.records import Comparison
from flowalign.errors import DataError
from flowalign.evaluate.checks import leaks, pictures, scores, votes
from flowalign.evaluate.checks.base import VERDICTS, Check, Verdict
from flowalign.evaluate.survey import Survey, survey
from flowalign.scoring.table import ScoreTable

VERSION = 1
UNSAFE = "nsfw"


@dataclass(frozen=True)
class Audit:
    """All checks of a set of comparisons."""

    survey: Survey
    checks: tuple[Check, ...]
    counts: Mapping[str, Any]
    """Of `data.audit`."""
    unasked: Mapping[str, str]
    """Check that was not made -> what it needs."""

    @property
    def verdict(self) -> Verdict:
        """The worst of the checks."""
        return max((check.verdict for check in self.checks), key=VERDICTS.index)

    @property
    def drop(self) -> dict[int, dict[str, str]]:
        """Place of a comparison that had better be left out -> check -> why; in the order of places."""
        out: dict[int, dict[str, str]] = {}
        for check in self.checks:
            for place, why in check.drop.items():
                out.setdefault(place, {})[check.name] = why
        return dict(sorted(out.items()))

    def about(self) -> dict[str, Any]:
        """What can be written as JSON."""
        return {
            "version": VERSION,
            "source": self.survey.name,
            "verdict": self.verdict,
            "counts": dict(self.counts),
            "checks": [
                {
                    "name": check.name,
                    "title": check.title,
                    "verdict": check.verdict,
                    "says": check.says,
                    "numbers": dict(check.numbers),
                    "suggested_drop": len(check.drop),
                }
                for check in self.checks
            ],
            "not_checked": dict(self.unasked),
            "suggested_drop": len(self.drop),
        }


def audit(
    comparisons: Sequence[Comparison],
    name: str,
    *,
    table: ScoreTable | None = None,
    against: tuple[Sequence[Comparison], str] | None = None,
    unsafe_reward: str | None = None,
    unsafe_above: float = 0.5,
    limit: int | None = None,
    workers: int = 2,
    progress: bool = False,
) -> Audit:
    """Ask every question that can be asked of comparisons; `name` is what to call them.

    table: scores of their pictures, for agreement, gaps and safety. against: another split and its name, for leakage.
    unsafe_reward: the table's reward that flags unsafe pictures, by default "nsfw" where there is one; unsafe_above: from which
    score on. limit: the first so many comparisons; workers: threads that decode.
    Raises DataError where no comparison can be read at all.
    """
    found = survey(comparisons, name, limit=limit, workers=workers, progress=progress)
    if not found.votes:
        said = f": {found.bad[0].reason}" if found.bad else ""
        raise DataError(f"none of the {found.rows} comparisons of {name} can be read{said}")
    checks: list[Check] = [
        votes.rows(found),
        pictures.damaged(found),
        pictures.same_picture(found),
        votes.repeated(found),
        votes.contradictions(found),
        votes.ties(found),
        pictures.duplicates(found),
        pictures.sizes(found),
        votes.roles(found),
        votes.cycles(found),
        votes.balance(found),
    ]
    unasked: dict[str, str] = {}
    if against is None:
        unasked |= dict.fromkeys(("prompt_leakage", "picture_leakage"), "--against OTHER_SPLIT")
    else:
        other = survey(against[0], against[1], workers=workers, progress=progress)
        checks += [leaks.prompts(found, other), leaks.pictures(found, other)]
    checks += _scored(found, table, unsafe_reward, unsafe_above, unasked)
    return Audit(found, tuple(checks), count(comparisons, range(found.rows)), unasked)


def _scored(
    found: Survey, table: ScoreTable | None, unsafe_reward: str | None, unsafe_above: float, unasked: dict[str, str]
) -> list[Check]:
    """Checks by a table, or else by the scores that the comparisons carry."""
    matched = scores.carried(found) if table is None else scores.scored(found, table)
    if matched is None:
        unasked |= dict.fromkeys(("agreement", "gaps", "unsafe"), "--table SCORES.parquet, see flowalign score")
        return []
    checks = [scores.agreement(found, matched), scores.gap(found, matched)]
    if table is not None and (unsafe_reward or UNSAFE in table.cards):
        checks.append(scores.unsafe(found, table, matched, unsafe_reward or UNSAFE, unsafe_above))
    else:
        unasked["unsafe"] = f"a table with the reward {unsafe_reward or UNSAFE}"
    return checks
