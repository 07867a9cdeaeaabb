"""What the reproductions on the style pairs share: train, draw held-out captions, judge them, measure held-out errors.

A run is its name, its settings and its seed; what was measured of it is one JSON file, so that a reproduction that was cut goes
on where it stopped. Everything is judged per picture or per held-out comparison, so that any two runs can be compared in pairs.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from flowalign import config as configuration
from flowalign.align.step import PLAIN
from flowalign.align.terms import Terms, needs
from flowalign.data.pairs import fixed_draws
from flowalign.demo import CONFIG, GUIDANCE, STEPS, held_out_captions
from flowalign.device import make_accelerator
from flowalign.evaluate.compare import WinRate, compare
from flowalign.evaluate.diversity import pairwise_distance
from flowalign.evaluate.judges import ImageTower, Judge, load_judges, to_pixels
from flowalign.families.sampling import SamplerSettings, write_images
from flowalign.files import write_text
from flowalign.rng import Keyed
from flowalign.setup import Prepared, prepare
from flowalign.train.checkpoint import State
from flowalign.train.loop import Hooks, fit
from flowalign.train.trainable import trained

JUDGES = "samples/emoji/judges"
CAPTIONS, SEEDS = 60, (0, 1)
"""Held-out captions that are drawn, each from so many seeds: diversity needs two."""
DRAWS = 2
"""(t, noise) draws of each held-out comparison."""
Measured = Mapping[str, Any]


@needs("reference", "drift")
def everything(terms: Terms) -> Tensor:
    """An objective that makes the step compute errors and drift."""
    return terms.margin


class Bench:
    """The judges and the base's pictures, made once for all runs of a reproduction."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """settings: what all runs share, `{"a.b": value}` over configs/emoji-dpo-lora.yaml."""
        self.folder, self.settings = folder, settings
        self.judges = load_judges(JUDGES)
        self.tower = ImageTower()
        prompts = held_out_captions(CAPTIONS)
        self.prompts = [prompt for prompt in prompts for _ in SEEDS]
        self.seeds = [seed for _ in prompts for seed in SEEDS]
        self.base = self.measure("base", {}, seed=0, train=False)

    def measure(self, name: str, settings: Mapping[str, Any], seed: int, *, train: bool = True) -> Measured:
        """Train as `settings` over the shared ones say, and measure; read from the folder where it was done before.

        Keys: style, caption `[P·S]`, the judges' scores; diversity `[P]`; what `held_out` gives; seconds of training; trace,
        what training recorded.
        """
        path = self.folder / f"{name}-{seed}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as work:
            found = self._run({**self.settings, **settings, "train.seed": seed, "output": f"{work}/run"}, Path(work), train)
        found |= {"name": name, "seed": seed, "settings": dict(settings), "seconds_total": time.perf_counter() - started}
        write_text(path, json.dumps(found))
        print(f"{name:24} seed {seed}  {summary(found)}", flush=True)
        return found

    def _run(self, settings: Mapping[str, Any], work: Path, train: bool) -> dict[str, Any]:
        config = configuration.load(CONFIG, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
        accelerator = make_accelerator(config, work)
        ready = prepare(config, accelerator, progress=False)
        state = State(trained(ready.policy), ready.optimizer, ready.ema, accelerator.scaler, {})
        trace: list[dict[str, float]] = []
        hooks = Hooks(lambda step, values: trace.append({"step": step, **values}), after=ready.after)
        started = time.perf_counter()
        arguments = (accelerator, ready.model, state, ready.batches, ready.step, config.train, hooks, work / "states", {})
        if train and not fit(*arguments, progress=False):
            raise KeyboardInterrupt
        seconds = time.perf_counter() - started
        ready.policy.eval()
        pictures = self._draw(ready, work / "pictures")
        scores = {judge.name: self._judged(judge, pictures) for judge in self.judges}
        features = torch.cat([self.tower(to_pixels(pictures[i : i + 30], 128)) for i in range(0, len(pictures), 30)])
        return {
            "style": scores["style"],
            "caption": scores["caption_match"],
            "diversity": self._diversity(features.numpy()),
            "seconds": seconds,
            "trace": trace,
            **held_out(ready),
        }

    def _draw(self, ready: Prepared, folder: Path) -> list[Image.Image]:
        settings = SamplerSettings(steps=STEPS, guidance=GUIDANCE, precision="bf16")
        pipeline = ready.family.pipeline(ready.policy)
        paths = write_images(folder, pipeline, self.prompts, self.seeds, settings, batch_size=30, progress=False)
        return [Image.open(path).copy() for path in paths]

    def _judged(self, judge: Judge, pictures: Sequence[Image.Image]) -> list[float]:
        return judge.score(pictures, self.prompts).tolist()

    def _diversity(self, features: NDArray[np.float32]) -> list[float]:
        """Cosine distance between a prompt's pictures, in features scaled by their mean and spread over the base's pictures."""
        scale = self.folder / "features.npz"
        if not scale.is_file():
            np.savez(scale, mean=features.mean(0), spread=features.std(0) + 1e-6)
        with np.load(scale) as held:
            return pairwise_distance((features - held["mean"]) / held["spread"], self.prompts).tolist()


@torch.no_grad()
def held_out(ready: Prepared) -> dict[str, list[float]]:
    """Of each held-out comparison, over `DRAWS` fixed draws, against the pretrained model whatever the run's reference was.

    winner, loser: rise of the error of chosen and rejected; drift: mean of both pictures' q; margin: Δ.
    """
    step = replace(ready.step, policy=ready.policy, reference=ready.family.denoiser, objective=everything, knobs={})
    step = replace(step, carried=None, switches=PLAIN).on_held_out()
    found: dict[str, list[Tensor]] = {"winner": [], "loser": [], "drift": [], "margin": []}
    for draw in range(DRAWS):
        for batch in fixed_draws(ready.held_out, 32, DRAWS, draw):
            terms = step.terms(batch, Keyed(1))
            winner, loser = (terms.policy_error - terms.reference_error).unbind(1)
            values = {"winner": winner, "loser": loser, "drift": terms.drift.mean(1), "margin": terms.margin}
            for key, value in values.items():
                found[key].append(value)
    return {key: torch.cat(values).view(DRAWS, -1).mean(0).tolist() for key, values in found.items()}


def over(base: Measured, run: Measured, key: str, groups: Sequence[object] | None = None) -> WinRate:
    """`run` against `base` in what `key` names, paired, with intervals."""
    return compare(base[key], run[key], groups=groups)


def pooled(runs: Sequence[Measured]) -> Measured:
    """Several seeds of a run as one: their measurements one after another."""
    keys = ("style", "caption", "diversity", "winner", "loser", "drift", "margin")
    return {key: [value for run in runs for value in run[key]] for key in keys} | {
        "seconds": float(np.mean([run["seconds"] for run in runs]))
    }


def write_between(page: Path, name: str, lines: Sequence[str]) -> None:
    """Replace what stands between the comments `name` and `end of name` of a page of Markdown."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{page} lacks the marks {begin.strip()} and {end.strip()}; put them where the table shall stand.")
    write_text(page, "".join([before, begin, *(f"{line}\n" for line in lines), end, after]))


def summary(run: Measured) -> str:
    """One line."""
    style, margin = np.array(run["style"]), np.array(run["margin"])
    return (
        f"Fluent {(style > 0.5).mean():.3f}  caption {np.mean(run['caption']):+.3f}  accuracy {(margin > 0).mean():.2f}  "
        f"winner {np.mean(run['winner']):+.4f}  drift {np.mean(run['drift']):.4f}  diversity {np.mean(run['diversity']):.3f}  "
        f"{run['seconds']:.0f} s"
    )
