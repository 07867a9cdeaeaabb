"""How many comparisons a configuration has, counted without opening a picture, and what their caches take on disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from flowalign.align.fill import stored_for
from flowalign.data.audit import audit
from flowalign.data.reach import Usable, some_of
from flowalign.data.readers import Comparisons, open_comparisons
from flowalign.data.texts import Texts, pictures_apart, read_texts
from flowalign.errors import DataError
from flowalign.plan.model import Outline
from flowalign.settings import Config
from flowalign.sources import prepares_all, reach_of, split

EXACTLY = 20_000
"""Sources of so many rows are read through; of larger ones only the rows are counted."""
ROWS_TRIED = 64


@dataclass(frozen=True)
class Counted:
    """What there is to train and to validate on; None where it is not known."""

    train: int | None
    held_out: int | None
    pictures: int | None
    """Distinct ones of the comparisons that are prepared, or at most so many."""
    prompts: int | None
    """The same."""
    exact: bool
    """False: every picture and prompt is taken to be another, ties and bad rows to be used."""
    per_comparison: int = 2
    num_chosen: int = 1
    note: str = ""
    """Why something is not known, or how it was estimated."""
    prepared: int | None = None
    """How many comparisons the run sees or holds out, where no others are prepared; None: all are, or it is not known."""

    def disk(self, outline: Outline, config: Config) -> dict[str, int | None]:
        """Bytes of the caches, without each entry's header (some 300) and what the file system rounds up to.

        With `data.flip` held-out pictures are counted mirrored too, although they are not.
        """
        bank = config.reference.bank
        latents, (_, *sides) = torch.Size(outline.latents), outline.latents
        picture = 2 * 4 * latents.numel() + 6 * 4  # mean and log-variance, and where it was cut
        picture += 4 * latents.numel() if config.switches.noise == "stored" else 0
        picture += 4 * torch.Size(sides).numel() if config.switches.mask == "given" else 0
        prompt = sum(tensor.nbytes for tensor in outline.family.outline_prompts(1).tensors.values())
        variants = 2 if config.data.flip else 1
        bank_bytes = None
        if self.train is not None and self.held_out is not None:
            draws = self.train * (bank or 0) + (self.held_out * config.train.validation_draws if bank else 0)
            stored = stored_for(outline.step.objective.needs, config)
            bank_bytes = stored.size(draws, (self.per_comparison, *outline.latents))
        return {
            "per_picture": picture * variants,
            "per_prompt": prompt,
            "latents": None if self.pictures is None else self.pictures * variants * picture,
            "prompts": None if self.prompts is None else (self.prompts + 1) * prompt,  # and the empty one
            "bank": bank_bytes,
        }


def count(config: Config, comparisons: int | None = None, processes: int = 1) -> Counted:
    """Count the configuration's sources, or take `comparisons` for the number of rows of `data.train`.

    The more `processes` train, the more comparisons the run sees.

    A source that is not on this disk, or that cannot be opened, is not counted; the note says why.
    """
    data, known = config.data, comparisons
    per_comparison, num_chosen, note = 2, 1, ""
    source: Comparisons | None = None
    try:
        source = _open(config, data.train, data.limit)
        per_comparison, num_chosen = _kind(source)
    except DataError as error:
        note = str(error)
    if known is not None:
        known, source, note = min(known, data.limit or known), None, "the number of comparisons is the one given"
    elif source is not None:
        known = len(source)
    if known is None:
        return Counted(None, None, None, None, False, note=f"{note}; give their number with --comparisons")
    validation = None
    if data.validation is not None:
        try:
            validation = _open(config, data.validation, None)
        except DataError as error:
            return Counted(
                known, None, None, None, False, per_comparison, num_chosen, "; ".join(filter(None, [note, str(error)]))
            )
    beside = np.arange(0) if validation is None else some_of(len(validation), data.validation_limit, config.train.seed)
    total = known + len(beside)
    partly = source is not None and not prepares_all(config) and pictures_apart(source)
    if source is not None and total <= EXACTLY:
        counted = replace(_through(config, source, validation, beside, per_comparison, num_chosen), note=note)
        texts = read_texts(source, config.train.seed) if partly else None
        return counted if texts is None else _seen(config, texts, validation, beside, counted, processes)
    held = len(beside) if validation is not None else min(round(data.held_out * known), data.validation_limit or known)
    train = known if validation is not None else known - held
    said = f"only rows are counted, as there are more than {EXACTLY:,}" if source is not None else note
    reach = reach_of(config, processes)
    prepared = held + min(train, reach.positions + reach.first + reach.prompts) if partly else total
    lazy = prepared if prepared < total else None
    return Counted(train, held, prepared * per_comparison, prepared, False, per_comparison, num_chosen, said, lazy)


def _through(
    config: Config, source: Comparisons, validation: Comparisons | None, beside: np.ndarray, pictures: int, chosen: int
) -> Counted:
    """Every row read, no picture opened."""
    found = [audit(source)] if validation is None else [audit(source), audit(validation, beside)]
    used = [each["comparisons"] - (each["ties"] if config.data.tie_policy == "drop" else 0) for each in found]
    if validation is None:
        share = len(split(config.data, source, config.train.seed)[2]) / len(source)
        held = round(share * used[0])
        train = used[0] - held
    else:
        train, held = used
    distinct = (sum(each[name] for each in found) for name in ("pictures", "prompts"))
    return Counted(train, held, *distinct, True, pictures, chosen)


def _seen(
    config: Config, texts: Texts, validation: Comparisons | None, beside: np.ndarray, counted: Counted, processes: int
) -> Counted:
    """What of it the run prepares, if no picture is broken."""
    places, held = texts.split(config.data.held_out if validation is None else 0.0, config.data.validation_limit)
    if config.data.tie_policy == "drop":
        places, held = (each[~texts.ties[each]] for each in (places, held))
    usable = Usable.of(texts, places)
    reached = usable.reached(config.train.seed, reach_of(config, processes), np.zeros(len(usable), bool))
    found = texts.count(np.concatenate([usable.rows[reached], held]))
    others = {name: 0 if validation is None else audit(validation, beside)[name] for name in found}
    prepared = int(reached.sum()) + (counted.held_out or 0)
    pictures, prompts = (found[name] + others[name] for name in ("pictures", "prompts"))
    return replace(counted, pictures=pictures, prompts=prompts, prepared=None if reached.all() else prepared)


def _open(config: Config, source: str, limit: int | None) -> Comparisons:
    """Raises DataError for what is not on this disk, without fetching it."""
    data = config.data
    if not Path(source).exists() and (data.format in ("auto", "datasets") or "://" in source):
        raise DataError(f"{source!r} is not on this disk, and plan fetches nothing")
    return open_comparisons(source, format=data.format, columns=data.columns, split=data.split, order=data.order, limit=limit)


def _kind(source: Comparisons) -> tuple[int, int]:
    """N pictures of which k chosen, of the first row that can be read."""
    for place in range(min(ROWS_TRIED, len(source))):
        try:
            comparison = source[place]
        except DataError:
            continue
        return len(comparison.images), comparison.num_chosen
    raise DataError(f"none of the first {min(ROWS_TRIED, len(source))} rows can be read; flowalign align names what is wrong")
