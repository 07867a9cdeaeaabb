"""Verbs between scores and training: calibrate scores, select comparisons, measure what a model thinks of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from tqdm import tqdm

from flowalign import config as configuration
from flowalign import plugins
from flowalign.align.attention import forwards
from flowalign.align.step import PreferenceStep
from flowalign.data.pairs import fixed_draws
from flowalign.data.readers import Comparisons, open_comparisons
from flowalign.data.writer import row_of, write_comparisons
from flowalign.device import make_accelerator
from flowalign.errors import ConfigError, DataError, RunError, allowed
from flowalign.families.base import Family
from flowalign.families.loading import add_lora, find_lora
from flowalign.rng import Keyed
from flowalign.scoring.calibration import Calibration, match, read_calibration
from flowalign.scoring.calibration import calibrate as fit
from flowalign.scoring.combine import WAYS
from flowalign.scoring.comparisons import select as select_pairs
from flowalign.scoring.select import ORDERS, PICKERS, histogram_weights, order
from flowalign.scoring.table import is_table, read_table
from flowalign.setup import load_family
from flowalign.sources import load_data
from flowalign.train.ranks import Ranks

IMPLICIT = "implicit_margin"
"""Column of a comparison file: l_w − l_l of a model, without a reference."""
TIES = ("half", "rao_kupper", "davidson")


def calibrate(
    table: Path,
    *,
    base: Path | None = None,
    pairs: str | None = None,
    method: str = "temperature",
    fuse: bool = False,
    ties: str = "half",
    by: str = "mean",
    fitted: Path | None = None,
    out: Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Make the rewards of a table comparable: fit, or take what was `fitted`, and write the table with the columns it adds.

    base: scores of the base generator's pictures of the same prompts, against which win rates are then meant. pairs: labelled
    comparisons of pictures in the table. method, fuse, ties: see `scoring.calibration.calibrate`. by: how rewards are combined,
    see `scoring.combine.combined`. fitted: an earlier calibration. out: the new table, by default beside the old one as
    NAME-calibrated.parquet; the calibration goes beside it as .json. Raises UserError.
    """
    for name, value, choices in (("by", by, WAYS), ("ties", ties, TIES)):
        if value not in choices:
            raise ConfigError(f"{name} is {value!r}; {allowed(value, choices)}.")
    scores, against = read_table(table), None if base is None else read_table(base)
    given = None
    if fitted is not None:
        if pairs is not None or fuse:
            raise ConfigError(f"{fitted} is fitted already, so --pairs and --fuse have nothing to fit; leave them out.")
        found = read_calibration(fitted)
    else:
        labelled = None if pairs is None else match(scores, open_comparisons(pairs))
        given = None if labelled is None else labelled.given
        found = fit(scores, labelled, method=method, fuse=fuse, ties=ties, seed=seed)
    by = "fused" if found.fusion is not None and by == "mean" else by
    new = out or table.with_name(f"{table.stem}-calibrated.parquet")
    saved = new.with_suffix(".json")
    found.apply(scores, base=against, by=by).write(new)
    if fitted is None:
        found.write(saved)
    lines = [*_quality(found), *([] if given is None else [f"fitted on {found.pairs} of {given} labelled pairs"])]
    lines += [f"combined by {by}", f"table: {new}", *([] if fitted is not None else [f"calibration: {saved}"])]
    return {
        "table": str(new),
        "calibration": str(fitted or saved),
        "pairs": found.pairs,
        "given": given,
        "combined_by": by,
        "rewards": {name: {"before": each.before, "after": each.after} for name, each in found.rewards.items()},
        "fused": found.fused,
        "summary": "\n".join(lines),
    }


def _quality(found: Calibration) -> list[str]:
    """A table of what the labels say, for people."""
    wide = max(len("fusion"), *(len(name) for name in found.rewards))
    if not found.pairs:
        lines = [f"{name:{wide}}  τ {each.link.temperature:.4g}" for name, each in found.rewards.items()]
        return [*lines, "no labelled pairs: τ is the spread of a prompt's scores, which ranks but does not calibrate"]
    columns = ("accuracy", "log_loss", "brier", "ece")
    lines = [f"{'':{wide}}          " + "".join(f"{name:>24}" for name in columns)]
    rows = [(name, when, getattr(each, when)) for name, each in found.rewards.items() for when in ("before", "after")]
    rows += [("fusion", "after", found.fused)] if found.fused else []
    for name, when, quality in rows:
        cells = (f"{quality[key][0]:.3f} [{quality[key][1]:.3f}, {quality[key][2]:.3f}]" for key in columns)
        lines.append(f"{name:{wide}}  {when:6}  " + "".join(f"{cell:>24}" for cell in cells))
    if found.fusion is not None:
        weights = zip(found.fusion.rewards, found.fusion.weights, found.fusion.low, found.fusion.high, strict=True)
        lines += [f"weight of {name:{wide}}  {w:+.3f} [{low:+.3f}, {high:+.3f}]" for name, w, low, high in weights]
    return lines


