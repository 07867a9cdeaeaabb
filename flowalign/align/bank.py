"""What the reference says at fixed draws of every comparison, computed once and read in later epochs, runs and sweeps.

A frozen reference says the same for the same picture, time and noise. Where draws are repeated it need not run again: with K
draws and E epochs it runs K times per comparison instead of E times. With E ≤ K nothing is saved.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from flowalign.data.batch import Batch
from flowalign.data.forecast import amount
from flowalign.errors import ConfigError, NonFiniteError
from flowalign.files import atomic

Reference = Callable[[Batch], Mapping[str, Tensor]]
"""A batch -> the reference's `errors` `[B, N]`, and `predictions` and `noise` `[B, N, C, h, w]`, at least those wanted."""


@dataclass(frozen=True)
class ReferenceBank:
    """Errors, and predictions where an objective needs them, of n comparisons with K draws each, on the CPU."""

    errors: Tensor
    """`[n·K, N]` float32; row place·K + draw."""
    predictions: tuple[Tensor, ...] = ()
    """Per draw `[n, N, C, h, w]`, mapped from its file and read as rows are asked for."""
    noise: tuple[Tensor, ...] = ()
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


def _rows(draws: tuple[Tensor, ...], batch: Batch) -> Tensor:
    places = [divmod(position, len(draws)) for position in batch.positions]
    return torch.stack([draws[draw][place] for place, draw in places])


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


def fill_bank(
    folder: Path,
    batches: Callable[[int], Iterator[Batch]],
    reference: Reference,
    *,
    count: int,
    draws: int,
    stored: Stored = Stored(),
    progress: bool = True,
) -> ReferenceBank:
    """Read the bank in `folder`, computing what is missing: one file per draw, so a killed call goes on where it was.

    `batches(draw)` yields every one of the `count` comparisons at that draw, in the shapes trained on: kernels are chosen by
    shape, and their last bits with them. The folder's name must say what the reference's answers depend on; files that are
    damaged, or lack predictions that are wanted, are computed again, and predictions that are not wanted are not read.
    Raises NonFiniteError, and ConfigError where the disk cannot hold the bank.
    """
    found: list[dict[str, Tensor]] = []
    with tqdm(total=count * draws, desc="reference bank", unit="pair", disable=not progress) as bar:
        for draw in range(draws):
            path = folder / f"draw-{draw:05d}.safetensors"
            rows = _read(path, count, stored)
            if rows is None:
                stream = batches(draw)
                first = next(stream)
                _announce(folder, stored.size(count * (draws - draw), tuple(first.mean.shape[1:])), bar)
                with atomic(path) as temporary:
                    save_file(_compute(first, stream, reference, count, draws, stored, bar), temporary)
                rows = load_file(path)  # mapped, so that not all predictions need to fit into memory
            else:
                bar.update(count)
            found.append(rows)
    errors = torch.stack([rows["errors"] for rows in found], dim=1).flatten(0, 1)
    large = {name: tuple(rows[name] for rows in found) for name in stored.large}
    return ReferenceBank(errors, **large)


def _announce(folder: Path, size: int, bar: tqdm) -> None:
    """Say how much disk will be taken, before it is. Raises ConfigError where there is less."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ConfigError(
            f"the reference bank needs {amount(size)} in {folder.parent}, where {amount(free)} are free; set data.cache to a "
            "folder on a larger disk, or a smaller reference.bank."
        )
    bar.set_postfix_str(f"{amount(size)} to {folder.name}")


def _compute(
    first: Batch, others: Iterator[Batch], reference: Reference, count: int, draws: int, stored: Stored, bar: tqdm
) -> dict[str, Tensor]:
    pictures, *shape = first.mean.shape[1:]
    rows = {"errors": torch.full((count, pictures), torch.nan)}
    for name, precision in stored.large.items():
        rows[name] = torch.full((count, pictures, *shape), torch.nan, dtype=precision)
    for batch in chain([first], others):
        places = torch.tensor(batch.positions) // draws
        answer = reference(batch)
        for name, values in rows.items():
            values[places] = answer[name].to("cpu", values.dtype)
        bar.update(min(len(batch), bar.total - bar.n))
    if not all(values.isfinite().all() for values in rows.values()):
        raise NonFiniteError(
            "the reference's errors hold NaN or infinity; check that the checkpoint is whole, or train with "
            "train.precision=fp32."
        )
    return rows


def _read(path: Path, count: int, stored: Stored) -> dict[str, Tensor] | None:
    """Rows of an intact file that holds all that is wanted."""
    try:
        rows = load_file(path)
    except (OSError, SafetensorError):
        return None
    whole = all(name in rows and len(rows[name]) == count for name in ("errors", *stored.large))
    return rows if whole and bool(rows["errors"].isfinite().all()) else None
