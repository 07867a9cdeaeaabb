"""`Calibration`: what was fitted for a table's rewards, as a file, and the columns that it adds to a table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowalign.data.records import Comparison
from flowalign.data.writer import address
from flowalign.errors import DataError, reason
from flowalign.files import write_text
from flowalign.scoring.calibrate import (
    Fusion,
    Link,
    Ties,
    fit_fusion,
    fit_link,
    fit_ties,
    folds_of,
    reliability,
    win_rate,
    with_intervals,
)
from flowalign.scoring.combine import combined, disagreement
from flowalign.scoring.table import CALIBRATED, ScoreTable

VERSION = 1
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Fitted:
    """What was fitted for one reward."""

    fingerprint: str
    """Of the reward that it was fitted for."""
    link: Link
    before: Mapping[str, Any] = field(default_factory=dict)
    """How good σ(d) is: accuracy, log_loss, brier, ece as [value, low, high], reliability; empty without labelled pairs."""
    after: Mapping[str, Any] = field(default_factory=dict)
    """The same of the link on prompts that it was not fitted on."""


@dataclass(frozen=True)
class Calibration:
    """Links of all rewards, and what was fitted beside them."""

    rewards: Mapping[str, Fitted]
    pairs: int = 0
    """Labelled pairs that it was fitted on; 0: temperatures are the spread of scores within a prompt."""
    fusion: Fusion | None = None
    fused: Mapping[str, Any] = field(default_factory=dict)
    """How good the fusion is, out of fold; as `Fitted.after`."""
    ties: Mapping[str, Ties] = field(default_factory=dict)
    """By reward; empty where no label is a tie."""

    def apply(self, table: ScoreTable, *, base: ScoreTable | None = None, by: str = "mean") -> ScoreTable:
        """The table with calibrated.R, combined and disagreement.

        Every picture is held against the others of its prompt, or, with `base`, against the base generator's pictures of that
        prompt. by: see `combine.combined`. Raises DataError for a reward that is another one than was calibrated.
        """
        for name in table.rewards:
            self._check(table, name)
            if base is not None:
                self._check(base, name)
        groups = table.groups()
        opponents = base.groups() if base is not None else {}
        columns: dict[str, Any] = {}
        for name in table.rewards:
            link, scores = self.rewards[name].link, table.oriented(name)
            rates = np.full(len(table), np.nan)
            against = base.oriented(name) if base is not None else None
            for prompt, rows in groups.items():
                others = None if against is None else against[opponents.get(prompt, np.array([], dtype=np.int64))]
                rates[rows] = win_rate(scores[rows], link, others)
            columns[CALIBRATED + name] = rates
        calibrated = table.having(columns)
        utility = None
        if self.fusion is not None:
            utility = self.fusion.utility(np.stack([table.oriented(name) for name in self.fusion.rewards], axis=1))
        values = calibrated.calibrated()
        return calibrated.having(
            {"combined": combined(by, values, list(groups.values()), utility), "disagreement": disagreement(values)}
        )

    def _check(self, table: ScoreTable, name: str) -> None:
        if name not in self.rewards:
            known = ", ".join(self.rewards)
            raise DataError(f"the reward {name!r} was not calibrated, only {known}; calibrate again with it.")
        if name not in table.cards:
            raise DataError(f"the base table has no scores of {name!r}; score the base's pictures with the same rewards.")
        if table.cards[name].fingerprint != self.rewards[name].fingerprint:
            raise DataError(
                f"the reward {name!r} is not the one that was calibrated: its weights or preprocessing differ; calibrate again."
            )

    def write(self, path: Path) -> None:
        """Write JSON, atomically."""
        about = {"flowalign": "calibration", "version": VERSION, **asdict(self)}
        write_text(path, json.dumps(about, indent=1, allow_nan=False) + "\n")


def read_calibration(path: Path) -> Calibration:
    """Read what `Calibration.write` wrote. Raises DataError for anything else."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["flowalign"] != "calibration" or about["version"] != VERSION:
            raise DataError(
                f"{path} is of version {about['version']}; this flowalign reads version {VERSION}, calibrate again."
            )
        rewards = {}
        for name, each in about["rewards"].items():
            link = Link(**each["link"] | {"knots": tuple(map(tuple, each["link"]["knots"]))})
            rewards[name] = Fitted(each["fingerprint"], link, each["before"], each["after"])
        fusion = about["fusion"]
        if fusion is not None:
            fusion = Fusion(**{name: tuple(value) if isinstance(value, list) else value for name, value in fusion.items()})
        ties = {name: Ties(**each) for name, each in about["ties"].items()}
        return Calibration(rewards, about["pairs"], fusion, about["fused"], ties)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not a calibration ({reason(error)}); give the JSON that flowalign calibrate wrote."
        ) from error


@dataclass(frozen=True)
class Labelled:
    """Pairs whose pictures are rows of a table."""

    first: NDArray[np.int64]
    """Rows of the chosen pictures `[n]`."""
    second: NDArray[np.int64]
    label: Array
    """`[n]` the probability that the first is preferred."""
    prompts: tuple[str, ...]
    """`[n]`"""
    given: int
    """Pairs that there were; the others' pictures are not in the table."""