def select(
    source: Path,
    *,
    by: str,
    out: Path,
    settings: Mapping[str, Any] | None = None,
    most: int | None = None,
    ties: str = "drop",
    weights: str = "even",
    ratio: float = 0.4,
    potential_weight: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """From a calibrated table pairs by one of `select.PICKERS`, from comparisons a share by one of `select.ORDERS`.

    most, ties: see `scoring.comparisons.select`. weights: "histogram" lets pairs with rare gaps of scores count more. ratio:
    the share of comparisons that are kept. potential_weight: w of the alignment potential. Raises UserError.
    """
    if is_table(source):
        rows = select_pairs(read_table(source), by, settings, most=most, ties=ties)
        of = "pairs"
    else:
        rows = _share(source, by, ratio, potential_weight, seed)
        of = "comparisons"
    if not rows:
        raise RunError(f"{by} selects nothing from {source}; use another way, or score more pictures of each prompt.")
    if weights == "histogram":
        gaps = np.array([row.get("margin") or 0.0 for row in rows])
        rows = [row | {"weight": float(weight)} for row, weight in zip(rows, histogram_weights(gaps), strict=True)]
    elif weights != "even":
        raise ConfigError(f"weights is {weights!r}; {allowed(weights, ('even', 'histogram'))}.")
    count, prompts = write_comparisons(out, rows), len({row["prompt"] for row in rows})
    return {"out": str(out), "count": count, "prompts": prompts, "summary": f"{count} {of} of {prompts} prompts in {out}"}


def _share(source: Path, by: str, ratio: float, weight: float, seed: int) -> list[dict[str, Any]]:
    """The first of a file's comparisons in an order, in the file's own order."""
    if by not in ORDERS:
        raise ConfigError(f"{by!r} selects nothing from comparisons; {allowed(by, ORDERS)}; {', '.join(PICKERS)} read a table.")
    if not 0 < ratio <= 1:
        raise ConfigError(f"ratio is {ratio}; it must be above 0 and at most 1.")
    comparisons = open_comparisons(source)
    rows = [row_of(comparisons[place]) for place in range(len(comparisons))]
    margins = [comparisons.rows.row(place).get(IMPLICIT) for place in range(len(comparisons))]
    if by in ("explicit", "potential") and any(row.get("margin") is None for row in rows):
        raise DataError(f"{source} has rows without a margin, which {by} reads; flowalign select writes it from a score table.")
    if by in ("implicit", "potential") and None in margins:
        raise DataError(f"{source} has rows without {IMPLICIT}, which {by} reads; run flowalign margins MODEL {source} first.")
    explicit = np.array([row.get("margin") or 0.0 for row in rows])
    implicit = None if None in margins else np.array(margins, dtype=np.float64)
    names = [f"{row['prompt']}\x1f{json.dumps(row['images'])}" for row in rows]
    kept = np.sort(order(by, explicit, implicit, names, weight=weight, seed=seed)[: max(1, round(ratio * len(rows)))])
    told = [row if margin is None else row | {IMPLICIT: margin} for row, margin in zip(rows, margins, strict=True)]
    return [told[place] for place in kept]


def margins(
    checkpoint: str,
    source: str,
    *,
    out: Path,
    draws: int = 32,
    batch_size: int = 16,
    seed: int = 0,
    device: str = "auto",
    precision: str = "fp32",
    cache: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the comparisons of `source` with what a model thinks of them: `implicit_margin`, mean l_w − l_l over fixed draws.

    l = −½e; the `draws` (t, noise) of a comparison are the same for its pictures and at every call, their times spread evenly.
    Nothing of a reference enters (2503.01864). checkpoint: a model or a run folder of ours. Raises UserError.
    """
    run = find_lora(checkpoint)
    model = {"checkpoint": checkpoint} if run is None else dict(checkpoint=run.base, revision=run.revision, variant=run.variant)
    tree = {
        "model": model,
        "data": {"train": source, "held_out": 0.0, **({} if cache is None else {"cache": str(cache)})},
        "objective": {"name": "simpo"},  # needs no reference
        "train": {"precision": precision, "device": device, "seed": seed, "batch_size": batch_size},
        "output": str(out.parent),
    }
    config = configuration.parse(tree)
    accelerator = make_accelerator(config, out.parent)
    family = load_family(config, accelerator.device)
    train, _, _ = load_data(config, family, out.parent, progress, Ranks(accelerator, config.train.timeout))
    if run is not None:
        add_lora(family.denoiser, run, family.component)  # type: ignore[attr-defined]  # families with pipelines have one
    step = panel(config, family, accelerator, train.cached.num_chosen)
    found = torch.zeros(len(train), dtype=torch.float64)
    with torch.inference_mode(), tqdm(total=draws * len(train), unit="pair", desc="margins", disable=not progress) as bar:
        for draw in range(draws):
            parts = []
            for batch in fixed_draws(train, batch_size, draws, draw):
                parts.append(step.terms(batch, Keyed(seed)).policy_margin.double())
                bar.update(len(batch))
            found += torch.cat(parts).cpu() / draws
    comparisons = open_comparisons(source)
    rows = _with_margins(comparisons, train.cached.indices, found.numpy())
    count = write_comparisons(out, rows)
    size = found.abs()
    return {
        "out": str(out),
        "count": count,
        "draws": draws,
        "mean": found.mean().item(),
        "mean_absolute": size.mean().item(),
        "summary": f"{count} comparisons with {IMPLICIT} in {out}: mean {found.mean():+.2e}, mean size {size.mean():.2e}",
    }


def panel(config: configuration.Config, family: Family, accelerator: Accelerator, num_chosen: int) -> PreferenceStep:
    """A step that measures a family's denoiser by itself, at times spread over the whole schedule."""
    objective = plugins.load("objectives", config.objective.name)
    step = PreferenceStep(
        family=family,
        policy=family.denoiser.requires_grad_(False).eval(),
        reference=None,
        objective=objective,
        knobs={},
        timesteps="stratified",
        device=accelerator.device,
        autocast=forwards(accelerator.autocast, accelerator.device, kernels=True),
        num_chosen=num_chosen,
    )
    return step.on_held_out()


def _with_margins(comparisons: Comparisons, places: NDArray[np.int64], values: NDArray[np.float64]) -> Sequence[dict[str, Any]]:
    return [row_of(comparisons[int(place)]) | {IMPLICIT: float(value)} for place, value in zip(places, values, strict=True)]
