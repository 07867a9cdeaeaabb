"""The verb that makes scores mean something: fit a calibration, or apply one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from flowalign.data.readers import open_comparisons
from flowalign.data.writer import check_not_source
from flowalign.device import choose_device
from flowalign.errors import ConfigError
from flowalign.files import check_file
from flowalign.scoring.calibration import SCORES, Calibration, Measured, read_calibration
from flowalign.scoring.calibration import calibrate as fit
from flowalign.scoring.features import Seen
from flowalign.scoring.labelled import match
from flowalign.scoring.table import read_table

MEASURES = {"accuracy": "accuracy", "log_loss": "log-loss", "brier": "Brier", "ece": "ECE"}


def calibrate(
    table: Path,
    *,
    base: Path | None = None,
    pairs: str | None = None,
    method: str | None = None,
    fuse: bool = False,
    general: str | None = None,
    ties: str = "half",
    by: str | None = None,
    weights: Mapping[str, float] | None = None,
    fitted: Path | None = None,
    out: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Make a table's rewards comparable: fit a calibration, or take what was `fitted`, and write the table with new columns.

    base: a table of another generator's pictures of the same prompts, over which win rates are. pairs: labelled comparisons
    whose pictures are in the table. method, fuse, ties: see `scoring.calibration.calibrate`. general: fit a general preference
    model too, on "scores", or on what the tower of a reward sees, named as `score` takes it. by, weights: how rewards are
    combined, see `scoring.combine.combined`. out: a .json file for the calibration, or a .parquet
    file for the new table, with the calibration beside it; what is not named is NAME-calibrated beside the table. Raises
    UserError.
    """
    new, saved = _files(table, fitted, out)
    for file in (new, saved) if fitted is None else (new,):
        check_file(file)
        check_not_source(file, table, base, pairs, fitted)
    scores = read_table(table)
    labelled = None
    seen = None if general in (None, SCORES) else Seen(str(general), choose_device(device), progress=progress)
    if fitted is not None:
        if pairs is not None or fuse or method is not None or ties != "half" or general == SCORES:
            raise ConfigError(
                f"{fitted} is fitted already, and pairs, method, fuse, general scores and ties fit; leave them out."
            )
        found = read_calibration(fitted)
        if seen is not None and (found.general is None or found.general.source != seen.fingerprint):
            raise ConfigError(f"{fitted} holds no general preference model on the tower of {general}; calibrate again with it.")
    else:
        labelled = None if pairs is None else match(scores, open_comparisons(pairs))
        told = {} if seen is None else {"features": seen(scores)} if labelled is not None else {}
        source = general if seen is None else seen.fingerprint
        found = fit(scores, labelled, method=method, fuse=fuse, general=source, ties=ties, seed=seed, **told)
    done = found.apply(scores, base=None if base is None else read_table(base), by=by, weights=weights, features=seen)
    if fitted is None:
        found.write(saved)  # first: where it cannot be written, no table seems done
    done.write(new)
    one = done.numbers("combined")
    alone = int(np.isnan(one).sum())
    lines = [] if labelled is None else [f"{len(labelled)} of {labelled.given} labelled pairs have both pictures in the table"]
    lines += [] if fitted is not None else [*page(found), f"calibration: {saved}"]
    lines += (
        []
        if not alone
        else [
            f"{alone} of {len(one)} pictures have no combined score: a reward gave none, or their prompt has no other picture"
        ]
    )
    return {
        "table": str(new),
        "calibration": str(saved),
        "pictures": len(one),
        "without_combined": alone,
        "labelled_pairs": None if labelled is None else labelled.given,
        "matched_pairs": None if labelled is None else len(labelled),
        **{
            key: value
            for key, value in asdict(found).items()
            if key in ("method", "pairs", "rewards", "fusion", "fused", "generalised")
        },
        "summary": "\n".join([*lines, f"table: {new}"]),
    }


def _files(table: Path, fitted: Path | None, out: Path | None) -> tuple[Path, Path]:
    """(new table, calibration)"""
    new = table.with_name(f"{table.stem}-calibrated.parquet")
    if out is None:
        return new, fitted or new.with_suffix(".json")
    if out.suffix == ".parquet":
        return out, fitted or out.with_suffix(".json")
    if out.suffix != ".json" or fitted is not None:
        what = (
            "the new table, NAME.parquet"
            if fitted is not None
            else "the calibration, NAME.json, or the new table, NAME.parquet"
        )
        raise ConfigError(f"out is {out}; give {what}.")
    return new, out


def page(found: Calibration) -> list[str]:
    """What was fitted and how good it is, for people."""
    lines = []
    for name, each in found.rewards.items():
        if each.ties is not None:
            lines.append(f"{name}: {each.ties.kind}, temperature {_inverse(each.ties.slope)}, width {each.ties.width:.4g}")
        elif each.link.kind == "isotonic":
            lines.append(f"{name}: isotonic, {len(each.link.knots)} knots")
        else:
            offset = f", offset {each.link.offset:+.4g}" if each.link.kind == "platt" else ""
            lines.append(f"{name}: temperature {_inverse(each.link.slope)}{offset}")
        slope = each.link.slope if each.ties is None else each.ties.slope
        if slope < 0:
            lines.append(f"  the labels contradict {name}: what it scores lower is preferred, and it was turned around")
    rows = []
    for name, each in found.rewards.items():
        if each.before:
            rows += [(name, "raw", each.before), ("", found.method if each.ties is None else each.ties.kind, each.after)]
    if found.fused:
        rows.append(("fused", "logistic", found.fused))
    if found.generalised:
        rows.append(("general", "cycles too", found.generalised))
    if rows:
        lines += ["", *_table(rows), "95 % intervals over prompts; what was fitted is measured on prompts that it did not see"]
    if found.fusion is not None:
        lines += ["", f"weights of standardised differences, penalty {found.fusion.penalty:g}:"]
        fusion = found.fusion
        for name, weight, low, high in zip(fusion.rewards, fusion.weights, fusion.low, fusion.high, strict=True):
            lines.append(f"  {name:{max(map(len, fusion.rewards))}}  {weight:+.3f} [{low:+.3f}, {high:+.3f}]")
    return lines


def _inverse(slope: float) -> str:
    return "infinite" if slope == 0 else f"{1 / slope:.4g}"


def _table(rows: list[tuple[str, str, Measured]]) -> list[str]:
    cells = [["reward", "scores", *MEASURES.values()]]
    for name, kind, measured in rows:
        cells.append([name, kind, *("{:.3f} [{:.3f}, {:.3f}]".format(*measured[measure]) for measure in MEASURES)])
    wide = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, wide, strict=True)).rstrip() for row in cells]
