"""Self-improvement on the emoji: four rounds of `flowalign improve`, and which pairs of a round are worth training on.

    python -m benchmarks.papers.improve [--work runs/paper-improve] [--seeds 0 1] [--full] [--quick]

tiny-sd draws, two rewards of one tower and a formula of colour score, and dpo learns, round after round:

    FRS         pairs across the Pareto fronts (CaPO, Lee et al. 2025, 2502.02588)
    best-worst  the widest pair of each prompt, of which by lot as many are kept as of
    potential   the pairs that rewards tell far apart and the model does not yet (Huang et al. 2025, 2503.01864)
    widest      the baseline of potential: as many, by the rewards' gap alone

The last three train on equally many pairs for equally many steps. Held-out captions are judged by judges that are no rewards.
What is finished in --work is kept.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.papers.stages import Tree, publish
from flowalign import config as configuration
from flowalign import runs
from flowalign.improve_settings import ImproveConfig

PAGE = Path("docs/results/improve.md")
RATIO = 0.5
ARMS: dict[str, Tree] = {
    "FRS": {"by": "frs", "most": 2},
    "best-worst": {"by": "best_worst", "most": 2, "order": "random", "ratio": RATIO},
    "potential": {"by": "best_worst", "most": 2, "order": "potential", "ratio": RATIO},
    "widest": {"by": "best_worst", "most": 2, "order": "explicit", "ratio": RATIO},
}
"""Best against worst, second against second worst: two pairs a prompt, of which the last three keep half."""
SIZES: dict[str, Tree] = {
    "plain": {"rounds": 4, "prompts": 32, "images": 4, "steps": 20, "train": 20, "captions": 30},
    "full": {"rounds": 4, "prompts": 96, "images": 8, "steps": 20, "train": 50, "captions": 120},
    "quick": {"rounds": 2, "prompts": 4, "images": 4, "steps": 2, "train": 2, "captions": 2},
}


def settings(arm: str, seed: int, size: Tree, out: Path) -> ImproveConfig:
    samples = "samples/emoji"
    tree = {
        "model": {"checkpoint": f"{samples}/tiny-sd"},
        "prompts": f"{samples}/preferences/fluent_over_noto-train.jsonl",
        "held_out": f"{samples}/preferences/fluent_over_noto-held_out.jsonl",
        "rounds": size["rounds"],
        "rewards": [f"{samples}/rewards.yaml", "colourfulness"],
        "draw": {
            "prompts": size["prompts"],
            "images": size["images"],
            "steps": size["steps"],
            "guidance": 3.0,
            "batch_size": 24,
            "precision": "bf16",
            "seed": seed,
        },
        "select": ARMS[arm] | {"draws": 16},
        "objective": {"name": "dpo", "beta": 400.0},
        "trainable": {"kind": "lora", "rank": 32},
        "train": {
            "steps": size["train"],
            "batch_size": 16,
            "learning_rate": 3e-4,
            "warmup_steps": 3,
            "caption_dropout": 0.2,
            "seed": seed,
        },
        "evaluate": {"judges": f"{samples}/judges", "prompts": size["captions"]},
        "hacking": {"policy": "warn"},  # every arm gets all its rounds; what would have stopped it is told
        "output": str(out),
    }
    return configuration.parse_tree(ImproveConfig, tree)


def measure(work: Path, seeds: Sequence[int], size: Tree) -> list[Tree]:
    """One entry for each arm and seed, with what every round measured."""
    found, started = [], time.perf_counter()
    for seed in seeds:
        base: Path | None = None
        for arm in ARMS:
            config = settings(arm, seed, size, work / f"{arm}-{seed}")
            run = Path(config.output)
            if base is not None and not (run / "rounds").is_dir():  # all arms of a seed have one base
                shutil.copytree(base / "rounds" / "base", run / "rounds" / "base")
                shutil.copytree(base / "cache", run / "cache")
            result = runs.improve(config, resume=True, progress=False)
            if not result["finished"]:
                raise SystemExit(result["summary"])
            base = base or run
            found.append({"arm": arm, "seed": seed, "base": result["base"], "rounds": result["rounds"], "best": result["best"]})
            print(f"{time.perf_counter() - started:6.0f} s  {arm} {seed}\n{result['summary']}", flush=True)
    return found


def page(found: Sequence[Tree], size: Tree) -> list[str]:
    names = list(found[0]["base"]["measures"])
    lines = [
        f"| arm, seed | round | pairs | {' | '.join(names)} | diversity | alarms |",
        f"|---|---|---|{'---|' * len(names)}---|---|",
    ]
    for each in found:
        for entry in each["rounds"]:
            cells = ["{value:.2f} [{low:.2f}, {high:.2f}]".format(**entry["measures"][name]["calibrated"]) for name in names]
            loud = ", ".join(sign["name"] for sign in entry["signs"] if sign["alarm"]) or "none"
            kept = " (best)" if entry["round"] == each["best"] else ""
            lines.append(
                f"| {each['arm']}, {each['seed']} | {entry['round']}{kept} | {entry['comparisons']} | {' | '.join(cells)} | "
                f"{entry['diversity']['value']:.2f} | {loud} |"
            )
    captions = found[0]["base"]["prompts"]
    return [
        *lines,
        "",
        f"Calibrated win rates over the base on {captions} held-out captions, two pictures each, 95 % intervals over captions; "
        f"the base is 0.50 by definition, its diversity {found[0]['base']['diversity']['value']:.2f}. Each round has "
        f"{size['prompts']} prompts of {size['images']} pictures and {size['train']} steps of 16 pairs. Measures that begin "
        "with `judge` were not trained on.",
    ]


def main() -> None:
    options = parser().parse_args()
    size = SIZES["quick" if options.quick else "full" if options.full else "plain"]
    found = measure(options.work, options.seeds, size)
    lines = page(found, size)
    publish(PAGE, "improve", lines, {"size": size, "runs": found}, quick=options.quick)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    made.add_argument("--work", type=Path, default=Path("runs/paper-improve"), help="where finished parts are kept")
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    kind = made.add_mutually_exclusive_group()
    kind.add_argument("--full", action="store_true", help="three times the prompts, twice the pictures of each")
    kind.add_argument("--quick", action="store_true", help="a smoke test of a few steps; its figures mean nothing")
    return made


if __name__ == "__main__":
    main()
