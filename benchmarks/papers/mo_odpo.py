"""MO-ODPO (Gupta et al. 2025, arXiv 2503.00295) on the emoji, its offline form: one policy for all weights of two rewards.

    python -m benchmarks.papers.mo_odpo [--work runs/mo_odpo] [--pool runs/capo] [--seeds 0] [--quick]

The pool is tiny-sd's own pictures of train prompts with the calibrated rewards of `benchmarks.papers.capo`, of which two count:
does a picture show its caption, and is it Fluent. For each prompt weights w ~ Dirichlet(α·1) are drawn, and the best picture by
w·R is chosen against the worst:

    steered    one policy that is told w, trained on weights of each α; `words` is told them in words
    soups      the mean of the weights of two models, one for each reward, by w
    oracle     a model for each w, dpo on the pairs that w chooses

Held-out captions are drawn under 11 w and judged by judges that are no rewards. What is finished in --work is kept.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.papers.capo import scored
from benchmarks.papers.stages import TINY, Tree, align, draw, judges, kept, options_of, publish
from flowalign import runs
from flowalign.data.writer import write_comparisons
from flowalign.demo import GUIDANCE, STEPS, held_out_captions
from flowalign.evaluate.pareto import MultiObjective, against, multi_objective
from flowalign.families.loading import open_checkpoint
from flowalign.families.sampling import SamplerSettings, write_images
from flowalign.families.steer import steered
from flowalign.scoring.comparisons import select
from flowalign.scoring.table import CALIBRATED, ScoreTable

REWARDS = ("emoji_clip", "style")
MEASURES = ("caption_match", "style")
"""The judge that stands for each reward."""
ALPHAS = (0.2, 0.5, 1.0, 5.0)
DRAWS = 4
"""Weights of a prompt."""
ORACLES = (0.3, 0.5, 0.7)
"""Weights of style that a model of its own is trained for, beside the two corners."""
SEED = 7
"""Of the pictures that are judged."""
PAGE = Path("docs/results/mo_odpo.md")
Array = NDArray[np.float64]


def settings(pairs: Path, steps: int, seed: int, work: Path) -> Tree:
    return {
        "model": {"checkpoint": TINY},
        "data": {"train": str(pairs), "held_out": 0.0, "cache": str(work / "cache")},
        "objective": {"name": "dpo", "beta": 400.0},
        "trainable": {"kind": "lora", "rank": 32},
        "train": {
            "steps": steps,
            "batch_size": 16,
            "learning_rate": 1e-3,
            "schedule": "linear",
            "warmup_steps": 5,
            "adam_eps": 1e-15,
            "caption_dropout": 0.2,
            "seed": seed,
            "save_every": None,
        },
        "sample": {"count": 1, "steps": 1},
        "guard": {"policy": "off"},
    }


def grid(points: int) -> list[dict[str, float]]:
    """Weights from all caption to all style."""
    shares = [place / (points - 1) for place in range(points)]
    return [dict(zip(REWARDS, (1 - share, share), strict=True)) for share in shares]


def judged(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[list[float]]:
    """`[n, 2]`, in the order of MEASURES."""
    found = judges()
    return np.stack([found[name].score(pictures, prompts).numpy() for name in MEASURES], axis=1).tolist()


def weighed_pairs(table: ScoreTable, weights: Mapping[str, float], path: Path) -> Path:
    """Best against worst of each prompt by w·R."""
    total = np.sum([value * table.numbers(CALIBRATED + name) for name, value in weights.items()], axis=0)
    write_comparisons(path, select(table.having({"combined": total}), "best_worst"))
    return path


def under_weights(run: Path, prompts: Sequence[str], points: int, out: Path) -> list[list[list[float]]]:
    """`[M, n, 2]` scores of a steered run's pictures under each of the grid's weights."""
    pipeline = steered(open_checkpoint(run, dtype=torch.bfloat16), run)
    asked, count = grid(points), len(prompts)
    how = SamplerSettings(steps=STEPS, guidance=GUIDANCE, precision="bf16")
    weights = [each for each in asked for _ in prompts]
    paths = write_images(
        out, pipeline, [*prompts] * points, [SEED] * len(weights), how, weights=weights, batch_size=30, progress=False
    )
    pictures = [Image.open(path).convert("RGB") for path in paths]
    return [judged(pictures[start : start + count], prompts) for start in range(0, len(pictures), count)]


class Bench:
    """What all arms share."""

    def __init__(self, work: Path, pool: Path, size: Mapping[str, int]) -> None:
        self.work, self.pool, self.size = work, pool, size
        self.table = scored(pool, size["prompts"], size["draws"])
        self.prompts = held_out_captions(size["captions"])
        self.about: Tree = {**size, "draws_of_w": DRAWS}
        self.started = time.perf_counter()

    def base(self) -> list[list[float]]:
        def make() -> Tree:
            return {"scores": judged(draw(TINY, self.prompts, [SEED], self.work / "base", GUIDANCE), self.prompts)}

        return kept(self.work / "base.json", self.about, make)["scores"]

    def policy(self, name: str, alpha: float, seed: int, form: str = "tokens") -> list[list[list[float]]]:
        """A steered run's scores under all weights."""
        folder = self.work / f"{name}-{seed}"
        steer = {"steer": {"objectives": list(REWARDS), "form": form}}
        recipe = settings(folder / "pairs.jsonl", self.size["steps"], seed, self.pool) | steer

        def make() -> Tree:
            folder.mkdir(parents=True, exist_ok=True)
            table, pairs = self.pool / "scores-calibrated.parquet", folder / "pairs.jsonl"
            runs.select(table, by="steered", objectives=REWARDS, alpha=alpha, draws=DRAWS, out=pairs, seed=seed)
            align(recipe, folder / "run")
            return {"scores": under_weights(folder / "run", self.prompts, self.size["points"], folder / "drawn")}

        return self._kept(folder, {**recipe, "alpha": alpha}, make)

    def single(self, share: float, seed: int) -> list[list[float]]:
        """Scores of a model of its own for one weight of style."""
        folder = self.work / f"single-{share:g}-{seed}"
        recipe = settings(folder / "pairs.jsonl", self.size["steps"], seed, self.pool)

        def make() -> Tree:
            folder.mkdir(parents=True, exist_ok=True)
            weighed_pairs(self.table, dict(zip(REWARDS, (1 - share, share), strict=True)), folder / "pairs.jsonl")
            align(recipe, folder / "run")
            pictures = draw(str(folder / "run"), self.prompts, [SEED], folder / "drawn", GUIDANCE)
            return {"scores": judged(pictures, self.prompts)}

        return self._kept(folder, recipe, make)

    def soups(self, seed: int) -> list[list[list[float]]]:
        """Scores of the means of the two corners' weights."""
        ends = [self.single(0.0, seed), self.single(1.0, seed)]
        folder = self.work / f"soups-{seed}"
        parts = [str(self.work / f"single-{share}-{seed}" / "run") for share in (0, 1)]

        def make() -> Tree:
            found = []
            for place, weights in enumerate(grid(self.size["points"])[1:-1], 1):
                out = folder / str(place)
                shutil.rmtree(out / "run", ignore_errors=True)
                runs.merge(parts, out=out / "run", weights=list(weights.values()))
                found.append(judged(draw(str(out / "run"), self.prompts, [SEED], out / "drawn", GUIDANCE), self.prompts))
            return {"scores": [ends[0], *found, ends[1]]}

        return self._kept(folder, settings(Path("pairs"), self.size["steps"], seed, self.pool), make)

    def _kept(self, folder: Path, recipe: Tree, make: Any) -> Any:
        found = kept(folder / "figures.json", self.about | recipe, make)["scores"]
        means = np.array(found).mean(-2)
        ends = means if means.ndim == 1 else means[[0, -1]]
        print(f"{time.perf_counter() - self.started:6.0f} s  {folder.name}: {np.round(ends, 3).tolist()}", flush=True)
        return found


