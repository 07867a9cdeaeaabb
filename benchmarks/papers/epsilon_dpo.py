"""ε-DPO's claim (Lee et al. 2025, 2502.13177): at equal distance from the reference, ε-DPO ≥ DPO ≥ TR-DPO in what is preferred.

    python -m benchmarks.papers.epsilon_dpo [--out runs/epsilon-dpo] [--seeds 0]

Each method is trained on the style pairs with one budget at every β of a grid, and lands somewhere on a frontier: style score
on held-out captions against drift, the mean squared distance of its predictions from the base's on held-out
pairs. Frontiers are compared at equal drift, by straight lines between their points, with a bootstrap over prompts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.papers.style import Bench, Measured, write_between

BETAS = (100.0, 200.0, 400.0, 800.0)
SHARED: dict[str, Any] = {
    "train.steps": 60,
    "train.learning_rate": 5e-4,
    "train.schedule": "linear",
    "train.warmup_steps": 5,
    "train.log_every": 10,
    "reference.bank": 1,
}
METHODS: dict[str, dict[str, Any]] = {
    "DPO": {"objective.name": "dpo"},
    "ε-DPO": {"objective.name": "epsilon_dpo"},
    "β-DPO": {"objective.name": "beta_dpo"},
    "TR-DPO": {"objective.name": "dpo", "reference.bank": None, "reference.kind": "refresh", "reference.every": 15},
}
"""TR-DPO replaces its reference three times before the end."""
CLAIMS = (("ε-DPO", "DPO"), ("DPO", "TR-DPO"), ("ε-DPO", "TR-DPO"), ("β-DPO", "DPO"))
RESAMPLES, LEVELS = 2000, 5
TICKS = (0.003, 0.006, 0.01, 0.02, 0.04)


@dataclass(frozen=True)
class Frontier:
    """A method at the n β of the grid."""

    drift: NDArray[np.float64]
    """`[n]`"""
    rewards: NDArray[np.float64]
    """`[n, P]` by prompt"""


def rewards(run: Measured, prompts: Sequence[str]) -> NDArray[np.float64]:
    """`[P]` the mean style score of each prompt's pictures."""
    scores, names = np.array(run["style"]), list(dict.fromkeys(prompts))
    return np.array([scores[[each == name for each in prompts]].mean() for name in names])


def at(drifts: NDArray[np.float64], rewards: NDArray[np.float64], levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """A frontier's rewards at these drifts: points `[..., n]` joined by straight lines over log drift -> `[..., L]`."""
    order = np.argsort(drifts)
    x, wanted = np.log(drifts[order]), np.log(levels)
    right = np.searchsorted(x, wanted).clip(1, len(x) - 1)
    share = (wanted - x[right - 1]) / (x[right] - x[right - 1])
    along = rewards[..., order]
    return (1 - share) * along[..., right - 1] + share * along[..., right]


def frontiers(bench: Bench, runs: Mapping[str, list[list[Measured]]]) -> dict[str, Frontier]:
    """Of each method, means over seeds."""
    out = {}
    for name, grid in runs.items():
        drift = np.array([np.mean([np.mean(run["drift"]) for run in seeds]) for seeds in grid])
        reward = np.array([np.mean([rewards(run, bench.prompts) for run in seeds], axis=0) for seeds in grid])
        out[name] = Frontier(drift, reward)
    return out


def claims(found: Mapping[str, Frontier]) -> dict[str, Any]:
    """Differences of rewards at drifts that all methods span: per level and their mean, with 95 % intervals over prompts."""
    low = max(each.drift.min() for each in found.values())
    high = min(each.drift.max() for each in found.values())
    levels = np.exp(np.linspace(np.log(low), np.log(high), LEVELS))
    rng, prompts = np.random.default_rng(0), next(iter(found.values())).rewards.shape[1]
    counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES) / prompts
    curves = {
        name: (at(each.drift, each.rewards.mean(1), levels), at(each.drift, counts @ each.rewards.T, levels))
        for name, each in found.items()
    }
    out: dict[str, Any] = {"drift": levels.tolist()}
    for left, right in CLAIMS:
        value, resampled = curves[left][0] - curves[right][0], curves[left][1] - curves[right][1]
        resampled = np.concatenate([resampled, resampled.mean(1, keepdims=True)], axis=1)
        bounds = np.quantile(resampled, [0.025, 0.975], axis=0)
        values = [*value, value.mean()]
        out[f"{left} − {right}"] = [[float(v), float(a), float(b)] for v, a, b in zip(values, *bounds, strict=True)]
    return out


