"""Filling the cache: decode, check and encode what comparisons need, and name the rows that cannot be used."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from flowalign.data.attached import attached_to
from flowalign.data.batch import Conditioning
from flowalign.data.cache import LatentCache
from flowalign.data.cached import Cached
from flowalign.data.forecast import Forecast
from flowalign.data.images import check_resolution, decode, fit, geometry
from flowalign.data.readers import BadRow, check_on_bad_row
from flowalign.data.records import Comparison, key63
from flowalign.data.weights import in_order, scores_in_order, wording
from flowalign.errors import DataError, NonFiniteError


class Encoder(Protocol):
    """The part of a Family that filling needs."""

    multiple: int

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels `[B, 3, H, W]` in [0, 1] -> (mean, std), each `[B, C, h, w]`."""

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts -> conditioning `[B, ...]`, padded to a length that does not depend on the other prompts."""


class Fitted(NamedTuple):
    """A picture ready to be encoded."""

    pixels: np.ndarray
    """uint8 `[3, H, W]`"""
    geometry: tuple[int, ...]
    """see `images.geometry`"""
    attached: Mapping[str, Tensor]
    """see `Attached.tensors`"""


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
    ranks: Ranks | None = None,
    progress: bool = True,
) -> Cached:
    """Encode what is not in the cache yet: every picture in every variant of `flips`, every prompt, and the empty prompt.

    Pictures are read and decoded by `workers` threads and encoded `batch_size` at a time, on whatever device the family
    uses; equal picture files and equal prompts are encoded once. on_bad_row: "skip" lists rows whose picture is missing,
    damaged or too large, or whose fields are wrong, in `bad`; "error" raises the first one's DataError. rewards: which scores
    count, and with what weight; None or empty takes the only one there is. attached: which of "mask" and "noise" are read and
    cached with the latents. objectives: whose weights are read; in_words: prompts with these in them are encoded too;
    by_picture: the pictures' own scores by them are read instead.

    Several processes share the work: each reads and encodes the pictures and prompts that are its own, by a hash of their
    names or by the row that holds them, and all get the same Cached. They must see one cache folder.

    An entry must not depend on what else was in its batch, or a resumed fill would differ from an uninterrupted one. So
    every batch has exactly `batch_size` rows (the last is padded by repeating its last row): kernels are chosen by shape
    and treat rows alike. Another batch_size may change the last bits of new entries; entries that exist are kept as they are.

    Raises DataError if no comparison is usable, if they differ in their number of pictures, or if the disk is too small,
    ConfigError if the resolution does not suit the family, NonFiniteError if an encoder gives NaN or infinity.
    """
    check_on_bad_row(on_bad_row)
    check_resolution(cache.resolution, family.multiple)
    ranks, flips, step = ranks or Alone(), tuple(dict.fromkeys(flips)) or (False,), 0
    forecast = Forecast(cache.folder, comparisons, show=progress)

    def foresee(kind: str, entry: Path) -> None:
        if ranks.index == 0:
            forecast.check(kind, entry, indices[step + 1 :], len(flips) if kind == "pictures" else 1)

    images = _Batches(batch_size, partial(_encode_images, cache, family), partial(foresee, "pictures"))
    texts = _Batches(batch_size, partial(_encode_prompts, cache, family), partial(foresee, "prompts"))
    prompts: dict[str, int] = {}
    judges: dict[str, int] = {}
    reasons: dict[int, str] = {}  # why this process cannot use a row of `indices`
    rows, digests = np.zeros(len(indices), ROW), np.zeros((len(indices), 0, 32), np.uint8)
    worth = np.zeros((2, len(indices), 0), np.float32)
    weights = np.full((len(indices), len(objectives)), np.nan, np.float32)
    shape: tuple[int, int] | None = None
    inside = True
    kept = _shape(cache, family) if attached else ()
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
        first = f"; the first reason: {bad[0].reason}" if bad else ""
        raise DataError(f"none of the {len(indices)} comparisons can be used{first}")
    rows = rows[good]
    texts, places = _in_order(prompts, np.concatenate([rows["prompt"], rows["told"]]))
    names, annotator = _in_order(judges, rows["annotator"])
    return Cached(
        indices=np.asarray(indices, dtype=np.int64)[good],
        pictures=ranks.sum(torch.from_numpy(np.resize(digests, (len(indices), shape[0], 32)))).numpy()[good],
        prompts=texts,
        prompt=places[: len(rows)],
        ids=rows["id"].copy(),
        preference=rows["preference"].copy(),
        weight=rows["weight"].copy(),
        scores=np.resize(worth[0], (len(indices), shape[0]))[good],
        grades=np.resize(worth[1], (len(indices), shape[0]))[good],
        annotators=names,
        annotator=annotator,
        objective_weights=weights[good],
        told=places[len(rows) :],
        num_chosen=shape[1],
        flips=flips,
        bad=bad,
        inside=inside,
        attached=tuple(name for name in sorted(attached) if name != "mask" or rows["masked"].any()),
    )


@torch.no_grad()
def _shape(cache: LatentCache, family: Encoder) -> tuple[int, ...]:
    """`(C, h, w)` of a picture's latents."""
    mean, _ = family.encode_images(torch.zeros(1, 3, cache.resolution, cache.resolution))
    return tuple(mean.shape[1:])


