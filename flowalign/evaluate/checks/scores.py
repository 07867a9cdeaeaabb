"""Checks of votes against scores: agreement per reward, gaps, unsafe pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowalign.data.writer import address
from flowalign.errors import DataError, allowed
from flowalign.evaluate.checks.base import EXAMPLES, Check, Verdict, be, graded, many, percent, together
from flowalign.evaluate.compare import mean_with_interval
from flowalign.evaluate.survey import Survey, Vote
from flowalign.scoring.table import ScoreTable

SMALL_GAP = 0.1
"""Standard deviations of a reward; chosen and rejected that are closer are hardly told apart by it."""
BINS = 30

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """Scores of the pictures of votes, higher is better."""

    values: Mapping[str, tuple[Array, ...]]
    """Reward -> for each vote a score per picture, chosen ones first; NaN where there is none."""
    rows: tuple[tuple[int, ...], ...]
    """For each vote the table's row of each picture; -1 where it has none."""
    spread: Mapping[str, float]
    """Standard deviation of each reward over pictures."""
    origin: str


def scored(survey: Survey, table: ScoreTable) -> Scored:
    """Find the votes' pictures in a table: by content and prompt, else by path and prompt; for rewards that do not read the
    prompt, also by content alone."""
    prompts = [str(prompt) for prompt in table.texts("prompt")]
    images, paths = table.texts("image"), table.texts("path")
    by_content = {key: row for row, key in enumerate(zip(images, prompts, strict=True))}
    by_path = {key: row for row, key in enumerate(zip(paths, prompts, strict=True))}
    by_image = {image: row for row, image in enumerate(images)}
    exact, loose = [], []
    for vote in survey.votes:
        rows, any_prompt = [], []
        for number in vote.pictures:
            digest, path = survey.digests[number], address(survey.refs[number])
            row = by_content.get((digest, vote.prompt)) if digest is not None else None
            row = by_path.get((path, vote.prompt)) if row is None and path is not None else row
            rows.append(-1 if row is None else row)
            any_prompt.append(by_image.get(digest, -1) if row is None and digest is not None else rows[-1])
        exact.append(tuple(rows))
        loose.append(tuple(any_prompt))
    values: dict[str, tuple[Array, ...]] = {}
    spread: dict[str, float] = {}
    for name, card in table.cards.items():
        column = np.append(table.oriented(name), np.nan)  # what is at -1
        values[name] = tuple(column[list(rows)] for rows in (exact if card.reads_prompt else loose))
        spread[name] = float(np.nanstd(column)) if not np.isnan(column).all() else 0.0
    return Scored(values, tuple(loose), spread, "the table")


def carried(survey: Survey) -> Scored | None:
    """The scores that the comparisons carry themselves; None where they carry none."""
    names = list(dict.fromkeys(name for vote in survey.votes for name in vote.scores))
    if not names:
        return None
    values = {
        name: tuple(np.array(vote.scores.get(name, [np.nan] * len(vote.pictures)), dtype=float) for vote in survey.votes)
        for name in names
    }
    spread = {name: float(np.nanstd(np.concatenate(each))) for name, each in values.items()}
    return Scored(values, tuple((-1,) * len(vote.pictures) for vote in survey.votes), spread, "the comparisons")


def gaps(votes: tuple[Vote, ...], values: tuple[Array, ...]) -> tuple[Array, list[str], NDArray[np.int64]]:
    """Chosen − rejected `[m]` of every two pictures of opposite sides with scores, their prompts, and the votes' numbers.

    Ties and pictures judged alone have no opposite sides.
    """
    found: list[float] = []
    prompts: list[str] = []
    numbers: list[int] = []
    for number, (vote, each) in enumerate(zip(votes, values, strict=True)):
        if vote.is_tie:
            continue
        k = len(vote.chosen)
        difference = (each[:k, None] - each[None, k:]).ravel()
        difference = difference[~np.isnan(difference)]
        found.extend(difference.tolist())
        prompts += [vote.prompt] * len(difference)
        numbers += [number] * len(difference)
    return np.array(found), prompts, np.array(numbers, dtype=np.int64)


