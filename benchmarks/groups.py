"""Memory and time of a step on large groups: all activations together, or chunk by chunk.

    python benchmarks/groups.py [--sizes 1 3 5] [--chunk 32] [--repeats 5] [--json FILE]

Comparisons of k chosen and k rejected pictures, 16 a step, objective `mdpo`, configs/emoji-dpo-lora.yaml in all else. Each
variant is a process of its own, whose peak memory is measured above what it had before its first step; time is the median step.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flowalign import config as configuration
from flowalign.demo import CONFIG
from flowalign.device import make_accelerator
from flowalign.rng import Keyed
from flowalign.setup import prepare

PAIRS = Path("samples/emoji/preferences/fluent_over_noto-{}.jsonl")


def grouped(part: str, size: int, folder: Path) -> Path:
    """The style pairs, `size` of them to a group under the prompt of the first: prompts do not change what a step costs."""
    source = Path(str(PAIRS).format(part))
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    lines = []
    for start in range(0, len(rows) - size + 1, size):
        near = rows[start : start + size]
        sides = {side: [str((source.parent / row[side]).resolve()) for row in near] for side in ("chosen", "rejected")}
        lines.append(json.dumps({"prompt": near[0]["prompt"], **sides}) + "\n")
    path = folder / f"{part}.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def measure(size: int, backward: str, chunk: int, repeats: int) -> dict[str, float]:
    """Seconds of a step, and MiB that it adds to the process at its peak."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        settings: dict[str, Any] = {
            "objective": {"name": "mdpo", "beta": 800.0},
            "train.backward": backward,
            "train.chunk": chunk,
        }
        settings |= {
            key: str(grouped(part, size, work)) for key, part in (("data.train", "train"), ("data.validation", "held_out"))
        }
        config = configuration.load(CONFIG, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
        ready = prepare(config, make_accelerator(config, work), progress=False)
        batches, taken = ready.batches(0), []
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for step in range(repeats + 1):
            batch, started = next(batches), time.perf_counter()
            loss, _ = ready.step(batch, Keyed(0))
            loss.mean().backward()
            ready.optimizer.step()
            ready.optimizer.zero_grad()
            if step:  # the first one warms up
                taken.append(time.perf_counter() - started)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": statistics.median(taken), "mib": (peak - before) / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--one", nargs=2, metavar=("K", "BACKWARD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(int(options.one[0]), options.one[1], options.chunk, options.repeats)))
        return
    found = []
    print("| k | pictures a step | backward | s/step | peak MiB of the step |\n|---|---|---|---|---|")
    for size in options.sizes:
        for backward in ("joint", "chunked"):
            command = [sys.executable, __file__, "--one", str(size), backward, "--chunk", str(options.chunk)]
            said = subprocess.run([*command, "--repeats", str(options.repeats)], check=True, capture_output=True, text=True)
            row = {"k": size, "backward": backward, "chunk": options.chunk, **json.loads(said.stdout.splitlines()[-1])}
            found.append(row)
            print(f"| {size} | {32 * size} | {backward} | {row['seconds']:.2f} | {row['mib']:.0f} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
