"""Alignment potential (Huang et al. 2025, arXiv 2503.01864): which 40 % of the pairs are worth training on.

    python -m benchmarks.papers.potential [--work runs/potential] [--pool runs/capo] [--seeds 0 1 2] [--quick]

The pool is tiny-sd's own pictures of train prompts with the calibrated rewards of `benchmarks.papers.capo`. Pairs are drawn by
lot, four a prompt, and labelled by the mean of the rewards. Of these, 40 % are kept by one of the orders

    random     explicit: widest gap of rewards     implicit: smallest |l_w − l_l| of the model     potential: both, z-scored

or all are (full). Each set trains dpo for the same number of steps, as it is and with 20 % of its votes turned around; a vote
is turned after the choice, so the gap says nothing of it. Held-out captions are judged as there. What is finished in --work
is kept.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.papers.capo import MEASURES, judged, scored, settings
from benchmarks.papers.stages import TINY, Tree, align, draw, kept, options_of, publish
from flowalign import runs
from flowalign.demo import GUIDANCE, held_out_captions
from flowalign.evaluate.compare import mean_with_interval

ORDERS = ("full", "random", "explicit", "implicit", "potential")
RATIO = 0.4
NOISE = (0.0, 0.2)
PAGE = Path("docs/results/potential.md")


def subsets(pool: Path, work: Path, seed: int, *, pairs: int, panel: int) -> dict[str, Path]:
    """Comparison files by order; the lot of the pairs, and of those kept at random, belongs to the seed."""
    drawn, full = work / f"drawn-{seed}.jsonl", work / f"full-{seed}.jsonl"
    if not full.is_file():
        runs.select(pool / "scores-calibrated.parquet", by="random", most=pairs, out=drawn, seed=seed)
        runs.margins(TINY, str(drawn), draws=panel, precision="bf16", cache=pool / "cache", out=full, progress=False)
    found = {"full": full}
    for order in ORDERS[1:]:
        found[order] = work / f"{order}-{seed}.jsonl"
        runs.select(full, by=order, ratio=RATIO, out=found[order], seed=seed)
    return found


def measure(work: Path, pool: Path, seeds: Sequence[int], *, size: Mapping[str, int], pairs: int, panel: int) -> Tree:
    """Scores of held-out captions by order and share of turned votes, one entry a seed."""
    started = time.perf_counter()
    scored(pool, size["prompts"], size["draws"])
    shown = held_out_captions(size["captions"])
    about: Tree = {**size, "pairs": pairs, "panel": panel}
    base = kept(work / "base.json", about, lambda: judged(draw(TINY, shown, [7], work / "base", GUIDANCE), shown))
    arms: dict[str, list[Tree]] = {}
    counts: dict[str, int] = {}
    for seed in seeds:
        files = subsets(pool, work, seed, pairs=pairs, panel=panel)
        counts |= {order: sum(1 for _ in path.open()) for order, path in files.items()}
        for noise in NOISE:
            for order in ORDERS:
                how = settings(files[order], "dpo", size["steps"], seed, pool) | {"switches": {"label_noise": noise}}
                folder = work / f"{order}-{noise}-{seed}"

                def make(how: Tree = how, folder: Path = folder) -> Tree:
                    align(how, folder / "run")
                    return judged(draw(str(folder / "run"), shown, [7], folder / "drawn", GUIDANCE), shown)

                found = kept(folder / "figures.json", about | how, make)
                arms.setdefault(f"{order} {noise:g}", []).append(found)
                print(f"{time.perf_counter() - started:6.0f} s  {order} {noise:g} {seed}: {np.mean(wins(base, found)):.3f}")
    return {"base": base, "arms": arms, "pairs": counts}


def wins(base: Tree, arm: Tree) -> NDArray[np.float64]:
    """`[P]` in [0, 1], of each held-out caption the share of the measures by which the arm's picture beats the base's."""
    signs = [np.sign(np.array(arm[name]) - np.array(base[name])) for name in MEASURES.values()]
    return 0.5 + 0.5 * np.mean(signs, axis=0)


def page(found: Tree) -> list[str]:
    """A table: win rate by order, and how much better than a choice by lot of the same seeds."""
    base, arms = found["base"], found["arms"]
    lines = ["| kept | pairs | win rate | over random | win rate, 20 % turned | over random |", "|---|---|---|---|---|---|"]
    for order in ORDERS:
        cells = []
        for noise in NOISE:
            won, lot = (np.concatenate([wins(base, each) for each in arms[f"{name} {noise:g}"]]) for name in (order, "random"))
            places = list(range(len(base[MEASURES["style"]]))) * len(arms[f"{order} {noise:g}"])
            rate, over = mean_with_interval(won, places), mean_with_interval(won - lot, places)
            cells.append(f"{rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}]")
            cells.append("" if order == "random" else f"{over.value:+.3f} [{over.low:+.3f}, {over.high:+.3f}]")
        lines.append(f"| {order} | {found['pairs'][order]} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    options = parser().parse_args()
    size, pairs, panel = dict(prompts=96, draws=8, steps=50, captions=60), 4, 16
    if options.quick:
        size, pairs, panel = dict(prompts=4, draws=4, steps=2, captions=2), 2, 2
    found = measure(options.work, options.pool, options.seeds, size=size, pairs=pairs, panel=panel)
    lines = page(found)
    publish(PAGE, "potential", lines, found, quick=options.quick)


def parser() -> argparse.ArgumentParser:
    made = options_of(__doc__, "runs/potential")
    made.add_argument("--pool", type=Path, default=Path("runs/capo"), help="where the scored pictures are, or will be")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return made


if __name__ == "__main__":
    main()
