"""Base against aligned, picture by picture: win rates and differences, each with a paired bootstrap interval.

Two folders of generated pictures are compared only if they were made alike: same prompts, same seeds, same sampler
settings. The prompt is the unit that is resampled, since pictures of one prompt are not independent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from flowalign.errors import DataError, RunError
from flowalign.files import text_lines

if TYPE_CHECKING:
    from flowalign.evaluate.judges import Judge

SAMPLER_KEYS = ("sampler", "steps", "guidance", "height", "width")
LEVEL = 0.95
CHUNK = 1 << 22  # numbers held at once while resampling


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class WinRate:
    """How often, and by how much, aligned beats base. Differences are aligned − base, in the judge's unit."""

    win_rate: Estimate
    """In [0, 1]: win 1, tie ½, loss 0."""
    mean_difference: Estimate
    median_difference: Estimate
    wins: int
    ties: int
    losses: int
    n: int
    """Pairs of pictures."""
    groups: int
    """Independent units that were resampled: prompts."""


def compare(
    base_scores: ArrayLike,
    aligned_scores: ArrayLike,
    *,
    groups: Sequence[object] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> WinRate:
    """Paired comparison of two score vectors `[n]`, with percentile bootstrap intervals.

    `groups` names the prompt of each pair: whole prompts are then resampled (cluster bootstrap; Davison and Hinkley,
    "Bootstrap Methods and their Application", 1997, sections 3.8 and 5.3). Without it every pair is its own group.
    Raises DataError for unequal lengths, no pair at all, or a score that is not finite.
    """
    base, aligned = np.asarray(base_scores, dtype=np.float64), np.asarray(aligned_scores, dtype=np.float64)
    if base.ndim != 1 or base.shape != aligned.shape or not base.size:
        raise DataError(f"scores have shapes {base.shape} and {aligned.shape}; give two vectors of one length, at least 1.")
    if not (np.isfinite(base).all() and np.isfinite(aligned).all()):
        raise DataError("a score is NaN or infinite; find the picture whose judge failed and score it again.")
    if groups is not None and len(groups) != base.size:
        raise DataError(f"there are {len(groups)} groups for {base.size} pairs; name one group per pair.")
    difference = aligned - base
    outcome = 0.5 * (np.sign(difference) + 1.0)
    labels = list(dict.fromkeys(range(base.size) if groups is None else groups))
    place = {label: index for index, label in enumerate(labels)}
    group = np.arange(base.size) if groups is None else np.array([place[label] for label in groups])

    size = np.bincount(group, minlength=len(labels)).astype(np.float64)
    sums = np.stack([np.bincount(group, weights=values, minlength=len(labels)) for values in (outcome, difference)], axis=1)
    order = np.argsort(difference, kind="stable")
    means, medians = [], []
    for counts in _resampled(len(labels), resamples, seed, chunk=max(1, CHUNK // base.size)):
        means.append(counts @ sums / (counts @ size)[:, None])
        medians.append(_weighted_median(difference[order], counts[:, group[order]]))
    rate, mean = np.concatenate(means).T
    return WinRate(
        win_rate=_estimate(outcome.mean(), rate),
        mean_difference=_estimate(difference.mean(), mean),
        median_difference=_estimate(float(np.median(difference)), np.concatenate(medians)),
        wins=int((difference > 0).sum()),
        ties=int((difference == 0).sum()),
        losses=int((difference < 0).sum()),
        n=base.size,
        groups=len(labels),
    )


def mean_with_interval(
    values: ArrayLike, groups: Sequence[object], *, resamples: int = 2_000, seed: int = 0, level: float = LEVEL
) -> Estimate:
    """Mean of values `[n]` with a percentile bootstrap interval; whole groups `[n]`, such as prompts, are resampled.

    Raises DataError for unequal lengths, no value, or one that is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise DataError(f"there are values of shape {values.shape} for {len(groups)} groups; give finite ones, one group each.")
    return of_means(values[:, None], groups, lambda means: means, resamples=resamples, seed=seed, level=level)[0]


def of_means(
    values: ArrayLike,
    groups: Sequence[object],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    resamples: int = 2_000,
    seed: int = 0,
    level: float = LEVEL,
) -> list[Estimate]:
    """What depends on means over rows, with percentile bootstrap intervals; whole groups `[n]`, such as prompts, are resampled.

    values: `[n, ...]`. statistic: means `[R, ...]` of R resamples -> `[R, S]`; one estimate for each of S. A resample of which
    it gives NaN is left out, and where it gives nothing else, the interval is NaN. Raises DataError for unequal lengths, no
    value, or one that is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) != len(groups) or not values.size or not np.isfinite(values).all():
        raise DataError(f"there are values of shape {values.shape} for {len(groups)} groups; give finite ones, one group each.")
    place = {label: index for index, label in enumerate(dict.fromkeys(groups))}
    group = np.array([place[label] for label in groups])
    flat = values.reshape(len(values), -1)
    sums = np.zeros((len(place), flat.shape[1]))
    np.add.at(sums, group, flat)
    size = np.bincount(group).astype(np.float64)
    drawn = []
    for counts in _resampled(len(place), resamples, seed, chunk=max(1, CHUNK // max(sums.shape))):
        means = counts @ sums / (counts @ size)[:, None]
        drawn.append(statistic(means.reshape(-1, *values.shape[1:])))
    told = statistic(values.mean(0, keepdims=True))[0]
    return [_estimate(value, resample, level) for value, resample in zip(told, np.concatenate(drawn).T, strict=True)]


def _resampled(groups: int, resamples: int, seed: int, chunk: int) -> Iterator[NDArray[np.int64]]:
    """How often each group was drawn, `[R, G]` at a time: drawing with replacement, counted."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, chunk):
        yield rng.multinomial(groups, np.full(groups, 1.0 / groups), size=min(chunk, resamples - start))


def _weighted_median(values: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Median of each resample: ascending `values` `[n]`, each taken `counts` `[R, n]` times -> `[R]`."""
    rank = np.cumsum(counts, axis=1)
    total = rank[:, -1:]
    middle = [values[(rank > k).argmax(axis=1)] for k in ((total - 1) // 2, total // 2)]
    return 0.5 * (middle[0] + middle[1])


def _estimate(value: float, resampled: NDArray[np.float64], level: float = LEVEL) -> Estimate:
    known = resampled[~np.isnan(resampled)]
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2]) if len(known) else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high))


@dataclass(frozen=True)
class Generated:
    """One generated picture and how it was made."""

    path: Path
    file_name: str
    prompt: str
    seed: int
    settings: dict[str, Any]
    """sampler, steps, guidance, height, width."""
    generator: str
    weights: tuple[tuple[str, float], ...] = ()
    """Of the objectives that it was drawn under, by name."""

    @property
    def key(self) -> tuple[str, int, tuple[tuple[str, float], ...]]:
        return self.prompt, self.seed, self.weights

    @property
    def caption(self) -> str:
        """The prompt, and what else tells it from others."""
        said = ", ".join(f"{name} {value:.2g}" for name, value in self.weights)
        return f"{self.prompt} ({said})" if said else self.prompt


def read_generation(folder: str | Path) -> list[Generated]:
    """Read a folder of pictures that has a `metadata.jsonl`, one line per picture.

    Each line holds file_name, prompt, seed, sampler, steps, guidance, height, width and generator, and weights if there
    were any; other keys are ignored. Raises DataError for a missing or unreadable file, a missing key, or a prompt and seed
    that occur twice under the same weights.
    """
    index = Path(folder) / "metadata.jsonl"
    try:
        lines = text_lines(index)
    except OSError as error:
        raise DataError(f"{index} cannot be read ({error.strerror}); give a folder that `flowalign generate` wrote.") from error
    pictures: dict[object, Generated] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        picture = _picture(line, index.parent, f"{index} line {number}")
        if picture.key in pictures:
            raise DataError(
                f"{index} line {number} repeats prompt {picture.prompt!r} with seed {picture.seed}; keep one of them."
            )
        pictures[picture.key] = picture
    if not pictures:
        raise DataError(f"{index} lists no picture; generate at least one.")
    return list(pictures.values())


def _picture(line: str, folder: Path, where: str) -> Generated:
    try:
        row = json.loads(line)
        path = folder / row["file_name"]
        settings = {key: row[key] for key in SAMPLER_KEYS}
        under = tuple(sorted(row.get("weights", {}).items()))
        picture = Generated(path, row["file_name"], row["prompt"], row["seed"], settings, str(row["generator"]), under)
    except KeyError as error:
        raise DataError(f"{where} has no key {error.args[0]!r}; every line needs it.") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where} is not a JSON object with a file_name; write one object per line.") from error
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{where} names {row['file_name']!r}, which lies outside its folder; keep pictures inside it.")
    if not path.is_file():
        raise DataError(f"{where} names {row['file_name']!r}, which does not exist; generate it again or remove the line.")
    return picture


def match(base: Sequence[Generated], aligned: Sequence[Generated]) -> list[tuple[Generated, Generated]]:
    """Pair pictures of the same prompt and seed, in the order of `base`, and of the same weights where a side has several.

    Raises DataError if one side lacks a prompt and seed, or if sampler settings differ anywhere.
    """
    several = any(len({each.key[:2] for each in side}) < len(side) for side in (base, aligned))

    def named(picture: Generated) -> tuple[str, int, tuple[tuple[str, float], ...]]:
        return picture.key if several else (picture.prompt, picture.seed, ())

    others = {named(picture): picture for picture in aligned}
    known = {named(picture) for picture in base}
    for keys, side in ((known - others.keys(), "aligned"), (others.keys() - known, "base")):
        if keys:
            prompt, seed, _ = min(keys)
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise DataError(f"the {side} folder has no picture of prompt {prompt!r} with seed {seed}{more}; draw both alike.")
    pairs = [(picture, others[named(picture)]) for picture in base]
    for left, right in pairs:
        for key in SAMPLER_KEYS:
            if left.settings[key] != right.settings[key]:
                raise DataError(
                    f"prompt {left.prompt!r}, seed {left.seed}: {key} is {left.settings[key]!r} in the base folder "
                    f"but {right.settings[key]!r} in the aligned folder; generate both with the same {key}."
                )
    return pairs


def evaluate_folders(
    base: str | Path,
    aligned: str | Path,
    judges: Sequence[Judge],
    *,
    batch_size: int = 32,
    progress: bool = False,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Judge both folders and compare them; the result can be written as JSON.

    Keys: `pairs`, `prompts`, `settings`, `generators`, `interval`, `judges` (per judge: base and aligned mean, `share`
    of pictures above ½ if the judge gives a probability, and the fields of `WinRate`) and `rows` (every pair with its
    scores). Raises DataError as `read_generation` and `match` do, and RunError if a judge returns a wrong number of
    scores or one that is not finite.
    """
    pairs = match(read_generation(base), read_generation(aligned))
    prompts = [left.prompt for left, _ in pairs]
    scores: dict[str, dict[str, NDArray[np.float64]]] = {}
    for judge in judges:
        scores[judge.name] = {
            "base": _scores(judge, [left for left, _ in pairs], batch_size, progress),
            "aligned": _scores(judge, [right for _, right in pairs], batch_size, progress),
        }
    summary: dict[str, Any] = {}
    for judge in judges:
        sides = scores[judge.name]
        found = compare(sides["base"], sides["aligned"], groups=prompts, resamples=resamples, seed=seed)
        summary[judge.name] = {"range": list(judge.range)} | asdict(found)
        for side, values in sides.items():
            summary[judge.name][side] = {"mean": float(values.mean())}
            if tuple(judge.range) == (0.0, 1.0):
                summary[judge.name][side]["share"] = float((values > 0.5).mean())
    varying = {key for key in SAMPLER_KEYS if any(left.settings[key] != pairs[0][0].settings[key] for left, _ in pairs)}
    return {
        "pairs": len(pairs),
        "prompts": len(set(prompts)),
        "settings": {key: "varies" if key in varying else pairs[0][0].settings[key] for key in SAMPLER_KEYS},
        "generators": {
            "base": sorted({left.generator for left, _ in pairs}),
            "aligned": sorted({right.generator for _, right in pairs}),
        },
        "interval": {"method": "percentile bootstrap over prompts", "level": LEVEL, "resamples": resamples, "seed": seed},
        "judges": summary,
        "rows": [
            {
                "prompt": left.prompt,
                "seed": left.seed,
                "base": left.file_name,
                "aligned": right.file_name,
                "scores": {
                    name: {side: float(values[index]) for side, values in both.items()} for name, both in scores.items()
                },
            }
            for index, (left, right) in enumerate(pairs)
        ],
    }


def _scores(judge: Judge, pictures: Sequence[Generated], batch_size: int, progress: bool) -> NDArray[np.float64]:
    from tqdm import tqdm

    out: list[float] = []
    for start in tqdm(range(0, len(pictures), batch_size), desc=f"judge {judge.name}", disable=not progress, leave=False):
        batch = pictures[start : start + batch_size]
        images = []
        for picture in batch:
            try:
                with Image.open(picture.path) as image:
                    images.append(image.copy())
            except OSError as error:
                raise DataError(f"{picture.path} is not a readable picture ({error}); generate it again.") from error
        values = judge.score(images, [picture.prompt for picture in batch]).double().flatten().tolist()
        if len(values) != len(batch):
            raise RunError(
                f"judge {judge.name!r} returned {len(values)} scores for {len(batch)} pictures; it must give one each."
            )
        out.extend(values)
    scores = np.array(out)
    if not np.isfinite(scores).all():
        place = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise RunError(f"judge {judge.name!r} returned {scores[place]} for {pictures[place].path}; look at that picture.")
    return scores
