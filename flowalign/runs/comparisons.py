"""Verbs that look at comparisons."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from flowalign.data.readers import open_comparisons
from flowalign.data.writer import check_not_source, row_of, write_comparisons
from flowalign.errors import ConfigError, DataError, allowed
from flowalign.evaluate.audit import Audit
from flowalign.evaluate.audit import audit as ask
from flowalign.files import check_file, check_folder, write_text
from flowalign.report.audit import write_audit_page
from flowalign.scoring.table import read_table

DROPS = ("rows", "pictures", "same_picture", "repeated", "duplicates", "prompt_leakage", "picture_leakage", "unsafe")
"""Checks that suggest rows to leave out."""


def audit(
    source: str,
    *,
    table: Path | None = None,
    against: str | None = None,
    out: Path = Path("runs/audit"),
    write_filtered: Path | None = None,
    drop: Collection[str] = DROPS,
    unsafe_reward: str | None = None,
    unsafe_above: float = 0.5,
    format: str = "auto",
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    workers: int = 2,
    progress: bool = True,
) -> dict[str, Any]:
    """Ask a set of comparisons what is wrong with it; `out` gets `audit.json`, `suggested_drop.jsonl` and `audit.html`.

    table: scores of its pictures, as `score` writes them. against: another split, for leakage. write_filtered: a .jsonl
    file for the comparisons without those that the checks named in `drop` suggest to leave out. unsafe_reward, unsafe_above:
    see `evaluate.audit.audit`. format, split, columns: see `data.readers.open_comparisons`. limit: the first so many. workers:
    threads that decode. Raises UserError for what cannot be opened, named or written.
    """
    for name in drop:
        if name not in DROPS:
            raise ConfigError(f"the check {name!r} suggests no rows to leave out; {allowed(name, DROPS)}.")
    if write_filtered is not None and write_filtered.suffix != ".jsonl":
        raise ConfigError(f"the filtered comparisons are JSON lines and {write_filtered} does not end with .jsonl; rename it.")
    if write_filtered is not None:
        check_file(write_filtered, "write-filtered")
        check_not_source(write_filtered, source, table, against, flag="--write-filtered")
    check_folder(out)
    comparisons = open_comparisons(source, format=format, split=split, columns=columns)
    other = (
        None if against is None else (open_comparisons(against, format=format, split=split, columns=columns), _name(against))
    )
    found = ask(
        comparisons,
        _name(source),
        table=None if table is None else read_table(table),
        against=other,
        unsafe_reward=unsafe_reward,
        unsafe_above=unsafe_above,
        limit=limit,
        workers=workers,
        progress=progress,
    )
    about = found.about()
    write_text(out / "audit.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    where = {vote.place: vote.source for vote in found.survey.votes}
    lines = (
        {"row": place, "where": where.get(place), "checks": list(why), "reasons": list(why.values())}
        for place, why in found.drop.items()
    )
    write_text(out / "suggested_drop.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    page = write_audit_page(found, out / "audit.html")
    result = about | {"out": str(out), "page": str(page)}
    said = [_table(found), f"page: {page}"]
    if write_filtered is not None:
        gone = {place for place, why in found.drop.items() if not why.keys().isdisjoint(drop)}
        gone |= {row.row for row in found.survey.bad}  # what cannot be read cannot be written
        kept = [place for place in range(found.survey.rows) if place not in gone]
        if not kept:
            raise DataError(
                f"all {found.survey.rows} comparisons of {source} would be left out; choose fewer checks with --drop."
            )
        write_comparisons(write_filtered, (row_of(comparisons[place]) for place in kept))
        result |= {"filtered": str(write_filtered), "kept": len(kept)}
        said.append(f"{len(kept)} of {found.survey.rows} comparisons: {write_filtered}")
    return result | {"summary": "\n".join(said)}


def _name(source: str) -> str:
    return source.rstrip("/").rpartition("/")[2] or source


def _table(found: Audit) -> str:
    lines = [f"{check.verdict:5}{check.name:16} {check.says}" for check in found.checks]
    lines += [f"{'-':5}{name:16} not checked: needs {need}" for name, need in found.unasked.items()]
    drop = len(found.drop)
    lines.append(f"verdict: {found.verdict}; rows to leave out: {drop} of {found.survey.rows}")
    return "\n".join(lines)