def _in_order(texts: Mapping[str, int], places: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """The texts that rows name, in the order of the rows, whatever rows this process could not use, and each row's place."""
    known = tuple(texts)
    used, first_seen, place = np.unique(places, return_index=True, return_inverse=True)
    order = np.argsort(first_seen)
    return tuple(known[each] for each in used[order]), np.argsort(order)[place]


def _score(comparison: Comparison, rewards: Mapping[str, float]) -> np.ndarray:
    """`[N]`, NaN where it cannot be said."""
    scores = comparison.scores or {}
    wanted = rewards or dict.fromkeys(scores, 1.0)
    if not wanted or not wanted.keys() <= scores.keys() or (not rewards and len(wanted) > 1):
        return np.full(len(comparison.images), np.nan)
    return np.sum([weight * np.asarray(scores[name]) for name, weight in wanted.items()], axis=0)


class _Batches:
    """Collects distinct entries and hands them on `size` at a time, the last ones padded to `size`."""

    def __init__(self, size: int, encode: Callable[[list[Path], list[Any]], None], written: Callable[[Path], None]) -> None:
        self._size, self._encode, self._written = size, encode, written
        self._pending: dict[Path, Any] = {}

    def add(self, path: Path, item: Any) -> None:
        if path in self._pending or path.exists():  # it may have been encoded since the reading thread looked
            return
        self._pending[path] = item
        if len(self._pending) == self._size:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            paths, items = list(self._pending), list(self._pending.values())
            self._encode(paths, items + items[-1:] * (self._size - len(items)))
            self._pending.clear()
            self._written(paths[0])


@torch.no_grad()
def _encode_images(cache: LatentCache, family: Encoder, paths: list[Path], pictures: list[Fitted]) -> None:
    mean, std = family.encode_images(torch.from_numpy(np.stack([picture.pixels for picture in pictures])).float() / 255)
    mean, std = mean.float().cpu(), std.float().cpu()
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise NonFiniteError(
            "the picture encoder gives NaN or infinity; run it in float32, or use a VAE made for half precision"
        )
    for row, path in enumerate(paths):
        cache.write_image(path, mean[row], std[row], pictures[row].geometry, pictures[row].attached)


@torch.no_grad()
def _encode_prompts(cache: LatentCache, family: Encoder, paths: list[Path], prompts: list[str]) -> None:
    tensors = {name: tensor.cpu() for name, tensor in family.encode_prompts(prompts).tensors.items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise NonFiniteError("the prompt encoder gives NaN or infinity; run it in float32 or bfloat16")
    for row, path in enumerate(paths):
        cache.write_prompt(path, {name: tensor[row] for name, tensor in tensors.items()})


def _prepared(
    prepare: Callable[[int], _Ready | DataError], indices: Iterable[int], workers: int
) -> Iterator[_Ready | DataError]:
    """What the threads made of each place, in order; a few rows ahead of the encoder and no more."""
    waiting: deque[Future[_Ready | DataError]] = deque()
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode") as pool:
        for place in map(int, indices):
            waiting.append(pool.submit(prepare, place))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


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
