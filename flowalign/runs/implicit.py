"""The verb that asks a model how it tells the pictures of comparisons apart."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from flowalign.align.margins import Panel, implicit_margins, panel_errors
from flowalign.data.cache import LatentCache
from flowalign.data.cached import Cached
from flowalign.data.fill import fill
from flowalign.data.pairs import Item, PairDataset
from flowalign.data.readers import open_comparisons
from flowalign.data.writer import check_not_source, others_of, row_of, write_comparisons
from flowalign.device import choose_device
from flowalign.errors import DataError
from flowalign.families.base import Family
from flowalign.families.loading import open_family
from flowalign.families.sampling import PRECISIONS
from flowalign.files import check_file
from flowalign.scoring.order import IMPLICIT
from flowalign.sources import cache_folder

VERSION = 1


def margins(
    checkpoint: str,
    source: str,
    *,
    out: Path,
    revision: str | None = None,
    variant: str | None = None,
    draws: int = 32,
    seed: int = 0,
    resolution: int | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    format: str = "auto",
    split: str = "train",
    precision: str = "fp32",
    device: str = "auto",
    cache: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the comparisons with a column `implicit_margin`, l_chosen − l_rejected of the model, see `align.margins`.

    checkpoint: what generates, of a revision and variant, or a run folder, whose LoRA is applied. draws: of the panel that all
    comparisons share. resolution: by default the checkpoint's own. What was found out is kept beside `out` until that is whole,
    so a run that was killed goes on; rows that cannot be used are left out and counted. Raises UserError.
    """
    check_file(out)
    check_not_source(out, source)
    comparisons = open_comparisons(source, format=format, split=split, limit=limit)
    for place in range(len(comparisons)):  # what cannot be named is refused before anything is computed
        try:
            comparison = comparisons[place]
        except DataError:
            continue
        row_of(comparison)
        if len(comparison.images) < 2:
            raise DataError(f"{source} holds pictures that were judged alone, which have no margin; give pairs or groups.")
        break
    how = {"revision": revision, "variant": variant}
    family = open_family(checkpoint, dtype=PRECISIONS[precision], device=choose_device(device), **how)
    side, panel = resolution or family.resolution, Panel(draws, seed)
    prints = {part: family.fingerprint(part) for part in ("denoiser", "images", "prompts")}
    store = LatentCache(cache_folder(cache), prints["images"], prints["prompts"], resolution=side, checkpoint=checkpoint)
    cached = fill(store, comparisons, range(len(comparisons)), family, progress=progress)
    family.release_encoders()
    about = {"version": VERSION, **prints, "resolution": side, "precision": precision, "draws": draws, "seed": seed}
    found = _measured(family, PairDataset(store, cached, progress=progress), panel, _Kept(out, about), batch_size, progress)
    rows = []
    for place, key in zip(cached.indices.tolist(), _keys(cached), strict=True):
        rows.append(row_of(comparisons[place]) | others_of(comparisons, place) | {IMPLICIT: found[key][0]})
    write_comparisons(out, rows)
    _Kept(out, about).path.unlink(missing_ok=True)
    values = [found[key] for key in _keys(cached)]
    size = statistics.median(abs(value) for value, _ in values)
    error = statistics.median(error for _, error in values)
    won = statistics.fmean(0.5 * (1 + np.sign(value)) for value, _ in values)
    lost = f"; {len(cached.bad)} rows could not be used, the first: {cached.bad[0].reason}" if cached.bad else ""
    return {
        "out": str(out),
        "count": len(rows),
        "bad_rows": len(cached.bad),
        "draws": draws,
        "median_margin": size,
        "median_error": error if np.isfinite(error) else None,
        "preferred": won,
        "summary": f"{len(rows)} comparisons over {draws} shared draws: median |margin| {size:.3g}, standard error of one "
        f"{error:.2g}, the chosen picture is denoised better in {won:.0%}{lost}\ncomparisons: {out}",
    }


def _keys(cached: Cached) -> list[str]:
    """What a comparison's margin depends on, beside the model: its pictures, in their order, and its prompt."""
    prompts = [cached.prompts[place].encode() for place in cached.prompt]
    pictures = [each.tobytes() for each in cached.pictures]
    head = f"{cached.num_chosen}\x1f".encode()
    return [hashlib.blake2b(head + a + b, digest_size=16).hexdigest() for a, b in zip(pictures, prompts, strict=True)]


class _Kept:
    """Margins by key that an earlier, unfinished run of the same model and panel left beside the file it was to write."""

    def __init__(self, out: Path, about: Mapping[str, Any]) -> None:
        self.path, self.about = out.with_name(f".{out.name}.part"), dict(about)

    def read(self) -> dict[str, tuple[float, float]]:
        """Begins the file anew where it is not of this model and panel; drops a line that was cut."""
        found: dict[str, tuple[float, float]] = {}
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        except (OSError, UnicodeDecodeError):
            lines = []
        if not lines or _json(lines[0]) != self.about:
            lines = [json.dumps(self.about) + "\n"]
        whole = [lines[0]]
        for line in lines[1:]:
            row = _json(line)
            if line.endswith("\n") and isinstance(row, list):
                found[row[0]] = (row[1], float("nan") if row[2] is None else row[2])
                whole.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(whole), encoding="utf-8")
        return found

    def add(self, rows: Mapping[str, tuple[float, float]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            for key, (value, error) in rows.items():
                file.write(json.dumps([key, value, None if np.isnan(error) else error]) + "\n")


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _measured(
    family: Family, dataset: PairDataset, panel: Panel, kept: _Kept, batch_size: int, progress: bool
) -> dict[str, tuple[float, float]]:
    """(margin, standard error) by key; equal comparisons are asked about once."""
    found, first = kept.read(), {}
    for place, key in enumerate(_keys(dataset.cached)):
        first.setdefault(key, place)
    missing = [key for key in first if key not in found]
    device = next(family.denoiser.parameters()).device
    with tqdm(total=len(first), initial=len(first) - len(missing), desc="margins", unit="pair", disable=not progress) as bar:
        for keys in _parts(missing, batch_size):
            full = keys + keys[-1:] * (batch_size - len(keys))  # what is computed for a row depends on its batch's shape
            batch = dataset.__getitems__([Item(first[key], 0, first[key], False, False) for key in full])
            errors = panel_errors(family, family.denoiser, batch, panel, device)[: len(keys)]
            values, spread = (each.tolist() for each in implicit_margins(errors, dataset.cached.num_chosen))
            rows = dict(zip(keys, zip(values, spread, strict=True), strict=True))
            kept.add(rows)
            found |= rows
            bar.update(len(keys))
    return found


def _parts(keys: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(keys), size):
        yield keys[start : start + size]
