"""Filling the cache: decode, check and encode what comparisons need, and name the rows that cannot be used."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from flowalign.data.attached import attached_to
from flowalign.data.cache import LatentCache
from flowalign.data.cached import Cached, numbered
from flowalign.data.encoding import Batches, Encoder, Fitted, encode_images, encode_prompts, latent_shape
from flowalign.data.forecast import Count, Forecast
from flowalign.data.images import check_resolution, decode, fit, geometry
from flowalign.data.readers import BadRow, check_on_bad_row
from flowalign.data.records import Comparison, key63
from flowalign.data.weights import in_order, scores_in_order, wording
from flowalign.errors import DataError, NoneUsableError


class Ranks(Protocol):
    """The processes that fill a cache together, seen from one of them; see `train.ranks.Ranks`."""

    count: int
    index: int

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, what JSON can hold; waits for all."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes of a tensor on the CPU."""


class Alone:
    """One process."""

    count, index = 1, 0

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


@dataclass(frozen=True)
class _Ready:
    """A comparison, the sha256 of those of its pictures that are this process's, and the pixels that are not cached yet."""

    comparison: Comparison
    digests: tuple[bytes, ...]
    misses: dict[Path, Fitted]
    weights: tuple[float, ...] | None = None
    """Of the run's objectives."""


BLOCK = 64
"""Rows in a row whose pictures one process reads, where they lie in the rows themselves: neighbours lie together."""
TOGETHER = 4
"""Rows that a thread prepares before it takes the next."""
ELSEWHERE = bytes(32)
"""Stands for the sha256 of a picture that another process reads."""
ROW = [("id", "i8"), ("prompt", "i8"), ("told", "i8"), ("preference", "f4"), ("weight", "f4"), ("masked", "?")]
ROW += [("annotator", "i8")]


def fill(
    cache: LatentCache,
    comparisons: Sequence[Comparison],
    indices: Sequence[int] | np.ndarray,
    family: Encoder,
    *,
    flips: Sequence[bool] = (False,),
    batch_size: int = 8,
    on_bad_row: str = "skip",
    workers: int = 4,
    rewards: Mapping[str, float] | None = None,
    attached: Collection[str] = (),
    objectives: Sequence[str] = (),
    in_words: bool = False,
    by_picture: bool = False,
    count: Count | None = None,
    ranks: Ranks | None = None,
    progress: bool = True,
) -> Cached:
    """Encode what is not in the cache yet: every picture in every variant of `flips`, every prompt, and the empty prompt.

    Pictures are read and decoded by `workers` threads and encoded `batch_size` at a time, on whatever device the family
    uses; equal picture files and equal prompts are encoded once. on_bad_row: "skip" lists rows whose picture is missing,
    damaged or too large, or whose fields are wrong, in `bad`; "error" raises the first one's DataError. rewards: which scores
    count, and with what weight; None or empty takes the only one there is. attached: which of "mask" and "noise" are read and
    cached with the latents. objectives: whose weights are read; in_words: prompts with these in them are encoded too;
    by_picture: the pictures' own scores by them are read instead. count: what rows name, where that is known, for the forecast.

    Several processes share the work: each reads and encodes the pictures and prompts that are its own, by a hash of their
    names or by the row that holds them, and all get the same Cached. They must see one cache folder.

    An entry must not depend on what else was in its batch, or a resumed fill would differ from an uninterrupted one. So
    every batch has exactly `batch_size` rows (the last is padded by repeating its last row): kernels are chosen by shape
    and treat rows alike. Another batch_size may change the last bits of new entries; entries that exist are kept as they are.

    Raises NoneUsableError if no comparison is, DataError if they differ in their number of pictures, or if the disk is too
    small, ConfigError if the resolution does not suit the family, NonFiniteError if an encoder gives NaN or infinity.
    """
    check_on_bad_row(on_bad_row)
    check_resolution(cache.resolution, family.multiple)
    ranks, flips, step = ranks or Alone(), tuple(dict.fromkeys(flips)) or (False,), 0
    forecast = Forecast(cache.folder, comparisons, show=progress, count=count)

    def foresee(kind: str, entry: Path) -> None:
        if ranks.index == 0:
            forecast.check(kind, entry, np.asarray(indices[step + 1 :], np.int64), len(flips) if kind == "pictures" else 1)

    images = Batches(batch_size, partial(encode_images, cache, family), partial(foresee, "pictures"))
    texts = Batches(batch_size, partial(encode_prompts, cache, family), partial(foresee, "prompts"))
    prompts: dict[str, int] = {}
    judges: dict[str, int] = {}
    reasons: dict[int, str] = {}  # why this process cannot use a row of `indices`
    rows, digests = np.zeros(len(indices), ROW), np.zeros((len(indices), 0, 32), np.uint8)
    worth = np.zeros((2, len(indices), 0), np.float32)
    weights = np.full((len(indices), len(objectives)), np.nan, np.float32)
    shape: tuple[int, int] | None = None
    inside = True
    kept = latent_shape(cache, family) if attached else ()
    prepare = partial(_prepare, cache, comparisons, flips, ranks, kept, attached, objectives, by_picture)

    if ranks.index == 0 and not (path := cache.prompt_path("")).exists():
        texts.add(path, "")
    with tqdm(total=len(indices), desc="caching latents and prompts", unit="row", disable=not progress) as bar:
        for step, ready in enumerate(_prepared(prepare, indices, workers)):
            bar.update()
            if isinstance(ready, DataError):
                if on_bad_row == "error":
                    raise ready
                reasons[step] = str(ready)
                continue
            comparison = ready.comparison
            inside = inside and comparison.in_row
            if shape is None:
                shape = len(comparison.images), comparison.num_chosen
                digests = np.zeros((len(indices), shape[0], 32), np.uint8)
                worth = np.full((2, len(indices), shape[0]), np.nan, np.float32)
                if by_picture:
                    weights = np.full((len(indices), shape[0] * len(objectives)), np.nan, np.float32)
            if (len(comparison.images), comparison.num_chosen) != shape:
                here = f"{comparison.source or step}: {len(comparison.images)} pictures of which {comparison.num_chosen} chosen"
                raise DataError(f"{here}, but earlier rows have {shape[0]} and {shape[1]}; train on one kind at a time")
            for path, fitted in ready.misses.items():
                images.add(path, fitted)
            said = [comparison.prompt]
            if ready.weights is not None:
                weights[step] = ready.weights
                said += [wording(comparison.prompt, objectives, ready.weights)] if in_words else []
            for text in said:
                if text not in prompts and key63(text) % ranks.count == ranks.index:
                    texts.add(cache.prompt_path(text), text)
                prompts.setdefault(text, len(prompts))
            masked, judge = comparison.mask is not None, judges.setdefault(comparison.annotator or "", len(judges))
            places = prompts[said[0]], prompts[said[-1]]
            rows[step] = comparison.id, *places, comparison.preference, comparison.weight, masked, judge
            worth[:, step] = _score(comparison, rewards or {}), comparison.grades or np.full(shape[0], np.nan)
            digests[step] = np.frombuffer(b"".join(ready.digests), np.uint8).reshape(-1, 32)
        images.flush()
        texts.flush()
    everyone = ranks.gather([[*reasons.items()], shape])
    found = {step: reason for each, _ in everyone for step, reason in each}
    shape = next((tuple(each) for _, each in everyone if each is not None), None)
    bad = tuple(BadRow(int(indices[step]), found[step]) for step in sorted(found))
    good = np.setdiff1d(np.arange(len(indices)), [*found])
    if shape is None or not len(good):
        raise NoneUsableError(bad)
    rows = rows[good]
    return Cached(
        indices=np.asarray(indices, dtype=np.int64)[good],
        pictures=ranks.sum(torch.from_numpy(np.resize(digests, (len(indices), shape[0], 32)))).numpy()[good],
        **numbered(list(prompts), rows["prompt"], rows["told"], list(judges), rows["annotator"]),
        ids=rows["id"].copy(),
        preference=rows["preference"].copy(),
        weight=rows["weight"].copy(),
        scores=np.resize(worth[0], (len(indices), shape[0]))[good],
        grades=np.resize(worth[1], (len(indices), shape[0]))[good],
        objective_weights=weights[good],
        num_chosen=shape[1],
        flips=flips,
        bad=bad,
        inside=inside,
        attached=tuple(name for name in sorted(attached) if name != "mask" or rows["masked"].any()),
    )


