"""MO-ODPO (Gupta et al. 2025, arXiv 2503.00295) on the emoji, its offline form: one policy for all weights of its rewards.

    python -m benchmarks.papers.mo_odpo [--work runs/mo_odpo] [--pool runs/capo] [--seeds 0 1 2] [--full] [--quick]

The pool is tiny-sd's own pictures of train prompts with the calibrated rewards of `benchmarks.papers.capo`, of which two count:
does a picture show its caption, and is it Fluent; then Fluent and colour; then all three. For each prompt weights
w ~ Dirichlet(α·1) are drawn, and the best picture by w·R is chosen against the worst:

    steered    one policy that is told w, trained on weights of each α; `words` is told them in words
    soups      the mean of the weights of a model for each reward, by w
    mixed      the mean of the predictions of the same models, by w
    RiC        one policy that is told a picture's scores in training and, when drawing, what w asks for
    oracle     a model for each w, dpo on the pairs that w chooses

Held-out captions are drawn under 11 w, 10 of three rewards, and judged by judges that are no rewards, and colour by its
formula. Steered with α 1, soups and RiC are run for all seeds, the other arms for the first; for style and colour steered and
soups for all seeds; for three rewards these two and RiC for the first. --full runs each arm for each seed. What is finished in
--work is kept.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.papers import capo
from benchmarks.papers.stages import TINY, Tree, align, draw, kept, options_of, publish, recipe
from flowalign import runs
from flowalign.data.writer import write_comparisons
from flowalign.demo import GUIDANCE, STEPS, held_out_captions
from flowalign.evaluate.compare import mean_with_interval
from flowalign.evaluate.pareto import MultiObjective, against, multi_objective
from flowalign.families.loading import open_checkpoint
from flowalign.families.sampling import SamplerSettings, write_images
from flowalign.families.steer import steered
from flowalign.scoring.comparisons import select
from flowalign.scoring.table import CALIBRATED

ALPHAS = (0.2, 0.5, 1.0, 5.0)
DRAWS = 4
"""Weights of a prompt."""
ORACLES = (0.3, 0.5, 0.7)
"""Weights of the second of two rewards that a model of its own is trained for, beside the two corners."""
SEED = 7
"""Of the pictures that are judged."""
PAGE = Path("docs/results/mo_odpo.md")
Array = NDArray[np.float64]
Scores = list[list[list[float]]]
"""`[M, n, K]`."""


def settings(pairs: Path, steps: int, seed: int, pool: Path, **sections: Tree) -> Tree:
    train = {"learning_rate": 1e-3, "adam_eps": 1e-15}
    more: Tree = {"guard": {"policy": "off"}} | sections  # an arm that collapses is a finding, not an end
    return recipe(pairs, {"name": "dpo", "beta": 400.0}, steps=steps, seed=seed, cache=pool / "cache", train=train, **more)


def lattice(names: Sequence[str], degree: int) -> list[dict[str, float]]:
    """All weights that are multiples of 1/degree, from all on the first reward to all on the last."""
    places = range(degree + len(names) - 1)
    shares = []
    for bars in combinations(places, len(names) - 1):  # stars and bars
        ends = [-1, *bars, len(places)]
        shares.append([right - left - 1 for left, right in pairwise(ends)])
    return [dict(zip(names, (part / degree for part in each), strict=True)) for each in sorted(shares, reverse=True)]


class Bench:
    """What all arms of some rewards share."""

    def __init__(self, work: Path, pool: Path, size: Mapping[str, int], names: Sequence[str], degree: int) -> None:
        self.work, self.pool, self.size, self.names = work, pool, size, tuple(names)
        self.grid = lattice(names, degree)
        self.corners = [dict(zip(names, row, strict=True)) for row in np.eye(len(names)).tolist()]
        self.table = capo.scored(pool, size["prompts"], size["draws"])
        self.prompts = held_out_captions(size["captions"])
        self.about: Tree = {**size, "draws_of_w": DRAWS, "rewards": list(names)}
        self.started = time.perf_counter()

    def judged(self, pictures: Sequence[Image.Image]) -> list[list[float]]:
        """`[n, K]`, by the measure that stands for each reward."""
        found = capo.judged(pictures, self.prompts)
        return np.stack([found[capo.MEASURES[name]] for name in self.names], axis=1).tolist()

    def base(self) -> list[list[float]]:
        return self._kept("base", {}, lambda _: self.judged(draw(TINY, self.prompts, [SEED], self.work / "base", GUIDANCE)))

    def policy(self, name: str, alpha: float, seed: int, form: str = "tokens") -> Scores:
        """A steered run's scores under all weights."""
        steer = {"objectives": list(self.names), "form": form}
        how = self._settings(name, seed, steer=steer)

        def make(folder: Path) -> Scores:
            table, pairs = self.pool / "scores-calibrated.parquet", folder / "pairs.jsonl"
            runs.select(table, by="steered", objectives=self.names, alpha=alpha, draws=DRAWS, out=pairs, seed=seed)
            align(how, folder / "run")
            return self._told(folder, self.grid)

        return self._kept(f"{name}-{seed}", {**how, "alpha": alpha}, make)

    def in_context(self, seed: int) -> Scores:
        """RiC (Yang et al. 2024, 2402.10207): told scores. A w asks for the best twentieth of the pool's scores by a reward
        whose weight is even or above, and for less in proportion below it, down to the worst twentieth."""
        steer = {"objectives": list(self.names), "condition": "scores"}
        how = self._settings("ric", seed, steer=steer) | {"objective": {"name": "sft"}}
        ends = {name: np.quantile(self.table.numbers(CALIBRATED + name), (0.05, 0.95)) for name in self.names}
        asked = [
            {name: float(low + min(1.0, len(self.names) * w[name]) * (high - low)) for name, (low, high) in ends.items()}
            for w in self.grid
        ]

        def make(folder: Path) -> Scores:
            table, pairs = self.pool / "scores-calibrated.parquet", folder / "pairs.jsonl"
            runs.select(table, by="random", most=self.size["draws"], out=pairs, seed=seed)
            align(how, folder / "run")
            return self._told(folder, asked)

        return self._kept(f"ric-{seed}", {**how, "asked": asked}, make)

    def single(self, weights: Mapping[str, float], seed: int) -> list[list[float]]:
        """`[n, K]` of a model of its own for one w."""
        name = self._name(weights)
        how = self._settings(name, seed)

        def make(folder: Path) -> list[list[float]]:
            total = np.sum([share * self.table.numbers(CALIBRATED + name) for name, share in weights.items()], axis=0)
            write_comparisons(folder / "pairs.jsonl", select(self.table.having({"combined": total}), "best_worst"))
            align(how, folder / "run")
            return self.judged(draw(str(folder / "run"), self.prompts, [SEED], folder / "drawn", GUIDANCE))

        return self._kept(f"{name}-{seed}", how, make)

    def soups(self, seed: int) -> Scores:
        """Means of the weights of the corners' models."""

        def one(out: Path, parts: Mapping[str, float]) -> list[Image.Image]:
            shutil.rmtree(out / "run", ignore_errors=True)
            runs.merge(list(parts), out=out / "run", weights=list(parts.values()))
            return draw(str(out / "run"), self.prompts, [SEED], out / "drawn", GUIDANCE)

        return self._between("soups", seed, one)

    def mixed(self, seed: int) -> Scores:
        """Means of the predictions of the corners' models."""

        def one(out: Path, parts: Mapping[str, float]) -> list[Image.Image]:
            return draw(None, self.prompts, [SEED], out / "drawn", GUIDANCE, mix=parts)

        return self._between("mixed", seed, one)

    def oracle(self, shares: Sequence[float], seed: int) -> Scores:
        """A model for each weight of the second of two rewards."""
        first, second = self.names
        return [self.single({first: 1 - share, second: share}, seed) for share in shares]

    def _between(self, name: str, seed: int, one: Callable[[Path, Mapping[str, float]], list[Image.Image]]) -> Scores:
        ends = {self._name(corner): self.single(corner, seed) for corner in self.corners}

        def make(folder: Path) -> Scores:
            found = []
            for place, weights in enumerate(self.grid):
                parts = {
                    str(self.work / f"{self._name(corner)}-{seed}" / "run"): share
                    for corner, share in zip(self.corners, weights.values(), strict=True)
                    if share
                }
                alone = ends.get(self._name(weights))
                found.append(self.judged(one(folder / str(place), parts)) if alone is None else alone)
            return found

        return self._kept(f"{name}-{seed}", self._settings(name, seed), make)

    def _told(self, folder: Path, asked: Sequence[Mapping[str, float]]) -> Scores:
        """Scores of a run's pictures under each of M weights, or for each of M targets."""
        pipeline = steered(open_checkpoint(folder / "run", dtype=torch.bfloat16), folder / "run")
        count, how = len(self.prompts), SamplerSettings(steps=STEPS, guidance=GUIDANCE, precision="bf16")
        told = [each for each in asked for _ in self.prompts]
        prompts, seeds = [*self.prompts] * len(asked), [SEED] * len(told)
        paths = write_images(folder / "drawn", pipeline, prompts, seeds, how, weights=told, batch_size=30, progress=False)
        pictures = [Image.open(path).convert("RGB") for path in paths]
        return [self.judged(pictures[start : start + count]) for start in range(0, len(pictures), count)]

    def _name(self, weights: Mapping[str, float]) -> str:
        return "single-" + "-".join(f"{share:g}" for share in weights.values())

    def _settings(self, name: str, seed: int, **sections: Tree) -> Tree:
        return settings(self.work / f"{name}-{seed}" / "pairs.jsonl", self.size["steps"], seed, self.pool, **sections)

    def _kept(self, name: str, how: Tree, make: Callable[[Path], Any]) -> Any:
        def run() -> Tree:
            (self.work / name).mkdir(parents=True, exist_ok=True)
            return {"scores": make(self.work / name)}

        found = kept(self.work / name / "figures.json", self.about | how, run)["scores"]
        means = np.array(found).mean(-2)
        ends = means if means.ndim == 1 else means[[0, -1]]
        print(f"{time.perf_counter() - self.started:6.0f} s  {name}: {np.round(ends, 3).tolist()}", flush=True)
        return found


