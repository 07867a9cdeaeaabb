"""Pairs per second of one alignment step, beside what bounds it and beside what published scripts do.

    python benchmarks/step.py [--config configs/emoji-dpo-lora.yaml] [--batch-size 16] [--repeats 15] [--json FILE]

    floor       forward and backward of the policy over the same 2·B latents, nothing else
    reference   one forward of the reference over them, without gradients
    ours        the trainer's step: batch from the cache, noise, both forwards, loss, backward, clipping, AdamW
    bank        ours with the reference's errors read from a filled bank
    late        bank, with LoRA on the last attention alone, which spares most of the backward pass
    re-encode   ours with pictures decoded and encoded by the VAE and prompts by the text encoder at every step
    published   re-encode with the library's own attention kernels and the VAE under autocast, as published scripts run it

The variants take turns in one process, so that a change of the machine's speed meets all of them; medians and ratios are
what to read. Peak memory is that of a process (or of the GPU's allocator) that runs one variant alone.
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
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowalign import config as configuration
from flowalign.align.step import PreferenceStep
from flowalign.data.batch import Batch
from flowalign.data.images import decode, fit
from flowalign.data.readers import open_comparisons
from flowalign.device import make_accelerator
from flowalign.rng import Keyed
from flowalign.setup import Prepared, prepare
from flowalign.train.trainable import trained

VARIANTS = ("floor", "reference", "ours", "bank", "late", "re-encode", "published")
LATE = [f"up_blocks.1.attentions.1.*.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")]
"""`trainable.targets` of the variant of that name."""


def build(options: argparse.Namespace, folder: str) -> tuple[Prepared, dict[str, Callable[[], None]]]:
    overrides = [f"train.batch_size={options.batch_size}", f"output={folder}", *options.set]
    config = configuration.load(options.config, overrides)
    accelerator = make_accelerator(config, Path(folder))
    ready = prepare(config, accelerator, progress=False)
    ready.model.train()
    stream, rng = ready.batches(0), Keyed(config.train.seed)
    fixed = ready.first_batch()
    x_t, target, t = ready.step.noised(fixed, rng)
    conditioning = ready.step.told(fixed)

    def floor() -> None:
        with ready.step.autocast():
            prediction = ready.family.predict(ready.model, x_t, t, conditioning)
        (prediction.float() - target).square().mean().backward()
        ready.optimizer.zero_grad()

    def reference() -> None:
        with torch.no_grad(), ready.step.autocast():
            ready.family.predict(ready.step.reference, x_t, t, conditioning)

    def train_on(batch: Batch, run: Prepared = ready, step: PreferenceStep | None = None) -> None:
        loss, _ = (step or run.step)(batch, rng)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(list(trained(run.policy).values()), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)

    def trains(batches: Iterator[Batch], run: Prepared) -> None:
        train_on(next(batches), run)

    work = {"floor": floor, "reference": reference, "ours": lambda: train_on(next(stream))}
    for name, targets in (("bank", None), ("late", LATE)):
        if name in options.variants:
            settings = [*overrides, "reference.bank=1", *([f"trainable.targets={json.dumps(targets)}"] if targets else [])]
            run = prepare(configuration.load(options.config, settings), accelerator, progress=False)
            run.model.train()
            work[name] = partial(trains, run.batches(0), run)
    if "re-encode" in options.variants:
        raw = raw_batches(config, ready, nullcontext)
        work["re-encode"] = lambda: train_on(next(raw))
    if "published" in options.variants:
        plain = replace(ready.step, autocast=accelerator.autocast)
        scripted = raw_batches(config, ready, accelerator.autocast)
        work["published"] = lambda: train_on(next(scripted), step=plain)
    return ready, work


def raw_batches(config: configuration.Config, ready: Prepared, encoding: Callable[[], Any]) -> Iterator[Batch]:
    """Batches of the same comparisons, decoded and encoded anew each time, within `encoding()`."""
    comparisons, keyed = open_comparisons(config.data.train), Keyed(config.train.seed)
    for batch in ready.batches(0):
        places = [place % len(comparisons) for place in batch.positions]
        rows = [comparisons[place] for place in places]
        pictures = [fit(decode(image.read()), ready.family.resolution) for row in rows for image in row.images]
        pixels = torch.from_numpy(np.stack(pictures)).to(ready.step.device).float() / 255
        with encoding():
            posterior = ready.family.encode_images(pixels)
        dropped = keyed.uniform("caption-dropout", batch.ids, batch.draws) < config.train.caption_dropout
        prompts = ["" if drop else row.prompt for row, drop in zip(rows, dropped, strict=True)]
        conditioning = ready.family.encode_prompts(prompts)
        shape = (len(rows), 2, *posterior.mean.shape[1:])
        yield replace(
            batch, mean=posterior.mean.view(shape).cpu(), std=posterior.std.view(shape).cpu(), conditioning=conditioning
        )


def clock(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def measure_alone(options: argparse.Namespace) -> None:
    """Peak memory in MiB of one variant; the only line printed."""
    with tempfile.TemporaryDirectory() as folder:
        ready, work = build(options, folder)
        for _ in range(3):
            work[options.variants[0]]()
        cuda = ready.step.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(round(peak))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/emoji-dpo-lora.yaml"))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--set", nargs="+", default=[], metavar="a.b=c", help="override settings of the configuration")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if options.memory_of:
        options.variants = [options.memory_of]
        return measure_alone(options)

    with tempfile.TemporaryDirectory() as folder:
        ready, work = build(options, folder)
        seconds: dict[str, list[float]] = {name: [] for name in options.variants}
        for turn in range(options.repeats + 2):
            for name in options.variants:
                taken = clock(work[name], ready.step.device)
                if turn >= 2:  # the first two turns warm up
                    seconds[name].append(taken)
    figures: dict[str, dict[str, float]] = {}
    for name, taken in seconds.items():
        command = [sys.executable, __file__, "--config", str(options.config), "--batch-size", str(options.batch_size)]
        command += ["--memory-of", name, *(["--set", *options.set] if options.set else [])]
        memory = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
        median = statistics.median(taken)
        figures[name] = {"seconds": median, "pairs_per_second": options.batch_size / median, "peak_mib": float(memory)}

    def ratio(top: str, *bottom: str) -> float | None:
        """Median over turns of top / sum of bottom."""
        if not {top, *bottom} <= seconds.keys():
            return None
        rows = zip(seconds[top], *(seconds[name] for name in bottom), strict=True)
        return statistics.median(first / sum(others) for first, *others in rows)

    result = {
        "config": str(options.config),
        "batch_size": options.batch_size,
        "repeats": options.repeats,
        "threads": torch.get_num_threads(),
        "device": str(ready.step.device),
        "torch": torch.__version__,
        "variants": figures,
        "ours_over_floor_and_reference": ratio("ours", "floor", "reference"),
        "ours_faster_than_re_encode": ratio("re-encode", "ours"),
        "ours_faster_than_published": ratio("published", "ours"),
        "bank_over_floor": ratio("bank", "floor"),
        "bank_faster_than_re_encode": ratio("re-encode", "bank"),
        "bank_faster_than_published": ratio("published", "bank"),
        "late_faster_than_published": ratio("published", "late"),
    }
    print(f"{'':12}{'s/step':>9}{'pairs/s':>10}{'peak MiB':>10}")
    for name, row in figures.items():
        print(f"{name:12}{row['seconds']:9.3f}{row['pairs_per_second']:10.1f}{row['peak_mib']:10.0f}")
    for name, value in result.items():
        if name.startswith(("ours_", "bank_", "late_")):
            print(f"{name.replace('_', ' '):32}{value if value is not None else float('nan'):.3f}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
