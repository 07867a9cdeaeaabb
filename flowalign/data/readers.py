"""Any source of preferences -> `Comparisons`, a lazy sequence of `Comparison`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import overload

import numpy as np

from flowalign.data.columns import Convention, Pictures, Row, detect
from flowalign.data.records import Comparison, key63
from flowalign.data.remote import Place, Remote, at
from flowalign.data.rows import JsonRows, Rows, TarRows
from flowalign.data.tables import DatasetRows, ParquetRows
from flowalign.errors import DataError, allowed
from flowalign.files import write_text

FORMATS = ("auto", "folder", "jsonl", "parquet", "webdataset", "datasets")
TIE_POLICIES = ("soft", "drop")
ORDERS = ("given", "reversed")
ON_BAD_ROW = ("skip", "error")
SPLIT_WORDS = {"train", "validation", "valid", "val", "test", "held_out", "heldout", "dev"}


class Comparisons(Sequence[Comparison]):
    """A source's comparisons, read when asked for. Reading a bad row raises DataError with the row's place."""

    def __init__(
        self,
        rows: Rows,
        convention: Convention,
        columns: Mapping[str, str],
        index: np.ndarray | None,
        pictures: Pictures,
        order: str = "given",
    ) -> None:
        """index: of each comparison, its row `[n]` or its rows `[n, M]`; None where every row is one."""
        self.rows, self.convention, self.columns, self.order = rows, convention, dict(columns), order
        self.index, self._pictures = index, pictures

    def __len__(self) -> int:
        return len(self.rows) if self.index is None else len(self.index)

    @overload
    def __getitem__(self, place: int) -> Comparison: ...
    @overload
    def __getitem__(self, place: slice) -> list[Comparison]: ...
    def __getitem__(self, place: int | slice) -> Comparison | list[Comparison]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        numbers = [place] if self.index is None else [int(each) for each in np.atleast_1d(self.index[place])]
        source = self.rows.where(numbers[0])
        try:
            rows = [self._row(each) for each in numbers]
            fields = self.convention.build(*rows)
            found = Comparison(prompt=rows[0].prompt, annotator=rows[0].annotator, source=source, **fields)
            return found if self.order == "given" else found.reversed()
        except DataError as error:
            raise DataError(f"{source}: {error}") from None

    def number(self, place: int) -> int:
        """Which of `rows` a comparison is, or begins with."""
        return place if self.index is None else int(np.atleast_1d(self.index[place])[0])

    def select(self, places: Sequence[int]) -> Comparisons:
        """These comparisons only, in this order."""
        index = np.arange(len(self.rows)) if self.index is None else self.index
        chosen = index[np.asarray(places, dtype=np.int64)]
        return Comparisons(self.rows, self.convention, self.columns, chosen, self._pictures, self.order)

    def _row(self, number: int) -> Row:
        values = self.rows.row(number)
        for name, column in self.columns.items():
            values[name] = values.get(column)
        return Row(values, number, self._pictures)


def open_comparisons(
    source: str | Path,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    tie_policy: str = "soft",
    order: str = "given",
    limit: int | None = None,
    image_folder: str | Path | None = None,
) -> Comparisons:
    """Open preferences without reading them.

    source: a folder with metadata.jsonl, a JSON-lines or JSON file, a Parquet file or folder of shards, WebDataset tar
        files, the address of one of these (s3://, https://, ...), or a data set that `datasets` can load (a folder or a
        hub id).
    format: one of FORMATS; "auto" looks at the source.
    columns: known column name -> the source's name for it, for example {"prompt": "text", "chosen": "win"}.
    split: for `datasets`, and for shards that carry split names.
    tie_policy: "soft" keeps ties with preference 0.5; "drop" leaves them out.
    order: "given", or "reversed", which takes the worst picture for the best, see `Comparison.reversed`.
    limit: use the first `limit` comparisons.
    image_folder: what relative picture paths are relative to, if not the source's own folder.

    Raises DataError for a source that cannot be opened or whose columns fit no convention; bad rows raise when read.
    """
    if tie_policy not in TIE_POLICIES:
        raise DataError(f"tie_policy is {tie_policy!r}; {allowed(tie_policy, TIE_POLICIES)}")
    if order not in ORDERS:
        raise DataError(f"order is {order!r}; {allowed(order, ORDERS)}")
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; it must be at least 1, or absent to use every comparison")
    rows = open_rows(source, format=format, split=split)
    if not len(rows):
        raise DataError(f"{str(source)!r} holds no rows; it needs at least one comparison")
    convention = detect(rows.columns, columns or {}, str(source))
    pictures = Pictures(at(image_folder) if image_folder else rows.folder)
    index = convention.index(rows) if convention.index else None
    if index is not None and not len(index):
        raise DataError(
            f"{str(source)!r} holds no two pictures of one prompt with different ranks; check its prompt_id and rank"
        )
    out = Comparisons(rows, convention, columns or {}, index, pictures, order)
    if tie_policy == "drop":
        out = out.select(np.flatnonzero(~_ties(out)).tolist())
    return out.select(range(limit)) if limit is not None and limit < len(out) else out


def stamp(source: str, *, format: str = "auto", split: str = "train") -> list[tuple[str, int, int]] | None:
    """Path, size and time of change in ns of each file of a table or archive on this machine; None for other sources.

    Raises DataError as `open_comparisons` does.
    """
    form = _format_of(source) if format == "auto" else format
    if form not in ("parquet", "webdataset") or isinstance(at(source), Remote):
        return None
    paths = _shards(Path(source), {"parquet": "parquet", "webdataset": "tar"}[form], split)
    try:
        states = [(path, path.stat()) for path in map(Path, map(str, paths))]
    except OSError as error:
        raise DataError(f"cannot read {source!r} ({error.strerror}); check the path") from None
    return [(str(path.resolve()), state.st_size, state.st_mtime_ns) for path, state in states]


@dataclass(frozen=True)
class BadRow:
    """A comparison that cannot be used, and why."""

    row: int
    """Its place in the Comparisons."""
    reason: str


def scan(
    comparisons: Sequence[Comparison], on_bad_row: str = "skip", indices: Iterable[int] | None = None
) -> tuple[list[int], list[BadRow]]:
    """Read every row, but no picture -> (places that can be read, the others with reasons).

    on_bad_row: "skip" lists bad rows, "error" raises the first one's DataError.
    """
    check_on_bad_row(on_bad_row)
    good, bad = [], []
    for place in range(len(comparisons)) if indices is None else indices:
        try:
            comparisons[place]
            good.append(place)
        except DataError as error:
            if on_bad_row == "error":
                raise
            bad.append(BadRow(place, str(error)))
    return good, bad


def check_on_bad_row(on_bad_row: str) -> None:
    """Raises DataError for an unknown policy."""
    if on_bad_row not in ON_BAD_ROW:
        raise DataError(f"on_bad_row is {on_bad_row!r}; {allowed(on_bad_row, ON_BAD_ROW)}")


def write_bad_rows(path: str | Path, bad: Iterable[BadRow]) -> None:
    """JSON lines `{row, reason}`, written at once or not at all."""
    write_text(Path(path), "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in bad))


def split_by_prompt(
    comparisons: Sequence[Comparison], fraction: float, seed: int, at_most: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Places (train, held out), int64: `fraction` of the distinct prompts, in the order of a hash, are held out.

    Fewer are where they would have more than `at_most` comparisons. All comparisons of a prompt land on one side. With a
    fraction above 0 and two prompts or more, both sides get at least one. Rows that cannot be read go to train, where filling
    the cache reports them. Raises DataError unless 0 <= fraction < 1.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"the held-out fraction is {fraction}; it must be at least 0 and below 1")
    hashes = np.full(len(comparisons), -1, dtype=np.int64)
    for place in range(len(comparisons)):
        try:
            hashes[place] = key63(seed, "split", comparisons[place].prompt)
        except DataError:
            continue
    return held_out_of(hashes, fraction, at_most)


def held_out_of(hashes: np.ndarray, fraction: float, at_most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """`split_by_prompt` from the hash of each comparison's prompt, int64; -1 for rows that cannot be read."""
    prompts, sizes = np.unique(hashes[hashes >= 0], return_counts=True)
    count = round(fraction * len(prompts))
    if at_most is not None:
        count = min(count, int(np.searchsorted(np.cumsum(sizes), at_most, side="right")))
    if fraction > 0 and len(prompts) > 1:
        count = min(max(count, 1), len(prompts) - 1)
    held = np.isin(hashes, prompts[:count])
    return np.flatnonzero(~held), np.flatnonzero(held)


