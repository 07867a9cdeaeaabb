"""Sources and pictures by address, in fsspec's own file system in memory and from a web server on this machine."""

from __future__ import annotations

import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowalign.data.readers import open_comparisons
from flowalign.data.remote import Remote
from flowalign.errors import DataError, MissingExtraError
from tests.data.test_readers import add, png, shades, write_jsonl


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    """The address of a folder that holds one source of each form: 10 is preferred to 20, then 30 to 10."""
    order = [(10, 20), (30, 10)]
    for shade in (10, 20, 30):
        (tmp_path / f"{shade}.png").write_bytes(png(shade))
    rows = [{"prompt": f"p{place}", "chosen": f"{a}.png", "rejected": f"{b}.png"} for place, (a, b) in enumerate(order)]
    write_jsonl(tmp_path / "votes.jsonl", rows)
    renamed = {"prompt": "prompt", "chosen": "chosen_file_name", "rejected": "rejected_file_name"}
    write_jsonl(tmp_path / "metadata.jsonl", [{renamed[key]: value for key, value in row.items()} for row in rows])
    cells = {side: [png(pair[place]) for pair in order] for place, side in enumerate(("chosen", "rejected"))}
    (tmp_path / "shards").mkdir()
    for split in ("train", "test"):
        pq.write_table(pa.table({"prompt": ["p0", "p1"], **cells}), tmp_path / "shards" / f"{split}-0.parquet")
    with tarfile.open(tmp_path / "votes.tar", "w") as tar:
        for place, (a, b) in enumerate(order):
            for ending, data in (("chosen.png", png(a)), ("rejected.png", png(b)), ("txt", f"p{place}".encode())):
                add(tar, f"{place}.{ending}", data)
    pointing = [{"prompt": "p0", "chosen": "shards/train-0.parquet#0:chosen", "rejected": "memory://votes/20.png"}]
    write_jsonl(tmp_path / "pointing.jsonl", pointing)
    memory = fsspec.filesystem("memory")
    memory.put(f"{tmp_path}/", "/votes/", recursive=True)
    yield "memory://votes"
    memory.rm("/votes", recursive=True)


@pytest.mark.parametrize("name", ["/votes.jsonl", "", "/shards", "/shards/train-0.parquet", "/votes.tar"])
def test_a_source_at_an_address_is_the_one_on_this_disk(store: str, tmp_path: Path, name: str) -> None:
    remote, local = open_comparisons(f"{store}{name}"), open_comparisons(f"{tmp_path}{name}")
    assert len(remote) == len(local) == 2
    for place in range(2):
        one, other = remote[place], local[place]
        assert (one.prompt, one.id) == (other.prompt, other.id)
        assert [image.name for image in one.images] == [image.name for image in other.images]
        assert remote[place].source == local[place].source
        assert shades(remote, place) == shades(local, place)
    assert shades(remote, 1) == [30, 10]


def test_rows_may_point_to_addresses(store: str, tmp_path: Path) -> None:
    for source in (f"{store}/pointing.jsonl", tmp_path / "pointing.jsonl"):
        comparisons = open_comparisons(source)
        assert shades(comparisons, 0) == [10, 20]
    here = write_jsonl(tmp_path / "a" / "votes.jsonl", [{"prompt": "p", "chosen": "10.png", "rejected": "20.png"}])
    assert shades(open_comparisons(here, image_folder=store), 0) == [10, 20]


def test_nothing_is_fetched_before_it_is_asked_for(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening reads no picture; a picture of an archive is fetched alone."""
    asked: list[tuple[str, int | None]] = []
    memory = type(fsspec.filesystem("memory"))
    cat = memory.cat_file

    def counted(self: Any, path: str, start: int | None = None, end: int | None = None, **more: Any) -> bytes:
        asked.append((path, None if start is None or end is None else end - start))
        return cat(self, path, start=start, end=end, **more)

    monkeypatch.setattr(memory, "cat_file", counted)
    comparison = open_comparisons(f"{store}/votes.jsonl")[0]
    assert not asked
    comparison.images[1].read()
    assert [path for path, _ in asked] == ["/votes/20.png"]
    asked.clear()
    open_comparisons(f"{store}/votes.tar")[0].images[0].read()
    assert max(size or 10**9 for _, size in asked) == len(png(10))


@pytest.mark.parametrize(
    ("address", "error", "said"),
    [
        ("memory://votes/nothing.jsonl", DataError, r"cannot read 'memory://votes/nothing.jsonl' \(there is no such file\)"),
        ("memory://votes/nothing.parquet", DataError, "there is no such file"),
        ("memory://votes/nothing.tar", DataError, "there is no such file"),
        ("nowhere://votes/a.jsonl", DataError, r"Protocol not known: nowhere\); check the address"),
        ("oci://bucket/a.jsonl", MissingExtraError, r"needs the package 'fsspec\[oci\]'.*pip install 'flowalign\[remote\]'"),
    ],
)
def test_addresses_that_cannot_be_read_are_one_sentence(store: str, address: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        open_comparisons(address)


def test_a_picture_that_is_not_there_is_a_bad_row_when_it_is_read(store: str, tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "memory://votes/10.png", "rejected": "memory://votes/lost.png"}
    comparison = open_comparisons(write_jsonl(tmp_path / "lost.jsonl", [row]))[0]
    assert comparison.images[0].read() == png(10)
    with pytest.raises(DataError, match=r"cannot read 'memory://votes/lost\.png' \(there is no such file\)"):
        comparison.images[1].read()


def test_over_http(store: str, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        for name in ("votes.jsonl", "shards/train-0.parquet", "votes.tar"):
            assert shades(open_comparisons(f"{base}/{name}"), 1) == [30, 10]
        with pytest.raises(DataError, match="cannot read"):
            open_comparisons(f"{base}/nothing.jsonl")
        server.shutdown()


def test_names_of_addresses() -> None:
    remote = Remote("https://host/a/b.parquet?token=1/2")
    assert (remote.name, remote.suffix, str(remote.parent)) == ("b.parquet", ".parquet", "https://host/a")
    assert str(remote.parent / "c.png") == "https://host/a/c.png"
    assert remote.parent / "/c.png" == Path("/c.png")
