"""How long a large source takes to open and to give its first batch, and how much memory that needs.

    python benchmarks/data.py [--rows 1000000] [--steps 1000] [--pairs 16] [--held-out 0.05] [--all]
        [--forms parquet webdataset] [--json FILE]

Each source is made in a temporary folder: pairs over a few thousand prompts whose pictures are a few hundred tiny PNGs used
again and again, so that what is measured is the handling of rows and not of pixels. Each line is a process of its own:

    open           the readers alone: open, shuffle, read one picture
    first start    all that a run of so many steps does with its data: read all prompts, split, count, and read, hash and encode
                   the pictures that it sees and those held out
    again          the same once more, from the index that the first start left
    all rows       with --all: the first start of a run that sees every row, in an empty cache
    all rows again
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from flowalign.config import parse
from flowalign.data.batch import Conditioning
from flowalign.data.pairs import PairStream
from flowalign.data.readers import open_comparisons
from flowalign.rng import Keyed
from flowalign.sources import load_data
from flowalign.train.ranks import Ranks

PICTURES, PROMPTS, SIDE = 256, 4096, 16


class Encoder:
    """The smallest thing that encodes."""

    multiple, resolution = 8, SIDE

    def fingerprint(self, part: str) -> str:
        return f"benchmark {part}"

    def release_encoders(self) -> None: ...

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        return mean, torch.ones_like(mean)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning({"length": torch.tensor([float(len(prompt)) for prompt in prompts])})


def picture(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def make(form: str, rows: int, path: Path) -> None:
    pictures = [picture(seed) for seed in range(PICTURES)]
    row = [(f"prompt {r % PROMPTS}", pictures[r % PICTURES], pictures[(r // PICTURES + r + 1) % PICTURES]) for r in range(rows)]
    if form == "parquet":
        schema = pa.schema([("prompt", pa.string()), ("chosen", pa.binary()), ("rejected", pa.binary())])
        with pq.ParquetWriter(path, schema) as writer:
            for start in range(0, rows, 10_000):
                columns = list(zip(*row[start : start + 10_000], strict=True))
                writer.write_table(pa.table(dict(zip(schema.names, map(list, columns), strict=True)), schema=schema))
        return
    with tarfile.open(path, "w") as tar:
        for number, cells in enumerate(row):
            for ending, data in zip(("txt", "chosen.png", "rejected.png"), (cells[0].encode(), *cells[1:]), strict=True):
                info = tarfile.TarInfo(f"{number:08d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def measure(source: str, cache: str, stage: str, steps: str, pairs: str, held_out: str) -> dict[str, Any]:
    """Seconds of each stage and MiB of memory after it, the libraries' own included."""
    stages: dict[str, Any] = {"before": {"MiB": memory()}}
    clock = time.perf_counter()

    def done(name: str) -> None:
        nonlocal clock
        stages[name] = {"s": round(time.perf_counter() - clock, 2), "MiB": memory(), "peak MiB": peak()}
        clock = time.perf_counter()

    if stage == "open":
        comparisons = open_comparisons(source)
        order = Keyed(0).permutation("order", 0, len(comparisons))
        comparisons[int(order[0])].images[0].read()
        done("opened, shuffled, one picture read")
        return stages
    data = {"train": source, "cache": cache, "resolution": SIDE, "held_out": float(held_out)}
    tree = {"model": {"checkpoint": "none"}, "data": data, "train": {"steps": int(steps), "batch_size": int(pairs)}}
    ranks = Ranks(SimpleNamespace(num_processes=1, process_index=0), 60.0)
    train, _, summary = load_data(parse(tree), Encoder(), Path(cache), False, ranks)
    done("loaded")
    next(iter(PairStream(train, 0, batch_size=int(pairs))))
    done("first batch")
    stages["prepared"] = summary["prepared"]
    return stages


def memory() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 2**20


def peak() -> int:
    """Of this process alone: getrusage also counts what its parent was when it forked."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--forms", nargs="+", default=["parquet", "webdataset"], choices=["parquet", "webdataset"])
    parser.add_argument("--steps", type=int, default=1000, help="of the run")
    parser.add_argument("--pairs", type=int, default=16, help="that a step sees")
    parser.add_argument("--held-out", type=float, default=0.05, help="share of the prompts, all of whose rows are prepared too")
    parser.add_argument("--all", action="store_true", help="measure a run that sees every row too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    found: dict[str, Any] = {"rows": options.rows, "steps": options.steps, "pairs": options.pairs, "held out": options.held_out}
    stages = [
        ("open", "open", "some", options.steps),
        *((name, "load", "some", options.steps) for name in ("first start", "again")),
    ]
    if options.all:
        stages += [(name, "load", "all", options.rows) for name in ("all rows", "all rows again")]
    for form in options.forms:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / f"votes.{ {'parquet': 'parquet', 'webdataset': 'tar'}[form] }"
            make(form, options.rows, source)
            for name, stage, cache, steps in stages:
                command = [sys.executable, __file__, "--measure", str(source), f"{folder}/{cache}", stage]
                command += [str(steps), str(options.pairs), str(options.held_out)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found.setdefault(form, {})[name] = json.loads(done.stdout)
                print(form, name, done.stdout.strip(), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