def _ties(comparisons: Comparisons) -> np.ndarray:
    """bool `[n]`; a bad row is none and stays, so that it is reported."""
    from flowalign.data.texts import read_texts  # which reads what is opened here

    texts = read_texts(comparisons, 0)
    if texts is not None:
        return texts.ties
    found = np.zeros(len(comparisons), bool)
    for place in range(len(comparisons)):
        try:
            found[place] = comparisons[place].is_tie
        except DataError:
            continue
    return found


def _format_of(source: str) -> str:
    path = at(source)
    if path.is_dir():
        if (path / "metadata.jsonl").exists():
            return "folder"
        if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            return "datasets"
        for form, ending in (("parquet", "parquet"), ("webdataset", "tar")):
            if next(path.rglob(f"*.{ending}"), None):
                return form
        raise DataError(f"folder {source!r} holds no metadata.jsonl, *.parquet, *.tar or saved data set; see the known formats")
    suffixes = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".tar": "webdataset"}
    if path.suffix in suffixes:
        return suffixes[path.suffix]
    if path.exists():
        raise DataError(f"{source!r} ends in {path.suffix!r}; {allowed(path.suffix, suffixes)}; or pass format")
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        return "datasets"
    raise DataError(f"{source!r} does not exist; check the path")


def open_rows(source: str | Path, *, format: str = "auto", split: str = "train") -> Rows:
    """A source as numbered rows, whatever they hold; arguments as in `open_comparisons`. Raises DataError."""
    if format not in FORMATS:
        raise DataError(f"format is {format!r}; {allowed(format, FORMATS)}")
    source = str(source)
    path = at(source)
    match _format_of(source) if format == "auto" else format:
        case "folder":
            return JsonRows(path / "metadata.jsonl")
        case "jsonl":
            return JsonRows(path)
        case "parquet":
            return ParquetRows(_shards(path, "parquet", split))
        case "webdataset":
            return TarRows(_shards(path, "tar", split))
    return DatasetRows(source, split)


def _shards(path: Place, ending: str, split: str) -> list[Place]:
    if not path.is_dir():
        return [path]
    shards = sorted(path.rglob(f"*.{ending}"))
    if not shards:
        raise DataError(f"folder {str(path)!r} holds no *.{ending} file; check the path or pass format")
    words = {shard: set(re.split(r"[-./]", shard.relative_to(path).as_posix())) for shard in shards}
    splits = set().union(*words.values()) & (SPLIT_WORDS | {split})
    if not splits:
        return shards
    if split not in splits:
        raise DataError(f"folder {str(path)!r} has no shards of split {split!r}; {allowed(split, splits)}")
    return [shard for shard in shards if split in words[shard]]
