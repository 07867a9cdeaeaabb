"""Seconds of training until held-out captions are drawn in the preferred style: ours beside the plain published recipe.

    python benchmarks/quality.py sweep [--json FILE]     both recipes' own settings, one run each
    python benchmarks/quality.py race [--json FILE]      the best of each, several seeds, on a fresh cache

"Published" is what scripts do: pictures and prompts are encoded at every step, the reference runs live, attention is the
library's, times are uniform and the rate is constant. Ours reads a bank and adapts the last attention alone. Both get the best
rates of their sweep. A run has the quality when the share of Fluent drawings among 120 held-out captions is 0.90; whether the
interval of their caption match still holds 0 is said beside it. Drawing and judging are off the clock, and so is what comes
before the first step: `setup` says how long encoding and filling the bank took. Steps are what to read; `benchmarks/step.py`
times one of either kind (published, late) on quiet cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import step as bench

from flowalign import config as configuration
from flowalign.demo import CAPTIONS, CONFIG, GUIDANCE, STEPS, held_out_captions
from flowalign.device import make_accelerator
from flowalign.evaluate.compare import evaluate_folders
from flowalign.evaluate.judges import load_judges
from flowalign.families.loading import open_checkpoint
from flowalign.families.sampling import SamplerSettings, write_images
from flowalign.setup import prepare
from flowalign.train.checkpoint import State
from flowalign.train.loop import Hooks, fit
from flowalign.train.trainable import trained

SHARE = 0.90
RATES = (4e-4, 6e-4, 1.2e-3, 2.5e-3, 3.5e-3, 5e-3)
NOISY = [0.5, 1.0]
"""Times at which layout and style are decided."""
RACED = {
    True: (
        (6e-4, 400, None),
        (2.5e-3, 400, None),
        (3.5e-3, 400, None),
        (5e-3, 400, None),
        (5e-3, 200, None),
        (5e-3, 100, None),
        (1e-2, 50, None),
        (7e-2, 50, None),
    ),
    False: ((2.5e-3, 400, None), (5e-3, 400, None), (5e-3, 100, NOISY), (1e-2, 50, NOISY), (7e-2, 50, NOISY)),
}
"""Rate, β and times: of the published recipe the only rate that kept caption match, and the fastest ones; ours."""
STEPS_AT_MOST = 120
SETTINGS = SamplerSettings(steps=STEPS, guidance=GUIDANCE, precision="bf16")


class Reached(Exception):
    """The run has the quality; nothing after it is of interest."""


def run(base: Path, recipe: dict[str, Any], work: Path, *, seed: int, every: int, first: int, encode: bool) -> dict[str, Any]:
    """Train by `recipe` until the quality is there or its steps are over; what was measured every `every` steps from `first`.

    recipe: {"settings": {"a.b": value}, "published": whether to work as published scripts do}. encode: really encode at
    every step, where the recipe is the published one; else its arithmetic on cached latents.
    """
    settings = {"train.seed": seed, "train.save_every": None, "train.sample_every": every, "train.log_every": 1000}
    settings |= {"output": str(work / "run"), **recipe["settings"]}
    config = configuration.load(CONFIG, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    accelerator = make_accelerator(config, work)
    started = time.perf_counter()
    ready = prepare(config, accelerator, progress=False)
    setup = time.perf_counter() - started
    state = State(trained(ready.policy), ready.optimizer, ready.ema, accelerator.scaler, {})
    judges = load_judges(config.judges, accelerator.device)
    prompts = held_out_captions(CAPTIONS)
    trace: list[dict[str, float]] = []
    seconds, since = 0.0, time.perf_counter()

    def judge(step: int) -> None:
        nonlocal seconds, since
        seconds += time.perf_counter() - since
        if step < first:
            since = time.perf_counter()
            return
        with tempfile.TemporaryDirectory() as folder:
            ready.policy.eval()
            draw(ready.family.pipeline(ready.policy), prompts, Path(folder))
            ready.policy.train()
            found = evaluate_folders(base, Path(folder), judges, progress=False)["judges"]
        caption = found["caption_match"]["mean_difference"]
        share = found["style"]["aligned"]["share"]
        trace.append({"step": step, "seconds": round(seconds, 2), "share": share, "caption": caption["value"]})
        trace[-1] |= {"caption_low": caption["low"], "caption_high": caption["high"]}
        if share >= SHARE:
            raise Reached
        since = time.perf_counter()

    batches, step = ready.batches, ready.step
    if recipe["published"] and encode:
        step = replace(step, autocast=accelerator.autocast)
        batches = lambda position: bench.raw_batches(config, ready, accelerator.autocast)  # noqa: E731
    hooks = Hooks(lambda step, values: None, None, judge)
    try:
        if not fit(accelerator, ready.model, state, batches, step, config.train, hooks, work / "states", {}, progress=False):
            raise KeyboardInterrupt
        judge(config.train.steps)
    except Reached:
        pass
    last = trace[-1]
    reached = last["share"] >= SHARE and last["caption_high"] >= 0
    return {**recipe, "seed": seed, "setup": round(setup, 2), "reached": reached, "last": last, "trace": trace}


def draw(pipeline: Any, prompts: list[str], folder: Path) -> None:
    write_images(folder, pipeline, prompts, [0] * len(prompts), SETTINGS, batch_size=30, progress=False)


def recipe(published: bool, rate: float, beta: float, times: list[float] | None = None) -> dict[str, Any]:
    settings: dict[str, Any] = {"train.schedule": "constant", "train.warmup_steps": 0, "train.steps": STEPS_AT_MOST}
    settings |= {"train.learning_rate": rate, "objective.beta": beta}
    settings |= {"train.timesteps": "uniform"} if published else {"reference.bank": 1, "trainable.targets": bench.LATE}
    settings |= {} if times is None else {"train.timestep_range": times}
    return {"settings": settings, "published": published}


def recipes(what: str) -> list[dict[str, Any]]:
    """Those of a sweep, or of the race of what was best in it."""
    if what == "race":
        return [recipe(published, *settings) for published, several in RACED.items() for settings in several]
    plain = [recipe(True, rate, beta) for rate, beta in itertools.product(RATES, (100, 200, 400, 800))]
    return plain + [recipe(False, rate, 400) for rate in RATES[-3:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("sweep", "race"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--every", type=int, default=1, help="steps between two looks")
    parser.add_argument("--first", type=int, default=5, help="steps before the first look")
    parser.add_argument("--recipes", type=Path, help="a JSON list of recipes instead of the sweep's own")
    parser.add_argument("--json", type=Path, help="also write what was measured here")
    options = parser.parse_args()
    chosen = json.loads(options.recipes.read_text()) if options.recipes else recipes(options.what)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        draw(open_checkpoint("samples/emoji/tiny-sd"), held_out_captions(CAPTIONS), base)
        for seed, each in itertools.product(options.seeds, chosen):
            with tempfile.TemporaryDirectory() as work:
                if options.what == "race":
                    each = each | {"settings": each["settings"] | {"data.cache": f"{work}/cache"}}
                looks = {"every": options.every, "first": options.first}
                result = run(base, each, Path(work), seed=seed, **looks, encode=options.what == "race")
            found.append(result)
            print(json.dumps({key: value for key, value in result.items() if key != "trace"}), flush=True)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1) + "\n")
    runs: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in found:
        rate, beta, times = (
            row["settings"].get(name) for name in ("train.learning_rate", "objective.beta", "train.timestep_range")
        )
        runs.setdefault((not row["published"], beta, rate, str(times or "")), []).append(row)
    for (ours, beta, rate, times), rows in sorted(runs.items()):
        there = [row["last"]["step"] for row in rows if row["last"]["share"] >= SHARE]
        said = f"{statistics.median(there):g} steps (median of {len(there)} of {len(rows)})" if there else "never"
        print(f"{'ours' if ours else 'published':10} β {beta:<4g} {rate:<7g} {times:10} {said}")


if __name__ == "__main__":
    main()
