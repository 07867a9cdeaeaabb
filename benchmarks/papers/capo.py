"""CaPO (Lee et al. 2025, arXiv 2502.02588) on the emoji: calibrated rewards and pairs from Pareto fronts.

    python -m benchmarks.papers.capo [--work runs/capo] [--seeds 0] [--quick]

tiny-sd draws 8 pictures of each train prompt, three rewards score them (does it show its caption, is it Fluent, how colourful
is it; the last on a scale of its own), pairs are chosen in several ways, and dpo, ipo and capo learn from them:

    SUM   best and worst by the mean of calibrated rewards        FRS   pairs across the Pareto fronts
    SOUP  the mean of three models, one for each reward           raw   best and worst by the plain sum of raw scores

Held-out captions are judged by judges that are no rewards, and colour by its formula, against the base's pictures of the same
seeds. What is finished in --work is kept.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.papers.stages import TINY, Tree, align, draw, judges, kept, options_of, publish, recipe
from flowalign import runs
from flowalign.data.writer import write_comparisons
from flowalign.demo import GUIDANCE, PICTURES, STEPS, held_out_captions
from flowalign.evaluate.compare import compare
from flowalign.families.loading import open_checkpoint
from flowalign.families.sampling import SamplerSettings, write_images
from flowalign.scoring.comparisons import select
from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards.base import Shelf
from flowalign.scoring.table import CALIBRATED, ScoreTable, read_table

REWARDS: list[Any] = ["samples/emoji/rewards.yaml", "colourfulness"]
NAMES = ("emoji_clip", "style", "colourfulness")
MEASURES = {"emoji_clip": "caption_match", "style": "style", "colourfulness": "colourfulness"}
"""Reward: what it is held against on held-out captions."""
LOSSES: dict[str, Tree] = {
    "dpo": {"name": "dpo", "beta": 400.0},
    "ipo": {"name": "ipo", "tau": 50.0},
    "capo": {"name": "capo", "beta": 25.0},
}
"""ipo aims at Δ = 1/(2τ) = 0.01, capo at the difference of calibrated rewards over 2β, 0.01 where that is ½."""
PAGE = Path("docs/results/capo.md")


def settings(pairs: Path, loss: str, steps: int, seed: int, work: Path) -> Tree:
    made = recipe(
        pairs, LOSSES[loss], steps=steps, seed=seed, cache=work / "cache", train={"learning_rate": 5e-4, "adam_eps": 1e-15}
    )
    made["data"]["rewards"] = {"combined": 1.0}
    return made


def scored(work: Path, prompts: int, draws: int) -> ScoreTable:
    """The base's own pictures of train prompts with calibrated scores; temperatures are the spread within a prompt."""
    table = work / "scores-calibrated.parquet"
    if not table.is_file():
        rows = pq.read_table(PICTURES, columns=["caption", "split"]).to_pylist()
        captions = list(dict.fromkeys(row["caption"] for row in rows if row["split"] == "train"))
        chosen = [captions[place * len(captions) // prompts] for place in range(prompts)]
        draw(TINY, chosen, range(draws), work / "drawn", GUIDANCE)
        runs.score(str(work / "drawn"), REWARDS, out=work / "scores.parquet", cache=work / "cache", progress=False)
        runs.calibrate(work / "scores.parquet", out=table)
    return read_table(table)


def selections(table: ScoreTable, work: Path) -> dict[str, Path]:
    """Comparison files by the way that their pairs were chosen."""
    raw = table.having({"combined": np.sum([table.oriented(name) for name in NAMES], axis=0)})
    alone = {name: table.having({"combined": table.numbers(CALIBRATED + name)}) for name in NAMES}
    ways = {"SUM": (table, "best_worst"), "FRS": (table, "frs"), "raw": (raw, "best_worst")}
    ways |= {name: (each, "best_worst") for name, each in alone.items()}
    found = {}
    for way, (scores, by) in ways.items():
        found[way] = work / f"pairs-{way}.jsonl"
        write_comparisons(found[way], select(scores, by))
    return found


def judged(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tree:
    """Scores by measure, a list of one entry a picture."""
    (colour,) = load_rewards(["colourfulness"], Shelf(torch.device("cpu")))
    found = {name: judge.score(pictures, prompts).tolist() for name, judge in judges().items()}
    return found | {"colourfulness": colour.score(pictures, prompts).tolist()}


def soup(models: Sequence[Path], prompts: Sequence[str], seed: int, out: Path) -> list[Image.Image]:
    """Pictures of the mean of several LoRAs' changes to the weights."""
    pipeline = open_checkpoint(TINY, dtype=torch.bfloat16)
    names = [f"model{number}" for number in range(len(models))]
    for name, folder in zip(names, models, strict=True):
        pipeline.load_lora_weights(folder / "weights", adapter_name=name)
    pipeline.set_adapters(names, [1 / len(names)] * len(names))
    how = SamplerSettings(steps=STEPS, guidance=GUIDANCE, precision="bf16")
    paths = write_images(out, pipeline, prompts, [seed] * len(prompts), how, generator="soup", batch_size=30, progress=False)
    return [Image.open(path).convert("RGB") for path in paths]


def measure(work: Path, seeds: Sequence[int], *, prompts: int, draws: int, steps: int, captions: int) -> Tree:
    """Scores on held-out captions by arm, the base's among them; `{arm: [one for each seed]}`."""
    started = time.perf_counter()
    table = scored(work, prompts, draws)
    files, shown = selections(table, work), held_out_captions(captions)
    about = {"prompts": prompts, "draws": draws, "captions": captions}
    base = kept(work / "base.json", about, lambda: judged(draw(TINY, shown, [7], work / "base", GUIDANCE), shown))
    arms: dict[str, list[Tree]] = {"base": [base]}

    def trained(loss: str, way: str, seed: int) -> Path:
        folder = work / f"{loss}-{way}-{seed}"
        align(settings(files[way], loss, steps, seed, work), folder / "run")
        return folder / "run"

    for seed in seeds:
        for loss, way in [(loss, way) for loss in LOSSES for way in ("SUM", "SOUP", "FRS")] + [("dpo", "raw")]:
            folder = work / f"{loss}-{way}-{seed}"
            how = settings(Path("pairs"), loss, steps, seed, work)

            def make(loss: str = loss, way: str = way, seed: int = seed, folder: Path = folder) -> Tree:
                if way == "SOUP":
                    parts = [trained(loss, name, seed) for name in NAMES]
                    return judged(soup(parts, shown, 7, folder / "drawn"), shown)
                return judged(draw(str(trained(loss, way, seed)), shown, [7], folder / "drawn", GUIDANCE), shown)

            found = kept(folder / "figures.json", about | how, make)
            arms.setdefault(f"{loss} {way}", []).append(found)
            rates = " ".join(f"{name} {rate(base, [found], name).win_rate.value:.2f}" for name in NAMES)
            print(f"{time.perf_counter() - started:6.0f} s  {loss} {way} {seed}: {rates}", flush=True)
    pairs = {way: sum(1 for _ in path.open()) for way, path in files.items()}
    correlation = np.corrcoef(np.stack([table.raw(name) for name in NAMES]))
    spread = {name: float(table.raw(name).std()) for name in NAMES}
    return {"arms": arms, "pairs": pairs, "correlation": correlation.tolist(), "spread": spread, "captions": shown}


def rate(base: Tree, arm: Sequence[Tree], reward: str) -> Any:
    """Win rate against the base by the measure of a reward, with its interval; pictures of all seeds, prompts resampled."""
    name = MEASURES[reward]
    ours = [score for each in arm for score in each[name]]
    return compare(base[name] * len(arm), ours, groups=list(range(len(base[name]))) * len(arm))


def page(found: Tree) -> list[str]:
    lines = ["| loss and pairs | caption match | Fluent | colour | worst of the three |", "|---|---|---|---|---|"]
    base = found["arms"]["base"][0]
    for name, arm in found["arms"].items():
        if name != "base":
            rates = [rate(base, arm, reward).win_rate for reward in NAMES]
            cells = [f"{each.value:.2f} [{each.low:.2f}, {each.high:.2f}]" for each in rates]
            lines.append(f"| {name} | {' | '.join(cells)} | {min(each.value for each in rates):.2f} |")
    spread = ", ".join(f"{name} {value:.3g}" for name, value in found["spread"].items())
    pairs = ", ".join(f"{way} {count}" for way, count in found["pairs"].items())
    (a, b, c) = (found["correlation"][i][j] for i, j in ((0, 1), (0, 2), (1, 2)))
    return [
        *lines,
        "",
        f"Spread of the raw scores: {spread}. Correlations: caption and style {a:+.2f}, caption and colour {b:+.2f}, style and "
        f"colour {c:+.2f}. Pairs: {pairs}.",
    ]


def main() -> None:
    options = parser().parse_args()
    size = dict(prompts=96, draws=8, steps=50, captions=60)
    if options.quick:
        size = dict(prompts=4, draws=4, steps=2, captions=2)
    found = measure(options.work, options.seeds, **size)
    lines = page(found)
    publish(PAGE, "capo", lines, found, quick=options.quick)


def parser() -> argparse.ArgumentParser:
    made = options_of(__doc__, "runs/capo")
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    return made


if __name__ == "__main__":
    main()
