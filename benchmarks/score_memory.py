"""Peak memory of scoring, from a thousand tiny pictures to fifty thousand.

    python benchmarks/score_memory.py [--counts 1000 5000 50000] [--forms folder parquet comparisons] [--json FILE]

Each line is a process of its own that scores as `flowalign score` does: 16-pixel pictures, all different, by two formulas of
pixels, one of which reads the prompt. `before` is resident memory with all packages loaded and the source not yet open.

    folder       files with a text file beside each
    parquet      bytes in a table
    comparisons  a JSON-lines file of pairs of those files, two pairs a picture
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from flowalign.scoring.cache import ScoreCache
from flowalign.scoring.engine import Scorer, score
from flowalign.scoring.rewards.base import Backbone, Card, Reward
from flowalign.scoring.sources import open_items

FORMS = ("folder", "parquet", "comparisons")
SIDE = 16


class Means(Backbone):
    """Mean colour."""

    key, device = "means", torch.device("cpu")

    def prepare(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).float().mean((0, 1)) / 255

    def see(self, inputs: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(inputs))


class Brightness(Reward):
    """Mean colour, and with it the prompt's length where that is read."""

    def __init__(self, backbone: Backbone, name: str, reads_prompt: bool) -> None:
        self.backbone = backbone
        self.card = Card(name, name, (0, 1e6), "higher", "none", "here", "none", reads_prompt, False, name)

    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        return features.mean(1) + torch.tensor([len(prompt) * float(self.card.reads_prompt) for prompt in prompts])


def picture(number: int) -> bytes:
    colours = np.frombuffer(number.to_bytes(4, "little") * (SIDE * SIDE * 3 // 4), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(colours.reshape(SIDE, SIDE, 3)).save(out, "PNG")
    return out.getvalue()


def make(form: str, count: int, folder: Path) -> Path:
    if form == "parquet":
        rows = [{"image": picture(number), "prompt": f"thing {number // 8}", "seed": number} for number in range(count)]
        pq.write_table(pa.Table.from_pylist(rows), folder / "pictures.parquet", row_group_size=1000)
        return folder / "pictures.parquet"
    for number in range(count):
        (folder / f"{number:06d}.png").write_bytes(picture(number))
        if form == "folder":
            (folder / f"{number:06d}.txt").write_text(f"thing {number // 8}")
    if form == "folder":
        return folder
    names = [f"{number:06d}.png" for number in range(count)]
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(count):  # neighbours of one prompt, both ways
            other = number + 1 if number % 8 < 7 and number + 1 < count else number - number % 8
            file.write(json.dumps({"prompt": f"thing {number // 8}", "chosen": names[number], "rejected": names[other]}) + "\n")
    return folder / "pairs.jsonl"


def measure(source: Path, out: Path) -> dict[str, Any]:
    tower = Means()
    rewards = [Brightness(tower, "brightness", False), Brightness(tower, "told", True)]
    scorer = Scorer(rewards, ScoreCache(out.parent / "cache"), batch_size=32)
    before, started = resident(), time.perf_counter()
    counts = score(open_items(source), scorer, out, progress=False)
    peak = most()
    seconds = time.perf_counter() - started
    return {"pictures": counts.rows, "failed": counts.failed, "before_mib": before, "peak_mib": peak, "seconds": seconds}


def resident() -> float:
    """MiB"""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def most() -> float:
    """Peak resident memory in MiB. Not getrusage's, which a process inherits from the one that started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 5000, 50000])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("SOURCE", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*map(Path, options.one))))
        return
    found = []
    print(f"{'source':12} {'pictures':>9} {'before MiB':>11} {'peak MiB':>9} {'pictures/s':>11}")
    for form in options.forms:
        for count in options.counts:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "p").mkdir()
                source = make(form, count, Path(folder) / "p")
                command = [sys.executable, __file__, "--one", str(source), f"{folder}/out.parquet"]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = {"form": form} | json.loads(done.stdout.splitlines()[-1])
            found.append(row)
            rate = row["pictures"] / row["seconds"]
            print(f"{form:12} {row['pictures']:9} {row['before_mib']:11.0f} {row['peak_mib']:9.0f} {rate:11.0f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