def moved(run: Measured) -> str:
    """How β went, where it did: first to last, and the shares of pairs that raised and lowered it over the whole run."""
    rows = [row for row in run["trace"] if "train/carried/beta" in row]
    if not rows:
        return "fixed"
    said = f"{rows[0]['train/carried/beta']:.0f} → {rows[-1]['train/carried/beta']:.0f}"
    if "train/observed/raised" in rows[0]:
        raised, lowered = (np.mean([row[f"train/observed/{key}"] for row in rows]) for key in ("raised", "lowered"))
        said += f", raised by {raised:.0%}, lowered by {lowered:.0%}"
    return said


def table(bench: Bench, runs: Mapping[str, list[list[Measured]]]) -> list[str]:
    columns = (
        "method",
        "β",
        "style score",
        "drift",
        "rise of the winner's error",
        "held-out accuracy",
        "β as it went",
    )
    lines = [f"| {' | '.join(columns)} |", f"{'|---' * len(columns)}|"]
    for name, grid in runs.items():
        for beta, seeds in zip(BETAS, grid, strict=True):
            rate = np.mean([rewards(run, bench.prompts).mean() for run in seeds])
            drift, winner = (np.mean([np.mean(run[key]) for run in seeds]) for key in ("drift", "winner"))
            accuracy = np.mean([(np.array(run["margin"]) > 0).mean() for run in seeds])
            lines.append(
                f"| {name} | {beta:g} | {rate:.3f} | {drift:.4f} | {winner:+.4f} | {accuracy:.2f} | {moved(seeds[0])} |"
            )
    return lines


def verdicts(found: Mapping[str, Any]) -> list[str]:
    head = "| difference of style scores at drift | " + " | ".join(f"{level:.4f}" for level in found["drift"]) + " | mean |"
    lines = [head, "|---" * (LEVELS + 2) + "|"]
    for name, row in found.items():
        if name != "drift":
            lines.append(f"| {name} | " + " | ".join(f"{v:+.3f} [{a:+.3f}, {b:+.3f}]" for v, a, b in row) + " |")
    return lines


def plot(found: Mapping[str, Frontier], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for (name, each), look in zip(found.items(), ("o-", "s-", "^-", "d--"), strict=True):
        order, error = np.argsort(each.drift), each.rewards.std(1, ddof=1) / np.sqrt(each.rewards.shape[1])
        axes.errorbar(
            each.drift[order], each.rewards.mean(1)[order], 1.96 * error[order], fmt=look, label=name, capsize=2, markersize=5
        )
    axes.set(xscale="log", xlabel="drift from the base on held-out pairs", ylabel="style score of held-out captions")
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/epsilon-dpo"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--page", type=Path, help="write the tables into this page, and the plot and the figures beside it")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.out, SHARED)
    runs: dict[str, list[list[Measured]]] = {name: [[] for _ in BETAS] for name in METHODS}
    for seed in options.seeds:
        for place, beta in enumerate(BETAS):
            for name, settings in METHODS.items():
                objective = {"name": settings["objective.name"], "beta": beta}
                rest = {key: value for key, value in settings.items() if key != "objective.name"}
                runs[name][place].append(bench.measure(f"{name} {beta:g}", {"objective": objective, **rest}, seed))
    found = frontiers(bench, runs)
    said = claims(found)
    rows, differences = table(bench, runs), verdicts(said)
    print("\n".join([*rows, "", *differences]))
    if options.page:
        write_between(options.page, "runs", rows)
        write_between(options.page, "frontiers", differences)
        plot(found, options.page.with_suffix(".png"))
        options.page.with_suffix(".json").write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
