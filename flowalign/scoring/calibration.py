"""`Calibration`: what was fitted for a table's rewards, as a file, and the columns that it adds to a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from flowalign.errors import DataError, allowed, reason
from flowalign.files import write_text
from flowalign.scoring.calibrate import LINKS, Link, fit_link, folds_of, reliability, win_rate, with_intervals
from flowalign.scoring.combine import combined, disagreement
from flowalign.scoring.fusion import Fusion, fit_fusion
from flowalign.scoring.general import General, fit_held_out, pool_rates
from flowalign.scoring.labelled import Labelled
from flowalign.scoring.table import CALIBRATED, ScoreTable
from flowalign.scoring.ties import LAWS, Ties, fit_ties

VERSION = 1
METHODS = ("winrate", *LINKS)
TIES = ("half", *LAWS)
SCORES = "scores"
"""Of a general preference model that reads the table's rewards."""
FEWEST = 20
"""Labelled pairs below which nothing is fitted."""
Array = NDArray[np.float64]
Measured = Mapping[str, Any]
"""accuracy, log_loss, brier and ece, each [value, low, high], and `reliability`, dots of a diagram; empty without labels."""


@dataclass(frozen=True)
class Fitted:
    """What was fitted for one reward."""

    fingerprint: str
    """Of the reward that it was fitted for."""
    link: Link
    ties: Ties | None = None
    """Stands in for the link where a law of ties was fitted."""
    before: Measured = field(default_factory=dict)
    """How good σ(d) is, of raw scores as they are."""
    after: Measured = field(default_factory=dict)
    """How good links are on prompts that they were not fitted on."""

    @property
    def probability(self) -> Callable[[Array], Array]:
        """From differences of oriented scores to the probability that the first is preferred."""
        return self.link if self.ties is None else self.ties.preferred


@dataclass(frozen=True)
class Calibration:
    """Links of all rewards, and what was fitted beside them."""

    rewards: Mapping[str, Fitted]
    method: str = "winrate"
    """One of `METHODS`. winrate: temperatures are the spread of scores within a prompt, and need no labels."""
    pairs: int = 0
    """Labelled pairs that it was fitted on, or measured on where nothing was fitted."""
    fusion: Fusion | None = None
    fused: Measured = field(default_factory=dict)
    """How good the fusion is, out of fold."""
    general: General | None = None
    """A general preference model, which can hold cycles."""
    generalised: Measured = field(default_factory=dict)
    """How good it is, out of fold."""

    def apply(
        self,
        table: ScoreTable,
        *,
        base: ScoreTable | None = None,
        by: str | None = None,
        weights: Mapping[str, float] | None = None,
        features: Callable[[ScoreTable], Array] | None = None,
    ) -> ScoreTable:
        """The table with calibrated.R, combined and disagreement, and general where such a model was fitted.

        Every picture is held against the others of its prompt, or, with `base`, against the base generator's pictures of that
        prompt. by, weights: see `combine.combined`; None is general where there is such a model, fused where there is a fusion,
        else mean. features: what a tower sees in a table's pictures, for a general model that was fitted on that. Raises
        DataError for a reward that is another one than was calibrated, and for weights of others than the table's rewards.
        """
        for name in table.rewards:
            self._check(table, name)
        also = (*(self.fusion.rewards if self.fusion else ()), *(self.general.features if self.general else ()))
        for name in dict.fromkeys((*table.rewards, *also)):
            for each in (table, base):
                if each is not None and name not in each.cards:
                    which = "base table" if each is base else "table"
                    raise DataError(f"the {which} has no scores of {name!r}; score its pictures with the same rewards.")
            if base is not None:
                self._check(base, name)
        groups = table.groups()
        theirs = None if base is None else base.groups()

        def rates(score: Callable[[ScoreTable], Array], probability: Callable[[Array], Array]) -> Array:
            return within(score(table), probability, groups, None if base is None else score(base), theirs)

        columns = {
            CALIBRATED + name: rates(lambda each, name=name: each.oriented(name), self.rewards[name].probability)
            for name in table.rewards
        }
        calibrated = table.having(columns)
        fused = None if self.fusion is None else rates(partial(_utility, self.fusion), expit)
        general = None
        if self.general is not None:
            seen = self._features(features)
            general = pool_rates(self.general, seen(table), groups, None if base is None else seen(base), theirs)
        way = by or ("general" if general is not None else "mean" if fused is None else "fused")
        values = calibrated.calibrated()
        known = {"fused": fused, "general": general, "rewards": table.rewards, "weights": weights}
        columns = {"combined": combined(way, values, [*groups.values()], **known), "disagreement": disagreement(values)}
        return calibrated.having(columns | ({} if general is None else {"general": general}))

    def _features(self, features: Callable[[ScoreTable], Array] | None) -> Callable[[ScoreTable], Array]:
        """What the general model reads of a table."""
        model = self.general
        if model is not None and model.source == SCORES:
            return lambda table: np.stack([table.oriented(name) for name in model.features], axis=1)
        if features is None:
            raise DataError(
                "the general preference model was fitted on what a tower sees in the pictures; name the reward with that tower "
                "by --general."
            )
        return features

    def _check(self, table: ScoreTable, name: str) -> None:
        if name not in self.rewards:
            known = ", ".join(self.rewards)
            raise DataError(f"the reward {name!r} was not calibrated, only {known}; calibrate again with it.")
        if table.cards[name].fingerprint != self.rewards[name].fingerprint:
            raise DataError(
                f"the reward {name!r} is not the one that was calibrated: its weights, preprocessing or tokenizer differ; "
                "calibrate again."
            )

    def write(self, path: Path) -> None:
        """Write JSON, atomically."""
        about = {"flowalign": "calibration", "version": VERSION, **asdict(self)}
        write_text(path, json.dumps(about, indent=1, allow_nan=False) + "\n")