def agreement(survey: Survey, found: Scored) -> Check:
    """Share of votes with which each reward agrees, ties of the reward one half, with an interval over prompts."""
    rewards: dict[str, dict[str, Any]] = {}
    worst: list[tuple[float, tuple[int, int]]] = []
    for name, values in found.values.items():
        difference, prompts, numbers = gaps(survey.votes, values)
        if not len(difference):
            rewards[name] = {"pairs": 0}
            continue
        outcome = 0.5 + 0.5 * np.sign(difference)
        share = mean_with_interval(outcome, prompts)
        says = "agrees" if share.low > 0.5 else "contradicts" if share.high < 0.5 else "does not tell"
        rewards[name] = {
            "pairs": len(difference),
            "prompts": len(set(prompts)),
            "value": share.value,
            "low": share.low,
            "high": share.high,
            "ties": int((difference == 0).sum()),
            "says": says,
        }
        if share.low > 0.5 and found.spread[name] > 0:  # votes that contradict a reward which else agrees
            for place in np.argsort(difference)[: EXAMPLES // 2]:
                vote = survey.votes[int(numbers[place])]
                if difference[place] < 0 and len(vote.pictures) == 2:
                    worst.append((float(difference[place]) / found.spread[name], (vote.chosen[0], vote.rejected[0])))
    known = {name: each for name, each in rewards.items() if each["pairs"]}
    if not known:
        says = f"No vote has both pictures in {found.origin}: score the pictures of these comparisons, with their prompts."
        return Check("agreement", "Votes against rewards", "look", says, {"rewards": rewards})
    groups = {
        key: [name for name, each in known.items() if each["says"] == key] for key in ("agrees", "contradicts", "does not tell")
    }
    parts = []
    for key, verb in (("agrees", "agree with"), ("contradicts", "contradict"), ("does not tell", "tell nothing about")):
        if groups[key]:
            listed = ", ".join(f"{name} ({100 * known[name]['value']:.0f} %)" for name in groups[key])
            parts.append(f"{listed} {_verb(verb, len(groups[key]))} the votes")
    says = "; ".join(parts) + "."
    verdict: Verdict = "ok" if groups["agrees"] and not groups["contradicts"] else "look"
    if groups["contradicts"] and not groups["agrees"]:
        verdict = "bad"
        says += " No reward agrees: look whether chosen and rejected are swapped."
    examples = together(survey, dict.fromkeys(pair for _, pair in sorted(worst)))
    return Check("agreement", "Votes against rewards", verdict, says, {"rewards": rewards}, examples=examples)


def _verb(verb: str, count: int) -> str:
    """ "agree with" -> "agrees with" for one."""
    first, space, rest = verb.partition(" ")
    return verb if count > 1 else f"{first}s{space}{rest}"


def gap(survey: Survey, found: Scored) -> Check:
    """How far chosen and rejected are apart, in standard deviations of each reward over pictures."""
    rewards: dict[str, dict[str, Any]] = {}
    for name, values in found.values.items():
        difference, _, _ = gaps(survey.votes, values)
        if not len(difference) or found.spread[name] <= 0:
            continue
        scaled = difference / found.spread[name]
        counts, edges = np.histogram(scaled, bins=BINS)
        rewards[name] = {
            "pairs": len(scaled),
            "median": float(np.median(scaled)),
            "median_distance": float(np.median(np.abs(scaled))),
            "small": float((np.abs(scaled) < SMALL_GAP).mean()),
            "counts": counts.tolist(),
            "edges": edges.tolist(),
        }
    if not rewards:
        return Check("gaps", "Gaps of scores", "look", "No reward tells two pictures of a comparison apart.", {"rewards": {}})
    small = {name: each["small"] for name, each in rewards.items()}
    least = min(small, key=lambda name: small[name])
    says = (
        f"Closer than {SMALL_GAP:g} standard deviations are chosen and rejected in "
        + ", ".join(f"{percent(share)} by {name}" for name, share in small.items())
        + "."
    )
    verdict = graded(small[least], 0.5, 1.0)
    if verdict == "look":
        says += " Most pairs are near equal by every reward: select with a margin."
    return Check("gaps", "Gaps of scores", verdict, says, {"rewards": rewards})


def unsafe(survey: Survey, table: ScoreTable, found: Scored, reward: str, above: float) -> Check:
    """Pictures that a reward such as `nsfw` takes for unsafe: its raw score above `above`, or, where higher is better, below
    1 − `above`. Raises DataError for a reward that the table does not have."""
    if reward not in table.cards:
        raise DataError(f"the table has no reward {reward!r}; {allowed(reward, table.rewards)}.")
    raw = np.append(table.raw(reward), np.nan)
    risk = raw if table.cards[reward].better == "lower" else 1 - raw
    drop: dict[int, str] = {}
    flagged: dict[int, float] = {}
    seen: set[int] = set()
    for vote, rows in zip(survey.votes, found.rows, strict=True):
        for number, row in zip(vote.pictures, rows, strict=True):
            value = float(risk[row])
            if value == value:
                seen.add(number)
            if value > above:
                flagged[number] = value
                drop[vote.place] = f"a picture's {reward} is {raw[row]:.2f}"
    share = len(flagged) / max(len(seen), 1)
    verdict: Verdict = "look"
    if not seen:
        says = f"No picture has a score by {reward}."
    else:
        says = (
            f"{many(len(flagged), 'picture')} of {len(seen):,} ({percent(share)}) {be(len(flagged))} unsafe "
            f"by {reward}, in {many(len(drop), 'comparison')}."
            if flagged
            else f"None of {many(len(seen), 'picture')} is unsafe by {reward} (above {above:g})."
        )
        verdict = graded(share, 0, 0.01)
    numbers = {"reward": reward, "above": above, "pictures": len(seen), "unsafe": len(flagged), "share": share}
    notes = tuple(f"{survey.refs[number].name}: {value:.2f}" for number, value in list(flagged.items())[:EXAMPLES])
    return Check("unsafe", "Unsafe pictures", verdict, says, numbers, drop, (), notes)
