"""What the reference says at fixed draws of every comparison, computed once and read in later epochs, runs and sweeps.

A frozen reference says the same for the same picture, time and noise. Where draws are repeated it need not run again: with K
draws and E epochs it runs K times per comparison instead of E times. With E ≤ K nothing is saved.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from flowalign.data.batch import Batch
from flowalign.data.fill import Alone, Ranks
from flowalign.data.forecast import amount
from flowalign.errors import ConfigError, DataError, NonFiniteError
from flowalign.files import atomic

Reference = Callable[[Batch], Mapping[str, Tensor]]
"""A batch -> the reference's `errors` `[B, N]`, and `predictions` and `noise` `[B, N, C, h, w]`, at least those wanted."""
Batches = Callable[[int, range], Iterator[Batch]]
"""(draw, places) -> the comparisons at these places, in order, at that draw, in the shapes trained on.

Places start where a batch does; the last one may be filled up with what is not asked for.
"""
PART = 128
"""Comparisons in a file, or one batch where that is more: what is in memory at once, and what a killed fill loses."""


@dataclass(frozen=True)
class ReferenceBank:
    """Errors, and predictions where an objective needs them, of n comparisons with K draws each, on the CPU."""

    errors: Tensor
    """`[n·K, N]` float32; row place·K + draw."""
    predictions: tuple[tuple[Tensor, ...], ...] = ()
    """Per draw and part `[≤ part, N, C, h, w]`, mapped from its file and read as rows are asked for."""
    noise: tuple[tuple[Tensor, ...], ...] = ()
    """The same of the noise that the reference takes each picture to."""

    def __call__(self, batch: Batch) -> Tensor:
        """The reference's errors `[B, N]` of a batch whose `positions` are place·K + draw."""
        return self.errors[torch.tensor(batch.positions)]

    def predicted(self, batch: Batch) -> Tensor:
        """The reference's predictions of that batch, `[B, N, C, h, w]`, as they were stored."""
        return _rows(self.predictions, batch)

    def inverted(self, batch: Batch) -> Tensor:
        """The noise of that batch, `[B, N, C, h, w]`."""
        return _rows(self.noise, batch)


