"""Signs that a model learned to please its reward instead of people: pure functions of scores that were measured already.

All rewards are oriented: higher is better. Prompts are the unit that is resampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flowalign.errors import DataError
from flowalign.evaluate.compare import LEVEL, Estimate, mean_with_interval

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """One reward over checkpoints or rounds."""

    scores: ArrayLike
    """`[C, n]`: the same n pictures' prompts and seeds at C checkpoints, in order."""
    prompts: Sequence[object]
    """`[n]`"""


@dataclass(frozen=True)
class Signal:
    """One sign, and whether it sounds."""

    name: str
    alarm: bool
    says: str
    numbers: Mapping[str, Any]


@dataclass(frozen=True)
class JointRates:
    """How often all K rewards say the same of a prompt."""

    better: Estimate
    """JDR_K, joint dominance rate: share of prompts on which aligned is better by all K."""
    worse: Estimate
    """JCR_K, joint collapse rate: share of prompts on which aligned is worse by all K."""
    difference: Estimate
    """JDR_K − JCR_K, in [-1, 1]."""
    rewards: int
    prompts: int


def means_by_prompt(values: ArrayLike, prompts: Sequence[object]) -> dict[object, Array]:
    """Mean of values `[n]` or `[n, K]` over each prompt's pictures. Raises DataError for unequal lengths or one not finite."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) != len(prompts) or not len(values) or not np.isfinite(values).all():
        raise DataError(
            f"there are values of shape {values.shape} for {len(prompts)} prompts; give finite ones, one prompt each."
        )
    rows: dict[object, list[int]] = {}
    for place, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(place)
    return {prompt: values[places].mean(0) for prompt, places in rows.items()}


def joint_rates(base: ArrayLike, aligned: ArrayLike, prompts: Sequence[object], *, seed: int = 0) -> JointRates:
    """Scores `[n, K]` of base and aligned pictures, row by row of the same prompt, and the prompts `[n]` -> joint rates.

    A prompt's score is the mean of its pictures; equal means are neither better nor worse. Raises DataError for unequal shapes.
    """
    left, right = np.asarray(base, dtype=np.float64), np.asarray(aligned, dtype=np.float64)
    if left.ndim != 2 or left.shape != right.shape or not left.size:
        raise DataError(f"scores have shapes {left.shape} and {right.shape}; give two of one shape [pictures, rewards].")
    difference = means_by_prompt(right - left, prompts)
    gaps = np.stack(list(difference.values()))
    better, worse = ((sign * gaps > 0).all(1).astype(float) for sign in (1, -1))
    each = list(difference)
    rates = [mean_with_interval(values, each, seed=seed) for values in (better, worse, better - worse)]
    return JointRates(*rates, rewards=left.shape[1], prompts=len(each))


def paired_change(
    base: ArrayLike, base_prompts: Sequence[object], aligned: ArrayLike, aligned_prompts: Sequence[object], *, seed: int = 0
) -> Estimate:
    """Mean of aligned − base over prompts that both have, each by the mean of its pictures. Raises DataError without any."""
    left, right = means_by_prompt(base, base_prompts), means_by_prompt(aligned, aligned_prompts)
    shared = [prompt for prompt in left if prompt in right]
    if not shared:
        raise DataError("base and aligned share no prompt; draw both from the same prompts.")
    return mean_with_interval([float(right[prompt] - left[prompt]) for prompt in shared], shared, seed=seed)


def divergence(train: Series, held_out: Series, name: str = "held_out", *, seed: int = 0) -> Signal:
    """Whether the reward that is trained on rises while another one falls (Gao et al. 2023, arXiv 2210.10760).

    The last checkpoint is compared with every earlier one c, paired by picture. It sounds where for some c the train reward's
    change lies above zero and the held-out one's below, each with its whole interval at level 1 − 0.05/(C − 1): over C − 1
    looks one of twenty sets without a change may sound by chance for either reward. Raises DataError for fewer than two
    checkpoints or unequal numbers of them.
    """
    up, down = (np.asarray(series.scores, dtype=np.float64) for series in (train, held_out))
    if up.ndim != 2 or down.ndim != 2 or len(up) != len(down) or len(up) < 2:
        raise DataError(f"scores have shapes {up.shape} and {down.shape}; give [checkpoints, pictures], 2 checkpoints or more.")
    level = 1 - (1 - LEVEL) / (len(up) - 1)
    changes = []
    for place in range(len(up) - 1):
        told = [
            mean_with_interval(scores[-1] - scores[place], series.prompts, seed=seed, level=level)
            for scores, series in ((up, train), (down, held_out))
        ]
        changes.append({"since": place, "train": asdict(told[0]), name: asdict(told[1])})
    sounding = [each for each in changes if each["train"]["low"] > 0 and each[name]["high"] < 0]  # type: ignore[index]
    last = sounding[0] if sounding else changes[0]
    said = f"since checkpoint {last['since']} the train reward changed by {_signed(last['train'])}"
    said += f" and {name} by {_signed(last[name])}"
    says = f"The trained reward rises while {name} falls: {said}." if sounding else f"No divergence of {name}: {said}."
    return Signal(f"divergence/{name}", bool(sounding), says, {"level": level, "changes": changes})


def _signed(estimate: Any) -> str:
    return f"{estimate['value']:+.3g} [{estimate['low']:+.3g}, {estimate['high']:+.3g}]".replace("-", "−")


def joint(base: ArrayLike, aligned: ArrayLike, prompts: Sequence[object], *, seed: int = 0) -> Signal:
    """Sounds where jointly worse prompts are more frequent than jointly better ones, beyond chance; see `joint_rates`."""
    rates = joint_rates(base, aligned, prompts, seed=seed)
    alarm = rates.difference.high < 0
    k = rates.rewards
    shown = f"JDR_{k} {_share(rates.better)}, JCR_{k} {_share(rates.worse)} of {rates.prompts} prompts"
    says = f"More prompts got worse by all {k} rewards than better: {shown}." if alarm else f"No joint collapse: {shown}."
    return Signal("joint", alarm, says, asdict(rates))


def _share(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.0f} % [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


def less_diverse(name: str, base: ArrayLike, aligned: ArrayLike, prompts: Sequence[object], *, seed: int = 0) -> Signal:
    """Diversity of each prompt's pictures `[G]` of base and aligned, by `diversity.pairwise_distance` or `vendi_score`: sounds
    where aligned is less diverse, beyond chance."""
    change = paired_change(base, prompts, aligned, prompts, seed=seed)
    alarm = change.high < 0
    before = float(np.mean(np.asarray(base, dtype=np.float64)))
    share = change.value / before if before else 0.0
    shown = f"{_signed(asdict(change))}, {100 * share:+.0f} % of {before:.3g}".replace("-", "−")
    says = (
        f"Pictures of one prompt became more alike by {name}: {shown}."
        if alarm
        else f"No loss of diversity by {name}: {shown}."
    )
    return Signal(f"diversity/{name}", alarm, says, {"base": before, "change": asdict(change), "relative": share})


def grid_peak(
    base: ArrayLike, base_prompts: Sequence[object], aligned: ArrayLike, aligned_prompts: Sequence[object], *, seed: int = 0
) -> Signal:
    """Peaks of a grid in the pictures' spectra, higher is more of an artefact: sounds where aligned has more, beyond chance."""
    change = paired_change(base, base_prompts, aligned, aligned_prompts, seed=seed)
    alarm = change.low > 0
    shown = _signed(asdict(change))
    said = "A grid shows in the pictures' spectra" if alarm else "No new grid"
    says = f"{said}: the peak changed by {shown}."
    return Signal("grid_peak", alarm, says, {"change": asdict(change)})