def measure(bench: Bench, seeds: Sequence[int], full: bool) -> Tree:
    """Scores of every arm of two rewards, `[seeds, M, n, 2]`; of the oracle the M are 0, ORACLES and 1."""
    arms: dict[str, list[Any]] = {}
    base = bench.base()
    for place, seed in enumerate(seeds):
        whole = full or place == 0
        for alpha in ALPHAS if whole else (1.0,):
            arms.setdefault(f"steered, α {alpha:g}", []).append(bench.policy(f"steered-{alpha:g}", alpha, seed))
        arms.setdefault("soups", []).append(bench.soups(seed))
        arms.setdefault("RiC", []).append(bench.in_context(seed))
        if whole:
            arms.setdefault("mixed", []).append(bench.mixed(seed))
            arms.setdefault("oracle", []).append(bench.oracle((0.0, *ORACLES, 1.0), seed))
            arms.setdefault("words, α 1", []).append(bench.policy("words-1", 1.0, seed, "prompt"))
    return told(bench, base, arms)


def measure_three(bench: Bench, seeds: Sequence[int]) -> Tree:
    arms = {
        "steered, α 1": [bench.policy("steered-1", 1.0, seed) for seed in seeds],
        "soups": [bench.soups(seed) for seed in seeds],
        "RiC": [bench.in_context(seed) for seed in seeds],
    }
    return told(bench, bench.base(), arms)