def _rows(draws: tuple[tuple[Tensor, ...], ...], batch: Batch) -> Tensor:
    rows, part = [], len(draws[0][0])
    for position in batch.positions:
        place, draw = divmod(position, len(draws))
        rows.append(draws[draw][place // part][place % part])
    return torch.stack(rows)


@dataclass(frozen=True)
class Stored:
    """What is kept of the reference besides its errors."""

    precision: torch.dtype | None = None
    """Predictions in this precision; None keeps none. In the denoiser's own output precision nothing is rounded."""
    noise: bool = False
    """The noise that the reference takes pictures to, in float32: the errors are those at exactly this noise."""

    @property
    def large(self) -> dict[str, torch.dtype]:
        """What is kept in the size of latents, and in which precision."""
        predictions = {} if self.precision is None else {"predictions": self.precision}
        return predictions | ({"noise": torch.float32} if self.noise else {})

    def size(self, rows: int, latents: tuple[int, ...]) -> int:
        """Bytes on disk of so many comparisons (times draws) with latents `[N, C, h, w]`."""
        return rows * (4 * latents[0] + sum(precision.itemsize for precision in self.large.values()) * math.prod(latents))

    @property
    def all(self) -> dict[str, torch.dtype]:
        """All that is kept."""
        return {"errors": torch.float32} | self.large


@dataclass(frozen=True)
class _Part:
    """A file of a bank: whole batches of comparisons in a row at one draw."""

    path: Path
    draw: int
    places: range


def fill_bank(
    folder: Path,
    batches: Batches,
    reference: Reference,
    *,
    count: int,
    draws: int,
    batch_size: int,
    stored: Stored = Stored(),
    ranks: Ranks | None = None,
    progress: bool = True,
) -> ReferenceBank:
    """Read the bank of `count` comparisons at `draws` draws in `folder`, computing what is missing, in files of about `PART`.

    A killed call goes on where it was. Several processes share the parts that are missing, and meet after each, so that none
    waits for longer than a part takes. Parts are whole batches of `batch_size`, whoever computes them: kernels are chosen by
    shape, and their last bits with them. The folder's name must say what the reference's answers depend on; files that are
    damaged, or lack predictions that are wanted, are computed again, and predictions that are not wanted are not read.

    Raises NonFiniteError, ConfigError where the disk cannot hold the bank, DataError where another process's part is not there.
    """
    ranks, rows = ranks or Alone(), max(1, PART // batch_size) * batch_size
    parts = [
        _Part(folder / f"draw-{draw:05d}-{start // rows:06d}.safetensors", draw, range(start, min(start + rows, count)))
        for draw in range(draws)
        for start in range(0, count, rows)
    ]
    found = [_read(part, stored) for part in parts]
    lacking = ranks.gather([number for number, held in enumerate(found) if held is None])
    missing = [parts[number] for number in sorted({number for each in lacking for number in each})]
    left, total = sum(len(part.places) for part in missing), count * draws
    with tqdm(total=total, initial=total - left, desc="reference bank", unit="pair", disable=not progress) as bar:
        if missing:
            _announce(folder, missing[0], left, batches, stored, ranks, bar)
        for turn in range(0, len(missing), ranks.count):
            own = missing[turn : turn + ranks.count][ranks.index : ranks.index + 1]
            for part in own:
                with atomic(part.path) as temporary:
                    save_file(_compute(part, batches, reference, stored, bar), temporary)
            done = sum(len(part.places) for part in own)
            bar.update(sum(ranks.gather(done)) - done)
    whole = [_whole(part, stored) if held is None else held for part, held in zip(parts, found, strict=True)]
    by_draw = [whole[start : start + len(whole) // draws] for start in range(0, len(whole), len(whole) // draws)]
    errors = torch.stack([torch.cat([held["errors"] for held in draw]) for draw in by_draw], dim=1).flatten(0, 1)
    large = {name: tuple(tuple(held[name] for held in draw) for draw in by_draw) for name in stored.large}
    return ReferenceBank(errors, **large)


def _announce(folder: Path, part: _Part, rows: int, batches: Batches, stored: Stored, ranks: Ranks, bar: tqdm) -> None:
    """Say how much disk so many rows will take, before they do. Raises ConfigError, in every process, where there is less."""
    refused = None
    if ranks.index == 0:
        size = stored.size(rows, tuple(next(batches(part.draw, part.places[:1])).mean.shape[1:]))
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        bar.set_postfix_str(f"{amount(size)} to {folder.name}")
        if size > free:
            refused = (
                f"the reference bank needs {amount(size)} in {folder.parent}, where {amount(free)} are free; set data.cache to "
                "a folder on a larger disk, or a smaller reference.bank."
            )
    if refusal := ranks.gather(refused)[0]:
        raise ConfigError(refusal)


def _compute(part: _Part, batches: Batches, reference: Reference, stored: Stored, bar: tqdm) -> dict[str, Tensor]:
    rows: dict[str, Tensor] = {}
    done, count = 0, len(part.places)
    for batch in batches(part.draw, part.places):
        answer, more = reference(batch), min(len(batch), count - done)
        for name, precision in stored.all.items():
            if name not in rows:
                rows[name] = torch.empty(count, *answer[name].shape[1:], dtype=precision)
            rows[name][done : done + more] = answer[name][:more].to("cpu", precision)
        done += more
        bar.update(more)
    if not all(values.isfinite().all() for values in rows.values()):
        raise NonFiniteError(
            "the reference's errors hold NaN or infinity; check that the checkpoint is whole, or train with "
            "train.precision=fp32."
        )
    return rows


def _read(part: _Part, stored: Stored) -> dict[str, Tensor] | None:
    """Rows of an intact file that holds all that is wanted; what is large is mapped, so that it need not fit into memory."""
    try:
        with safe_open(part.path, framework="pt") as file:
            if not stored.all.keys() <= set(file.keys()):
                return None
            rows = {name: file.get_tensor(name) for name in stored.all}
    except (OSError, SafetensorError):
        return None
    rows["errors"] = rows["errors"].clone()  # or a file would stay mapped for them
    whole = all(len(values) == len(part.places) for values in rows.values())
    return rows if whole and bool(rows["errors"].isfinite().all()) else None


def _whole(part: _Part, stored: Stored) -> dict[str, Tensor]:
    rows = _read(part, stored)
    if rows is None:
        raise DataError(
            f"{str(part.path)!r} was written and cannot be read; all processes of a run must see one data.cache, so name a "
            "folder that all of them do and run again"
        )
    return rows