def hacking_signals(
    *,
    train: Series | None = None,
    held_out: Mapping[str, Series] | None = None,
    rewards: tuple[ArrayLike, ArrayLike, Sequence[object]] | None = None,
    diversity: Mapping[str, tuple[ArrayLike, ArrayLike, Sequence[object]]] | None = None,
    peaks: tuple[ArrayLike, Sequence[object], ArrayLike, Sequence[object]] | None = None,
    seed: int = 0,
) -> tuple[Signal, ...]:
    """Every sign that can be read from what is given.

    train, held_out: rewards over checkpoints, see `divergence`. rewards: base and aligned `[n, K]` and prompts, see `joint`.
    diversity: name -> base and aligned `[G]` and their prompts, see `less_diverse`. peaks: base, its prompts, aligned, its
    prompts, see `grid_peak`. Raises DataError where `held_out` comes without `train`.
    """
    if held_out and train is None:
        raise DataError("held-out rewards say something beside the reward that is trained on; give train as well.")
    found = [divergence(train, series, name, seed=seed) for name, series in (held_out or {}).items() if train is not None]
    found += [joint(*rewards, seed=seed)] if rewards is not None else []
    found += [less_diverse(name, *each, seed=seed) for name, each in (diversity or {}).items()]
    found += [grid_peak(*peaks, seed=seed)] if peaks is not None else []
    return tuple(found)