def measure(bench: Bench, seeds: Sequence[int]) -> Tree:
    """Scores of every arm, `[seeds, M, n, 2]`; of the oracle the M are 0, ORACLES and 1."""
    arms: dict[str, list[Any]] = {}
    base = bench.base()
    for seed in seeds:
        for alpha in ALPHAS:
            arms.setdefault(f"steered, α {alpha:g}", []).append(bench.policy(f"steered-{alpha:g}", alpha, seed))
        arms.setdefault("soups", []).append(bench.soups(seed))
        arms.setdefault("words, α 1", []).append(bench.policy("words-1", 1.0, seed, "prompt"))
        arms.setdefault("oracle", []).append([bench.single(share, seed) for share in (0.0, *ORACLES, 1.0)])
    return {"base": base, "arms": arms, "captions": bench.prompts, "points": bench.size["points"]}


def scaled(base: Array, scores: Any) -> Array:
    """`[seeds, M, n, 2]` -> `[seeds·n, M, 2]`, each objective in standard deviations of the base's pictures, from its mean."""
    found = (np.array(scores) - base.mean(0)) / base.std(0)
    return found.transpose(0, 2, 1, 3).reshape(-1, found.shape[1], 2)


def weights_of(name: str, points: int) -> Array:
    if name == "oracle":
        shares = np.array([0.0, *ORACLES, 1.0])
        return np.stack([1 - shares, shares], axis=1)
    return np.array([list(each.values()) for each in grid(points)])


