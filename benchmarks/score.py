"""What scoring by two rewards at once saves, and how much of the tower's own speed is left.

    python benchmarks/score.py [--towers emoji-clip ViT-B-32] [--pictures N] [--repeats 5] [--json FILE]

    image     forwards of the image tower over prepared batches, nothing else
    bare      the same, and the prompts of each batch through the text tower: the forwards that CLIPScore takes
    at_once   the image tower as before, and all prompts through the text tower at the end, in batches of their own
    clip      CLIPScore alone, from files to table
    aesthetic the same with an aesthetic head alone
    both      the two together: one forward

Pictures are PNG files with eight pictures a prompt; every run starts with an empty cache. ViT-B-32 has random weights and
its pictures are 256 pixels wide; emoji-clip is the bundled model on 64 pixels. Variants take turns in one process, so that a
change of the machine's speed meets all of them; medians and ratios are what to read. A run has so many pictures that it lasts
a second or two, because a table and a cache take some hundredths whatever is in them. The tower has `--threads` threads (as
many as there are cores, but one, by default) and decoding has `--workers`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from flowalign.device import choose_device
from flowalign.families.sampling import PRECISIONS
from flowalign.heap import keep_freed_memory
from flowalign.scoring.cache import ScoreCache
from flowalign.scoring.engine import Scorer, score
from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards.base import Reward, Shelf
from flowalign.scoring.sources import open_items

ROOT = Path(__file__).resolve().parents[1]
TOWERS = {"emoji-clip": (64, 1024), "ViT-B-32": (256, 256)}
"""Width of the pictures, and how many a run has."""
SAMPLES = 8
"""Pictures a prompt."""


def rewards_of(tower: str, shelf: Shelf, folder: Path) -> list[Reward]:
    """CLIPScore and an aesthetic head on one tower."""
    if tower == "emoji-clip":
        return load_rewards([str(ROOT / "samples" / "emoji" / "rewards.yaml")], shelf)
    import open_clip
    from safetensors.torch import save_file

    from flowalign.scoring.rewards.open_clip_tower import build

    torch.manual_seed(0)
    config = open_clip.get_model_config(tower)
    (folder / "tower.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in build(config).state_dict().items()}, folder / "tower.safetensors")
    head = {"weight": torch.randn(1, config["embed_dim"]), "bias": torch.zeros(1)}
    save_file(head, folder / "head.safetensors")
    place = {"model": str(folder / "tower.json"), "pretrained": str(folder / "tower.safetensors")}
    return load_rewards(
        [{"name": "clip"} | place, {"name": "aesthetic", "weights": str(folder / "head.safetensors")} | place], shelf
    )


def make(folder: Path, count: int, side: int) -> Path:
    """Pictures that compress like drawings do."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(draw.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number:05d}.png")
        (folder / f"{number:05d}.txt").write_text(f"a drawing of thing number {number // SAMPLES}")
    return folder


def variants(rewards: list[Reward], source: Path, folder: Path, options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    clip, aesthetic = rewards
    tower: Any = clip.backbone
    inputs = [tower.prepare(Image.open(path).convert("RGB")) for path in sorted(source.glob("*.png"))]
    size, runs = options.batch_size, iter(range(10**6))

    prompts = [path.read_text() for path in sorted(source.glob("*.txt"))]

    @torch.inference_mode()
    def forwards(told: bool) -> None:
        for start in range(0, len(inputs), size):
            tower.see(inputs[start : start + size]).sum().item()
            if told:
                tower.forget()
                tower.read(prompts[start : start + size]).sum().item()

    @torch.inference_mode()
    def at_once() -> None:
        forwards(False)
        tower.forget()
        tower.read(list(dict.fromkeys(prompts))).sum().item()

    def with_(*some: Reward) -> Callable[[], None]:
        def run() -> None:
            place = folder / str(next(runs))
            scorer = Scorer(some, ScoreCache(place), batch_size=size, workers=options.workers)
            counts = score(open_items(source), scorer, place / "out.parquet", progress=False)
            if counts.failed or counts.forwards != len(inputs):
                raise RuntimeError(f"{counts}")

        return run

    alone = {"image": partial(forwards, False), "bare": partial(forwards, True), "at_once": at_once}
    return alone | {"clip": with_(clip), "aesthetic": with_(aesthetic), "both": with_(clip, aesthetic)}


def measure(tower: str, options: argparse.Namespace) -> dict[str, Any]:
    side, usual = TOWERS[tower]
    pictures = options.pictures or usual
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rewards = rewards_of(tower, Shelf(choose_device(options.device), PRECISIONS[options.precision]), folder)
        source = make(folder / "pictures", pictures, side)
        tests = variants(rewards, source, folder, options)
        wall: dict[str, list[float]] = {variant: [] for variant in tests}
        cpu: dict[str, list[float]] = {variant: [] for variant in tests}
        for round_ in range(options.repeats + 1):
            for variant, run in tests.items():
                at, used = time.perf_counter(), time.process_time()
                run()
                if round_:  # the first warms up
                    wall[variant].append(time.perf_counter() - at)
                    cpu[variant].append(time.process_time() - used)

    def ratios(of: dict[str, list[float]]) -> dict[str, float]:
        rounds = [dict(zip(of, each, strict=True)) for each in zip(*of.values(), strict=True)]
        apart = [(each["clip"] + each["aesthetic"]) / each["both"] for each in rounds]
        return {
            "together_against_apart": statistics.median(apart),
            **{
                f"of_{name}": statistics.median(each[name] / each["both"] for each in rounds)
                for name in ("bare", "at_once", "image")
            },
        }

    medians = {variant: statistics.median(times) for variant, times in wall.items()}
    return {
        "pictures": pictures,
        "pictures_per_second": {variant: pictures / seconds for variant, seconds in medians.items()},
        "cpu_seconds": {variant: statistics.median(times) for variant, times in cpu.items()},
        "wall": ratios(wall),
        "cpu": ratios(cpu),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--towers", nargs="+", choices=TOWERS, default=list(TOWERS))
    parser.add_argument("--pictures", type=int, help="of a run; by default what suits the tower")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the command does
    found: dict[str, Any] = {name: getattr(options, name) for name in ("batch_size", "repeats", "workers", "threads")}
    found |= {"device": str(choose_device(options.device)), "precision": options.precision, "torch": torch.__version__}
    for tower in options.towers:
        row = found[tower] = measure(tower, options)
        rates = "  ".join(f"{variant} {rate:.1f}/s" for variant, rate in row["pictures_per_second"].items())
        print(f"{tower}: {rates}")
        for clock in ("wall", "cpu"):
            together, bare, at_once, image = row[clock].values()
            said = (
                f"{together:.2f} times as fast as apart, {bare:.2f} of both towers ({at_once:.2f} with all prompts at once), "
            )
            said += f"{image:.2f} of the image tower alone"
            print(f"  {clock:4} together {said}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
