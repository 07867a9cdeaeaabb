"""Contact sheets, inlined: base and aligned side by side, and one row a step for what a run drew along the way."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from flowalign.errors import DataError
from flowalign.evaluate.compare import Generated, read_generation
from flowalign.report.document import shortened

SMALL = 160  # pixels: up to this side a picture is inlined as it is, losslessly
THUMBNAIL = 512
FIRST = 12  # pairs shown at once; the others unfold
BUDGET = 5_500_000  # characters of inlined pairs: a page of large pictures stays one that can be mailed
STRIP = (8, 12)  # most steps and prompts in the strip
CELL, CELLS = 144, 4_000_000  # pixels of a picture side by side with others, and characters of all of them

Scores = Mapping[tuple[str, int], Mapping[str, Mapping[str, float]]]
Samples = Sequence[tuple[int, Sequence[Generated]]]


def read_samples(run: Path) -> list[tuple[int, list[Generated]]]:
    """(step, pictures) of a run's `samples/step-*`, by step; [] without any.

    A step that drew other prompts, seeds or sampler settings than the first one, or was killed while drawing, is left
    out: it could not be compared. Raises DataError for a broken table of pictures.
    """
    found = []
    for table in sorted((run / "samples").glob("step-*/metadata.jsonl")):
        if table.stat().st_size:
            found.append((int(table.parent.name.removeprefix("step-")), read_generation(table.parent)))
    return [(step, pictures) for step, pictures in found if _drawn(pictures) == _drawn(found[0][1])]


def _drawn(pictures: Sequence[Generated]) -> list[tuple[object, ...]]:
    return [(*picture.key, *picture.settings.values()) for picture in pictures]


def data_uri(path: Path, side: int = THUMBNAIL) -> tuple[str, int, int]:
    """A picture as a WebP data URI, with its own width and height in pixels; ones above SMALL become thumbnails of `side`."""
    try:
        with Image.open(path) as source:
            picture = source.convert("RGBA" if source.has_transparency_data else "RGB")
    except OSError as error:
        raise DataError(f"{path} is not a readable picture ({error}); generate it again.") from error
    return inlined(picture, side), *picture.size


def inlined(picture: Image.Image, side: int = THUMBNAIL, small: int = SMALL) -> str:
    """A picture as a WebP data URI; without loss up to `small` pixels a side, larger ones become thumbnails of `side`."""
    out = io.BytesIO()
    if max(picture.size) <= small:
        picture.save(out, "WEBP", lossless=True)
    else:
        thumbnail = picture.copy()
        thumbnail.thumbnail((side, side), Image.Resampling.LANCZOS)
        thumbnail.save(out, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode('ascii')}"


def sheet(
    pairs: Sequence[tuple[Generated, Generated]], scores: Scores, names: tuple[str, str] = ("base", "aligned")
) -> tuple[str, int]:
    """The first pairs, as many as BUDGET allows and at least one, and how many these are.

    `names` stand under the pictures; `scores[prompt, seed][judge]` is {"base": …, "aligned": …} where they were judged.
    """
    cards: list[str] = []
    largest = spent = 0
    for pair in pairs:
        sides = []
        for name, picture in zip(names, pair, strict=True):
            uri, width, height = data_uri(picture.path)
            spent += len(uri)
            largest = max(largest, width, height)
            alt = escape(f"{name} model: {picture.caption}")
            image = f'<img src="{uri}" alt="{alt}" width="{width}" height="{height}">'
            sides.append(f'<div class="side">{image}<span>{escape(name)}</span></div>')
        if spent > BUDGET and cards:
            break
        prompt, seed = pair[0].prompt, pair[0].seed
        judged = "".join(_score(name, both) for name, both in scores.get((prompt, seed), {}).items())
        listed = f'<dl class="scores">{judged}</dl>' if judged else ""
        cards.append(
            f'<figure class="pair"><div class="sides">{"".join(sides)}</div><figcaption>'
            f'<span class="prompt">{escape(pair[1].caption)}</span> <span class="seed">seed {seed}</span>'
            f"{listed}</figcaption></figure>"
        )
    look = "small" if largest <= SMALL else "large"
    shown = f'<div class="sheet {look}">{"".join(cards[:FIRST])}</div>'
    if len(cards) > FIRST:
        rest = f'<div class="sheet {look}">{"".join(cards[FIRST:])}</div>'
        shown += f'<details class="more"><summary>{len(cards) - FIRST} more pairs</summary>{rest}</details>'
    return shown, len(cards)


def strip(samples: Samples) -> tuple[str, int, int]:
    """One row a step, one column a prompt; and how many steps and prompts it shows, the first and last step among them."""
    steps, prompts = (min(most, count) for most, count in zip(STRIP, (len(samples), len(samples[0][1])), strict=True))
    chosen = [samples[round(place * (len(samples) - 1) / max(1, steps - 1))] for place in range(steps)]
    rows = []
    for step, pictures in chosen:
        cells = []
        for picture in pictures[:prompts]:
            uri, width, height = data_uri(picture.path, SMALL)
            alt = escape(f"step {step}: {picture.caption}")
            cells.append(f'<td><img src="{uri}" alt="{alt}" width="{width}" height="{height}"></td>')
        rows.append(f'<tr><th scope="row">step {step:,}</th>{"".join(cells)}</tr>')
    heads = "".join(
        f'<th scope="col" title="{escape(picture.caption)}"><span>{escape(picture.caption)}</span></th>'
        for picture in chosen[0][1][:prompts]
    )
    table = f'<table class="strip"><tbody>{"".join(rows)}</tbody><tfoot><tr><td></td>{heads}</tr></tfoot></table>'
    return f'<div class="scroll">{table}</div>', steps, prompts


@dataclass(frozen=True)
class Column:
    """Pictures that stand below each other."""

    heads: tuple[str, ...]
    """Lines over them, the first of which says what they are."""
    pictures: Mapping[tuple[str, int], Generated]
    """By prompt and seed."""


def side_by_side(columns: Sequence[Column], most: int) -> tuple[str, int, int]:
    """A table with a row for the first seed of each prompt, `most` rows evenly spread; how many it shows, and of how many."""
    firsts = dict[str, tuple[str, int]]()
    for prompt, seed in columns[0].pictures:
        firsts.setdefault(prompt, (prompt, seed))
    every = list(firsts.values())
    chosen = every if len(every) <= most else [every[place * len(every) // most] for place in range(most)]
    rows, left = [], CELLS
    for prompt, seed in chosen:
        cells = []
        for column in columns:
            uri, width, height = data_uri(column.pictures[prompt, seed].path, CELL)
            left -= len(uri)
            alt = escape(f"{shortened(prompt, 120)}, {column.heads[0]}")
            cells.append(f'<td><img src="{uri}" alt="{alt}" width="{width}" height="{height}" decoding="async"></td>')
        rows.append(f'<tr><th scope="row">{escape(shortened(prompt, 40))}<br>seed {seed}</th>{"".join(cells)}</tr>')
        if left <= 0:
            break
    head = "".join(f'<th scope="col">{"<br>".join(map(escape, column.heads))}</th>' for column in columns)
    table = f'<table class="strip"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="scroll">{table}</div>', len(rows), len(every)


def _score(judge: str, both: Mapping[str, float]) -> str:
    base, aligned = both["base"], both["aligned"]
    look = "up" if aligned > base else "down" if aligned < base else ""
    return (
        f'<dt>{escape(judge)}</dt><dd><data value="{base}">{base:.2f}</data><span>→</span>'
        f'<data class="{look}" value="{aligned}">{aligned:.2f}</data></dd>'
    )