def _score(comparison: Comparison, rewards: Mapping[str, float]) -> np.ndarray:
    """`[N]`, NaN where it cannot be said."""
    scores = comparison.scores or {}
    wanted = rewards or dict.fromkeys(scores, 1.0)
    if not wanted or not wanted.keys() <= scores.keys() or (not rewards and len(wanted) > 1):
        return np.full(len(comparison.images), np.nan)
    return np.sum([weight * np.asarray(scores[name]) for name, weight in wanted.items()], axis=0)


def _prepared(
    prepare: Callable[[int], _Ready | DataError], indices: Sequence[int] | np.ndarray, workers: int
) -> Iterator[_Ready | DataError]:
    """What the threads made of each place, in order; a few rows ahead of the encoder and no more.

    Handing a thread something takes as long as reading a small picture, so they get a few rows at a time.
    """
    waiting: deque[Future[list[_Ready | DataError]]] = deque()

    def several(places: Sequence[int]) -> list[_Ready | DataError]:
        return [prepare(place) for place in places]

    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode") as pool:
        for start in range(0, len(indices), TOGETHER):
            waiting.append(pool.submit(several, [int(each) for each in indices[start : start + TOGETHER]]))
            if len(waiting) > workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _prepare(
    cache: LatentCache,
    comparisons: Sequence[Comparison],
    flips: tuple[bool, ...],
    ranks: Ranks,
    shape: tuple[int, ...],
    wanted: Collection[str],
    objectives: Sequence[str],
    by_picture: bool,
    place: int,
) -> _Ready | DataError:
    try:
        comparison = comparisons[place]
        told = comparison.objective_weights
        weights = None if told is None or not objectives else in_order(told, objectives)
        if by_picture:
            weights = scores_in_order(comparison.scores, objectives)
    except DataError as error:
        return error
    digests: list[bytes] = []
    misses: dict[Path, Fitted] = {}
    for number, image in enumerate(comparison.images):
        if (place // BLOCK if image.in_row else key63(image.name)) % ranks.count != ranks.index:
            digests.append(ELSEWHERE)
            continue
        try:
            data = image.read()
            attached = attached_to(comparison, number, wanted)
            digest = attached.digest(hashlib.sha256(data).digest())
            paths = {cache.image_path(digest, flip): flip for flip in flips}
            missing = {path: flip for path, flip in paths.items() if path not in misses and not path.exists()}
            if missing:
                picture = decode(data)
                cut = geometry(picture, cache.resolution)
                for path, flip in missing.items():
                    beside = attached.tensors(picture, cache.resolution, shape, flip=flip)
                    misses[path] = Fitted(fit(picture, cache.resolution, flip=flip), cut, beside)
        except DataError as error:
            return DataError(f"{comparison.source or place}, picture {image.name}: {error}")
        digests.append(digest)
    return _Ready(comparison, tuple(digests), misses, weights)
