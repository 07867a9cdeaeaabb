"""The objective league: every objective, and dpo with every switch, on the style pairs with one budget.

    python -m benchmarks.papers.league [--out runs/league] [--names dpo ipo ...] [--seeds 0]

Steps, pairs a step, rate, prompts and draws are the same for all. Strengths are made alike, not tuned: what is logistic has the
β of `dpo`, what aims at a margin aims at Δ = 0.01, the rest keeps its defaults. The table and the figures go to docs/results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.papers.style import Bench, Measured, over, pooled, write_between
from flowalign import plugins
from flowalign.files import write_text

SHARED: dict[str, Any] = {
    "train.steps": 60,
    "train.learning_rate": 5e-4,
    "train.schedule": "linear",
    "train.warmup_steps": 5,
    "train.adam_eps": 1e-15,
    "train.log_every": 20,
    "reference.bank": 1,
}
BETA, MARGIN = 400.0, 0.01
LOGISTIC = (
    *("alpha_dpo", "apo_down", "apo_zero", "beta_dpo", "bpo", "chi_po", "dmpo", "dpo", "dspo", "epsilon_dpo", "exo"),
    *("h_dpo", "kto", "linear_dpo", "mmpo", "nca", "odpo", "opo", "plackett_luce", "rankdpo", "rdpo", "simpo", "tdpo"),
)
AIMING: dict[str, dict[str, float]] = {
    "capo": {"beta": 1 / (2 * MARGIN)},
    "dro": {"slack": 2 * MARGIN},
    "hinge": {"beta": 1 / MARGIN},
    "ipo": {"tau": 1 / (2 * MARGIN)},
    "lair": {"beta": 2 * 0.231 / MARGIN},
    "repo": {"gamma": MARGIN},
    "reward_distillation": {"beta": 1 / MARGIN},
    "slic": {"delta": MARGIN},
    "sppo": {"beta": 1 / MARGIN},
}
OTHERS: dict[str, dict[str, float]] = {
    "mapo": {},
    "nft": {},
    "smpo": {"beta": BETA, "gain": 2.16, "lowest": 0.0, "highest": 1.0},
    "weighted_sft": {},
}
OBJECTIVES: dict[str, dict[str, float]] = {name: {"beta": BETA} for name in LOGISTIC} | AIMING | OTHERS
LEFT_OUT = {
    "all_pairs": "is dpo on pairs",
    "mdpo": "is dpo on pairs",
    "mipo": "needs groups",
    "modpo": "needs a reward beside the votes",
}
LIVE = {"reference.bank": None}
SWITCHES: dict[str, dict[str, Any]] = {
    "dpo, safeguard 0.9": {"switches.safeguard": 0.9},
    "dpo, safeguard 0.5": {"switches.safeguard": 0.5},
    "dpo, winner NLL 10": {"switches.winner_nll": 10.0},
    "dpo, winner NLL 40": {"switches.winner_nll": 40.0},
    "dpo, label smoothing 0.1": {"objective.label_smoothing": 0.1},
    "dpo, min-SNR": {"switches.time_weight": "min_snr"},
    "dpo, sigmoid": {"switches.time_weight": "sigmoid"},
    "dpo, independent noise": {"switches.noise": "independent"},
    "dpo, times 0.4 to 1": {"train.timestep_range": [0.4, 1.0]},
    "dpo, EMA reference": {"reference.kind": "ema", "reference.decay": 0.95, **LIVE},
    "dpo, refreshed reference": {"reference.kind": "refresh", "reference.every": 20, **LIVE},
}
PAIRS = "samples/emoji/preferences/fluent_over_noto-{}.jsonl"


def entries() -> dict[str, dict[str, Any]]:
    """Name in the table: settings."""
    rows: dict[str, dict[str, Any]] = {}
    for name, knobs in sorted(OBJECTIVES.items()):
        held = plugins.load("objectives", name).needs & {"reference", "drift"}
        rows[name] = {"objective": {"name": name, **knobs}} | ({} if held else LIVE)
    return rows | {name: {"objective": {"name": "dpo", "beta": BETA}} | extra for name, extra in SWITCHES.items()}


def graded(folder: Path) -> dict[str, str]:
    """The style pairs with the scores and grades that some objectives read: 1 for the chosen picture, 0 for the rejected."""
    out = {}
    for key, part in (("data.train", "train"), ("data.validation", "held_out")):
        path, source = folder / f"{part}.jsonl", Path(PAIRS.format(part))
        lines = []
        for line in source.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            row |= {side: str((source.parent / row[side]).resolve()) for side in ("chosen", "rejected")}
            lines.append(json.dumps(row | {"scores": {"style": [1.0, 0.0]}, "grades": [1.0, 0.0]}) + "\n")
        write_text(path, "".join(lines))
        out[key] = str(path)
    return out


def interval(estimate: Any, digits: int) -> str:
    """A value with its interval; a difference has its sign."""
    sign = "+" if digits > 2 else ""
    return f"{estimate.value:{sign}.{digits}f} [{estimate.low:{sign}.{digits}f}, {estimate.high:{sign}.{digits}f}]"


def compared(base: Measured, dpo: Measured, run: Measured, prompts: Sequence[str]) -> dict[str, Any]:
    """Everything the table says of a run, against the base and against dpo."""
    style, caption = over(base, run, "style", prompts), over(base, run, "caption", prompts)
    duel, winner, spread = over(dpo, run, "style", prompts), over(dpo, run, "winner"), over(base, run, "diversity")
    return {
        "share": float((np.array(run["style"]) > 0.5).mean()),
        "style": style.win_rate,
        "caption": caption.mean_difference,
        "winner": float(np.mean(run["winner"])),
        "accuracy": float((np.array(run["margin"]) > 0).mean()),
        "drift": float(np.mean(run["drift"])),
        "diversity": spread.mean_difference,
        "duel": duel.win_rate,
        "winner_less": winner.mean_difference,
        "beats_dpo": duel.win_rate.low > 0.5 and winner.mean_difference.high < 0,
    }


COLUMNS = (
    *("", "Fluent share", "style win rate over the base", "caption match − base", "rise of the winner's error"),
    *("held-out accuracy", "drift", "diversity − base", "style win rate over dpo", "winner's error − dpo's"),
)
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def line(name: str, found: dict[str, Any]) -> str:
    bold = "**" if found["beats_dpo"] else ""
    return (
        f"| {bold}{name}{bold} | {found['share']:.2f} | {interval(found['style'], 2)} | {interval(found['caption'], 3)} | "
        f"{found['winner']:+.4f} | {found['accuracy']:.2f} | {found['drift']:.4f} | {interval(found['diversity'], 3)} | "
        f"{interval(found['duel'], 2)} | {interval(found['winner_less'], 4)} |"
    )


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Winner's error against style, both beside dpo's: what is better in both lies at the upper left."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6.5), layout="constrained")
    for name, each in found.items():
        x, y = each["winner_less"].value, each["duel"].value
        axes.plot(x, y, "o", markersize=4, color="tab:green" if each["beats_dpo"] else "tab:gray")
        axes.annotate(name, (x, y), xytext=(4, 2), textcoords="offset points", fontsize=7)
    axes.axhline(0.5, color="black", linewidth=0.6)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set(xlabel="winner's error − dpo's", ylabel="style win rate over dpo")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/league"))
    parser.add_argument("--names", nargs="+", choices=list(entries()), metavar="NAME", help="by default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--page", type=Path, help="write the table into this page too")
    parser.add_argument("--steps", type=int, default=SHARED["train.steps"])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    shared = SHARED | {"train.steps": options.steps} | graded(options.out)
    bench, rows = Bench(options.out, shared), entries()
    names = options.names or list(rows)
    runs = {name: [bench.measure(name, rows[name], seed) for seed in options.seeds] for name in ["dpo", *names]}
    several = len(options.seeds)
    base, dpo = pooled([bench.base] * several), pooled(runs["dpo"])
    found = {name: compared(base, dpo, pooled(runs[name]), bench.prompts * several) for name in names}
    table = [line(name, found[name]) for name in sorted(found, key=lambda name: -found[name]["duel"].value)]
    print("\n".join([HEAD, *table]))
    if options.page:
        write_between(options.page, "league", [HEAD, *table])
        plot(found, options.page.with_name("league.png"))


if __name__ == "__main__":
    main()