def page(found: Tree) -> list[str]:
    base = np.array(found["base"])
    start = ((base - base.mean(0)) / base.std(0)).min(0)
    soups = scaled(base, found["arms"]["soups"])
    lines = [
        f"| arm | {' | '.join(f'{name}, w 0 → 1' for name in MEASURES)} | ρ | ρ style | w·s | hypervolume | over soups |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, scores in found["arms"].items():
        values = scaled(base, scores)
        prompts = found["captions"] * (len(values) // len(found["captions"]))
        figures: MultiObjective = multi_objective(values, weights_of(name, found["points"]), prompts, reference=start)
        raw = np.array(scores).mean((0, 2))
        ends = [f"{raw[-1, 0]:.3f} → {raw[0, 0]:.3f}", f"{raw[0, 1]:.3f} → {raw[-1, 1]:.3f}"]
        gain = "" if name == "soups" else _interval(against(soups, values, prompts, start).hypervolume, "+")
        steer = [f"{each.value:.2f}" for each in figures.steerability]
        shown = [*ends, *steer, _interval(figures.mean_inner_product), _interval(figures.hypervolume), gain]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    means = ", ".join(f"{name} {value:.3f}" for name, value in zip(MEASURES, base.mean(0), strict=True))
    return [*lines, "", f"The base: {means}. Seeds: {len(found['arms']['soups'])}; held-out captions: {len(base)}."]


def _interval(found: Any, sign: str = "") -> str:
    return f"{found.value:{sign}.2f} [{found.low:{sign}.2f}, {found.high:{sign}.2f}]"


def main() -> None:
    options = parser().parse_args()
    size = dict(prompts=96, draws=8, steps=100, captions=32, points=11)
    if options.quick:
        size = dict(prompts=4, draws=4, steps=2, captions=3, points=3)
    found = measure(Bench(options.work, options.pool, size), options.seeds)
    lines = page(found)
    publish(PAGE, "mo_odpo", lines, found, quick=options.quick)


def parser() -> argparse.ArgumentParser:
    made = options_of(__doc__, "runs/mo_odpo")
    made.add_argument("--pool", type=Path, default=Path("runs/capo"), help="where the scored pictures are, or will be")
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    return made


if __name__ == "__main__":
    main()