def match(table: ScoreTable, comparisons: Sequence[Comparison]) -> Labelled:
    """Find the pictures of pairs in a table: by path and prompt, else by content and prompt.

    Each pair stands once as it is and, so that no link can learn a liking for the first place from files that always name the
    chosen picture first, is taken the other way round for every second pair. Rows that cannot be read are left out.
    """
    prompts = [str(prompt) for prompt in table.texts("prompt")]
    by_path = {(str(path), prompt): row for row, (path, prompt) in enumerate(zip(table.texts("path"), prompts, strict=True))}
    by_content = {
        (str(image), prompt): row for row, (image, prompt) in enumerate(zip(table.texts("image"), prompts, strict=True))
    }
    found: list[tuple[int, int, float, str]] = []
    given = 0
    for place in range(len(comparisons)):
        try:
            comparison = comparisons[place]
            if len(comparison.images) != 2:
                continue
            given += 1
            rows = []
            for image in comparison.images:
                row = by_path.get((address(image) or "", comparison.prompt))
                if row is None:
                    row = by_content.get((hashlib.sha256(image.read()).hexdigest(), comparison.prompt))
                rows.append(row)
        except DataError:
            continue
        if None not in rows:
            swap = len(found) % 2 == 1
            label = 1 - comparison.preference if swap else comparison.preference
            a, b = rows[::-1] if swap else rows
            found.append((a, b, label, comparison.prompt))  # type: ignore[arg-type]
    first, second, label, prompt = zip(*found, strict=True) if found else ((), (), (), ())
    return Labelled(np.array(first, np.int64), np.array(second, np.int64), np.array(label, float), tuple(prompt), given)


def calibrate(
    table: ScoreTable,
    labelled: Labelled | None = None,
    *,
    method: str = "temperature",
    fuse: bool = False,
    ties: str = "half",
    folds: int = 5,
    seed: int = 0,
) -> Calibration:
    """Fit every reward of the table: on labelled pairs where there are some, else by the spread of scores within prompts.

    method: one of `calibrate.LINKS`. ties: half (a tie is a label of ½), rao_kupper or davidson, whose law is fitted beside the
    link where labels hold ties. Raises DataError where pairs are needed and fewer than 20 of them are in the table.
    """
    if labelled is None:
        if method != "temperature" or fuse:
            what = "a fusion" if fuse else f"method {method!r}"
            raise DataError(f"{what} is fitted on labelled pairs and there are none; give --pairs FILE.")
        links = {name: Link("temperature", slope=1 / _spread(table, name)) for name in table.rewards}
        return Calibration({name: Fitted(table.cards[name].fingerprint, link) for name, link in links.items()})
    scores = np.stack([table.oriented(name) for name in table.rewards], axis=1)
    difference = scores[labelled.first] - scores[labelled.second]
    whole = ~np.isnan(difference).any(1)
    difference, label = difference[whole], labelled.label[whole]
    prompts = [prompt for prompt, kept in zip(labelled.prompts, whole, strict=True) if kept]
    if len(label) < 20 or len({*prompts}) < 2:
        raise DataError(
            f"of {labelled.given} labelled pairs only {len(label)} have both pictures scored here; score the pictures of "
            "the pairs first, at least 20 of them and 2 prompts."
        )
    rewards, laws = {}, {}
    for place, name in enumerate(table.rewards):
        d = difference[:, place]
        out = out_of_fold(method, d, label, prompts, folds, seed)
        rewards[name] = Fitted(
            table.cards[name].fingerprint,
            fit_link(method, d, label),
            before=quality(Link("temperature")(d), label, prompts, seed),
            after=quality(out, label, prompts, seed),
        )
        if ties != "half" and (label == 0.5).any():
            laws[name] = fit_ties(ties, d, label)
    fusion, fused = None, {}
    if fuse:
        fusion, out = fit_fusion(table.rewards, difference, label, prompts, folds=folds, seed=seed)
        fused = quality(out, label, prompts, seed)
    return Calibration(rewards, len(label), fusion, fused, laws)


def out_of_fold(method: str, difference: Array, label: Array, groups: Sequence[str], folds: int, seed: int) -> Array:
    """Probabilities `[n]` of links that did not see a pair's prompt."""
    fold, _ = folds_of(groups, folds, seed)
    out = np.empty(len(label))
    for number in np.unique(fold):
        held = fold == number
        out[held] = fit_link(method, difference[~held], label[~held])(difference[held])
    return out


def quality(probability: Array, label: Array, groups: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """accuracy, log_loss, brier and ece as [value, low, high], and the dots of a reliability diagram."""
    measures = {name: list(found) for name, found in with_intervals(probability, label, groups, seed=seed).items()}
    return measures | {"reliability": [asdict(dot) for dot in reliability(probability, label)]}


def _spread(table: ScoreTable, name: str) -> float:
    """Root mean square of the differences of one prompt's scores; 1 where there is none."""
    scores, squares = table.oriented(name), []
    for rows in table.groups().values():
        known = scores[rows][~np.isnan(scores[rows])]
        if len(known) > 1:
            squares.append(2 * known.var(ddof=1))
    return float(np.sqrt(np.mean(squares))) if squares and np.mean(squares) > 0 else 1.0