def measure_colour(bench: Bench, seeds: Sequence[int]) -> Tree:
    arms = {
        "steered, α 1": [bench.policy("steered-1", 1.0, seed) for seed in seeds],
        "soups": [bench.soups(seed) for seed in seeds],
    }
    return told(bench, bench.base(), arms)


def told(bench: Bench, base: list[list[float]], arms: Mapping[str, list[Any]]) -> Tree:
    weights = [list(each.values()) for each in bench.grid]
    return {"base": base, "arms": arms, "captions": bench.prompts, "rewards": list(bench.names), "weights": weights}


def scaled(base: Array, scores: Any) -> Array:
    """`[seeds, M, n, K]` -> `[seeds·n, M, K]`, each objective in standard deviations of the base's pictures, from its mean."""
    found = (np.array(scores) - base.mean(0)) / base.std(0)
    return found.transpose(0, 2, 1, 3).reshape(-1, found.shape[1], found.shape[3])


def weights_of(name: str, found: Tree) -> Array:
    if name == "oracle":
        shares = np.array([0.0, *ORACLES, 1.0])
        return np.stack([1 - shares, shares], axis=1)
    return np.array(found["weights"])


def page(found: Tree) -> list[str]:
    base = np.array(found["base"])
    measures = [capo.MEASURES[name] for name in found["rewards"]]
    start = ((base - base.mean(0)) / base.std(0)).min(0)
    head = [
        "seeds",
        *(f"{name}, w 0 → 1" for name in measures),
        *(f"ρ {name}" for name in measures),
        "w·s",
        "w·s over soups",
        "hypervolume",
        "hypervolume over soups",
    ]
    lines = [f"| arm | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
    for name, scores in found["arms"].items():
        values, asked = scaled(base, scores), weights_of(name, found)
        prompts = found["captions"] * len(scores)
        figures: MultiObjective = multi_objective(values, asked, prompts, reference=start)
        raw = np.array(scores).mean((0, 2))
        ends = [f"{raw[asked[:, k] == 0, k].mean():.3f} → {raw[asked[:, k] == 1, k].mean():.3f}" for k in range(len(measures))]
        soups = scaled(base, found["arms"]["soups"][: len(scores)])  # of the same seeds
        gain = "" if name == "soups" else _interval(against(soups, values, prompts, start).hypervolume, "+")
        more = ""
        if name != "soups" and soups.shape == values.shape:  # the oracle's weights are others
            more = _interval(mean_with_interval(((values - soups) * asked).sum(2).mean(1), prompts), "+")
        steer = [_interval(each) for each in figures.steerability]
        reach = [_interval(figures.mean_inner_product), more, _interval(figures.hypervolume), gain]
        lines.append(f"| {name} | {' | '.join([str(len(scores)), *ends, *steer, *reach])} |")
    means = ", ".join(f"{name} {value:.3f}" for name, value in zip(measures, base.mean(0), strict=True))
    return [*lines, "", f"The base: {means}. Held-out captions: {len(base)}."]


def _interval(found: Any, sign: str = "") -> str:
    return f"{found.value:{sign}.2f} [{found.low:{sign}.2f}, {found.high:{sign}.2f}]"


def main() -> None:
    options = parser().parse_args()
    size, degree = dict(prompts=96, draws=8, steps=100, captions=32), 10
    if options.quick:
        size, degree = dict(prompts=4, draws=4, steps=2, captions=3), 2
    two = measure(Bench(options.work, options.pool, size, capo.NAMES[:2], degree), options.seeds, options.full)
    seeds = options.seeds if options.full else options.seeds[:1]
    three = measure_three(Bench(options.work / "three", options.pool, size, capo.NAMES, min(degree, 3)), seeds)
    colour = measure_colour(Bench(options.work / "style-colour", options.pool, size, capo.NAMES[1:], degree), options.seeds)
    found = {"Caption and style": two, "Style and colour": colour, "Three rewards": three}
    lines = [line for title, each in found.items() for line in (f"{title}:", "", *page(each), "")]
    publish(PAGE, "mo_odpo", lines[:-1], found, quick=options.quick)


def parser() -> argparse.ArgumentParser:
    made = options_of(__doc__, "runs/mo_odpo")
    made.add_argument("--pool", type=Path, default=Path("runs/capo"), help="where the scored pictures are, or will be")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--full", action="store_true", help="every arm for every seed")
    return made


if __name__ == "__main__":
    main()