def within(
    scores: Array,
    probability: Callable[[Array], Array],
    groups: Mapping[str, NDArray[np.int64]],
    others: Array | None = None,
    their_groups: Mapping[str, NDArray[np.int64]] | None = None,
) -> Array:
    """Win rates `[n]` of scores within each prompt, or over the `others` of the same prompt; groups: prompt -> its rows."""
    out, none = np.full(len(scores), np.nan), np.array([], dtype=np.int64)
    for prompt, rows in groups.items():
        held = None if others is None else others[(their_groups or {}).get(prompt, none)]
        out[rows] = win_rate(scores[rows], probability, held)
    return out


def _utility(fusion: Fusion, table: ScoreTable) -> Array:
    return fusion.utility(np.stack([table.oriented(name) for name in fusion.rewards], axis=1))


def read_calibration(path: Path) -> Calibration:
    """Read what `Calibration.write` wrote. Raises DataError for anything else."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        kind, version = about["flowalign"], about["version"]
        if kind == "calibration" and version == VERSION:
            return _parsed(about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not a calibration ({reason(error)}); give the JSON that flowalign calibrate wrote."
        ) from error
    raise DataError(f"{path} is a {kind} of version {version}; this flowalign reads version {VERSION}, so calibrate again.")


def _parsed(about: Mapping[str, Any]) -> Calibration:
    rewards = {}
    for name, each in about["rewards"].items():
        link = Link(**each["link"] | {"knots": tuple(map(tuple, each["link"]["knots"]))})
        law = None if each["ties"] is None else Ties(**each["ties"])
        rewards[name] = Fitted(each["fingerprint"], link, law, each["before"], each["after"])
    fusion = about["fusion"]
    if fusion is not None:
        fusion = Fusion(**{name: tuple(value) if isinstance(value, list) else value for name, value in fusion.items()})
    general = about.get("general")  # files of before hold none
    if general is not None:
        told = {name: tuple(value) if isinstance(value, list) else value for name, value in general.items()}
        general = General(**told | {"weights": tuple(map(tuple, general["weights"]))})
    return Calibration(rewards, about["method"], about["pairs"], fusion, about["fused"], general, about.get("generalised", {}))


def calibrate(
    table: ScoreTable,
    labelled: Labelled | None = None,
    *,
    method: str | None = None,
    fuse: bool = False,
    general: str | None = None,
    features: Array | None = None,
    ties: str = "half",
    folds: int = 5,
    seed: int = 0,
) -> Calibration:
    """Fit every reward of the table: on labelled pairs where there are some, else by the spread of scores within prompts.

    method: one of `METHODS`; None is temperature with labelled pairs and winrate without. fuse: fit a combination as well.
    general: fit a general preference model as well, on "scores", the rewards' own, or on `features` `[n, D]` of the table's
    pictures, of which it is the fingerprint.
    ties: half (a tie is a label of ½), rao_kupper or davidson, whose law takes the place of a temperature where labels hold
    ties. Raises DataError for what does not fit together, where pairs are needed, and where fewer than `FEWEST` of them are in
    the table.
    """
    method = method or ("winrate" if labelled is None else "temperature")
    for what, value, choices in (("method", method, METHODS), ("ties", ties, TIES)):
        if value not in choices:
            raise DataError(f"{what} is {value!r}; {allowed(value, choices)}.")
    if ties != "half" and method != "temperature":
        raise DataError(f"ties {ties!r} has a temperature of its own, so method {method!r} does not go with it; leave one out.")
    groups = table.groups()
    own = {name: Link("temperature", slope=1 / spread(table.oriented(name), groups.values())) for name in table.rewards}
    if labelled is None:
        if method != "winrate" or fuse or general is not None:
            what = "a general preference model" if general is not None else "a fusion" if fuse else f"method {method!r}"
            raise DataError(f"{what} is fitted on labelled pairs and there are none; give --pairs FILE.")
        return Calibration({name: Fitted(table.cards[name].fingerprint, link) for name, link in own.items()})
    difference, label, prompts = _differences(table, labelled)

    def fit(name: str) -> Callable[[Array, Array], Fitted]:
        about = table.cards[name].fingerprint
        if method == "winrate":
            return lambda d, p: Fitted(about, own[name])
        if ties != "half" and (label == 0.5).any():
            return lambda d, p: Fitted(about, Link("temperature"), fit_ties(ties, d, p))
        return lambda d, p: Fitted(about, fit_link(method, d, p))

    rewards = {}
    for place, name in enumerate(table.rewards):
        d, fitted = difference[:, place], fit(name)(difference[:, place], label)
        out = out_of_fold(lambda d, p, name=name: fit(name)(d, p).probability, d, label, prompts, folds, seed)
        before = quality(expit(d), label, prompts, seed)
        rewards[name] = Fitted(fitted.fingerprint, fitted.link, fitted.ties, before, quality(out, label, prompts, seed))
    fusion, fused = None, {}
    if fuse:
        fusion, held = fit_fusion(table.rewards, difference, label, prompts, folds=folds, seed=seed)
        fused = quality(held.probability, label, prompts, seed)
    model, told = None, {}
    if general is not None:
        names = table.rewards if features is None else ()
        x = np.stack([table.oriented(name) for name in names], axis=1) if features is None else features
        used = _complete(table, labelled)
        rows = [each[used] for each in (labelled.first, labelled.second)]
        model, out = fit_held_out(x, *rows, label, prompts, source=general, names=names, folds=folds, seed=seed)
        told = quality(out, label, prompts, seed)
    return Calibration(rewards, method, len(label), fusion, fused, model, told)


def _differences(table: ScoreTable, labelled: Labelled) -> tuple[Array, Array, list[str]]:
    """Differences `[n, K]`, labels `[n]` and prompts of the pairs of which every reward scored both pictures."""
    scores = np.stack([table.oriented(name) for name in table.rewards], axis=1)
    difference = scores[labelled.first] - scores[labelled.second]
    whole = _complete(table, labelled)
    prompts = [prompt for prompt, kept in zip(labelled.prompts, whole, strict=True) if kept]
    if whole.sum() < FEWEST or len({*prompts}) < 2:
        raise DataError(
            f"of {labelled.given} labelled pairs only {whole.sum()} ({len({*prompts})} prompts) have both pictures scored by "
            f"every reward here; score the pairs' own pictures, at least {FEWEST} pairs of 2 prompts."
        )
    return difference[whole], labelled.label[whole], prompts


def _complete(table: ScoreTable, labelled: Labelled) -> NDArray[np.bool_]:
    """`[n]` pairs of which every reward scored both pictures."""
    scored = ~np.isnan(np.stack([table.oriented(name) for name in table.rewards], axis=1)).any(1)
    return scored[labelled.first] & scored[labelled.second]


def out_of_fold(
    fit: Callable[[Array, Array], Callable[[Array], Array]],
    difference: Array,
    label: Array,
    groups: Sequence[str],
    folds: int,
    seed: int,
) -> Array:
    """Probabilities `[n]` of links that did not see a pair's prompt."""
    fold, _ = folds_of(groups, folds, seed)
    out = np.empty(len(label))
    for number in np.unique(fold):
        held = fold == number
        out[held] = fit(difference[~held], label[~held])(difference[held])
    return out


def quality(probability: Array, label: Array, groups: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """See `Measured`."""
    measures = {name: list(found) for name, found in with_intervals(probability, label, groups, seed=seed).items()}
    return measures | {"reliability": [asdict(dot) for dot in reliability(probability, label)]}


def spread(scores: Array, groups: Iterable[NDArray[np.int64]]) -> float:
    """Root mean square of the differences of one prompt's scores `[n]`, of all groups of rows; 1 where there is none."""
    squares = []
    for rows in groups:
        known = scores[rows][~np.isnan(scores[rows])]
        if len(known) > 1:
            squares.append(2 * known.var(ddof=1))
    return float(np.sqrt(np.mean(squares))) if squares and np.mean(squares) > 0 else 1.0
