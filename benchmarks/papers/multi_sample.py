"""Multi-sample preference optimisation (Wang et al. 2024, arXiv 2410.12138) on the emoji: de-biasing, and label noise.

    python -m benchmarks.papers.multi_sample [--work runs/multi_sample] [--seeds 0] [--only tones noise] [--quick]
    python -m benchmarks.papers.multi_sample --only strengths

The second compares strengths of the losses on train prompts that no vote was about; STRENGTHS holds what it found.

What is finished in --work is kept: a call that was stopped goes on where it was. Figures go to docs/results, or with
--quick, which is a smoke test, into --work.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.papers import groups, tones
from benchmarks.papers.multi_sample_page import write_page
from benchmarks.papers.stages import TINY, Tree, align, draw, judges, kept, write_rows
from flowalign.demo import GUIDANCE, held_out_captions
from flowalign.files import write_text

STYLE_PAIRS = Path("samples/emoji/preferences/fluent_over_noto-train.jsonl")
HELD_OUT_PAIRS = "samples/emoji/preferences/fluent_over_noto-held_out.jsonl"
STYLES = ("3d fluent emoji", "flat noto emoji")  # how tiny-sd was told the style while it was pretrained
PICTURES = 30
"""Pictures in a step, in whatever groups they come: 15 pairs, 5 groups of 3 against 3, or 3 of 5 against 5."""
STYLE_BETA = 400.0
STRENGTHS = {"dpo": 1000.0, "ipo": 75.0, "mdpo": 4000.0, "mipo": 300.0, "all_pairs": 1000.0}
"""β, for ipo and mipo τ: of those of TRIED the one with the highest index on prompts kept for tuning."""
TRIED = {"beta": (1000.0, 2000.0, 4000.0), "tau": (75.0, 150.0, 300.0)}
LOST_CAPTION = 0.03
"""A strength that loses more caption match than this is not chosen."""
UNGUIDED = 1.0
"""Guidance of the pictures whose tones are counted: at 3 all seeds of a prompt come out in one tone."""
BIASED = ((0, 0, 0, 1, 2), (0, 0, 0, 3, 4))
"""Tones that the biased base is shown of every concept."""
LAW = (0.6, 0.1, 0.1, 0.1, 0.1)
"""Shares of the tones, light first, that BIASED shows, and by which the groups are drawn."""
RATES = (0.0, 0.4, 0.2, 0.3, 0.1)
Done = Callable[[str], None]


@dataclass(frozen=True)
class Size:
    """How large the experiment is."""

    base_steps: int
    concepts: int
    """Train concepts that votes on tones are about, at most; there are about 120."""
    prompts: int
    """Train prompts whose styles are compared."""
    tone_steps: int
    style_steps: int
    people: int
    """Held-out prompts of people and hands."""
    tuning: int
    """Train prompts of people that no vote is about."""
    draws: int
    """Pictures of each."""
    captions: int
    """Held-out captions whose style is judged."""


FULL = Size(base_steps=150, concepts=200, prompts=60, tone_steps=30, style_steps=35, people=45, tuning=30, draws=8, captions=60)
QUICK = Size(base_steps=2, concepts=3, prompts=3, tone_steps=2, style_steps=2, people=2, tuning=2, draws=2, captions=2)


@dataclass(frozen=True)
class Arm:
    """One way to learn from the same pictures."""

    name: str
    objective: Tree
    k: int


def knob(objective: str) -> str:
    """What the strength of an objective is called."""
    return "tau" if objective in ("ipo", "mipo") else "beta"


def arm(objective: str, k: int, strength: float | None = None, **knobs: str) -> Arm:
    """An arm of the de-biasing, at the strength of its objective or at another one, which is then in its name."""
    name = "-".join([objective, *([str(k)] if k > 1 else []), *knobs.values(), *([f"{strength:g}"] if strength else [])])
    return Arm(name, {"name": objective, knob(objective): strength or STRENGTHS[objective], **knobs}, k)


DEBIAS = (
    arm("dpo", 1),
    arm("ipo", 1),
    arm("mdpo", 3),
    arm("mdpo", 5),
    arm("mipo", 3),
    arm("mipo", 5),
    arm("mipo", 5, estimator="plug_in"),
    arm("all_pairs", 5),
)


def spread(values: Sequence[str], count: int) -> list[str]:
    """`count` of them, evenly."""
    count = min(count, len(values))
    return [values[place * len(values) // count] for place in range(count)]


def settings(checkpoint: str, comparisons: Path, arm: Arm, steps: int, seed: int, work: Path) -> Tree:
    """The configuration of an arm, without its output."""
    return {
        "model": {"checkpoint": checkpoint},
        "data": {"train": str(comparisons), "held_out": 0.0, "cache": str(work / "cache")},
        "objective": arm.objective,
        "trainable": {"kind": "lora", "rank": 32},
        "train": {
            "steps": steps,
            "batch_size": PICTURES // (2 * arm.k),
            "learning_rate": 6e-4,
            "warmup_steps": 5,
            "adam_eps": 1e-15,  # the losses of ipo and mipo are of order 1/τ²
            "caption_dropout": 0.2,
            "seed": seed,
            "save_every": None,
            "validation_draws": 1,
        },
        "sample": {"count": 1, "steps": 1},
    }


# ------------------------------------------------------------------------------------------------ de-biasing
@cache
def known() -> list[tones.Drawing]:
    return tones.drawings()


@cache
def tone_judge() -> tones.ToneJudge:
    return tones.fit_judge(known())


def by_caption(drawings: Sequence[tones.Drawing]) -> dict[str, dict[int, str]]:
    """Where the drawing in each tone lies, as comparison files name it."""
    table: dict[str, dict[int, str]] = {}
    for each in drawings:
        table.setdefault(each.caption, {})[each.tone] = str(Path(tones.SAMPLES, each.place).resolve())
    return table


def biased_base(work: Path, size: Size) -> str:
    """tiny-sd with all weights trained on people in the tones of BIASED: a checkpoint."""
    table = by_caption([each for each in known() if each.split == "train"])
    yellow = tones.TONES.index("yellow")
    rows = [
        # weighted_sft learns from pictures whose score stands out: the chosen five, and not the last one.
        {"prompt": caption, "chosen": [places[tone] for tone in shown], "rejected": places[yellow]}
        | {"scores": {"shown": [1] * len(shown) + [0]}}
        for caption, places in table.items()
        for shown in BIASED
    ]
    arm = Arm("base", {"name": "weighted_sft"}, 5)
    tree = settings(TINY, write_rows(work / "base.jsonl", rows), arm, size.base_steps, 0, work)
    tree |= {"trainable": {"kind": "full"}, "switches": {"noise": "independent"}}
    tree["train"] |= {"batch_size": 8, "learning_rate": 2e-4, "schedule": "linear", "caption_dropout": 0.1}
    kept(work / "base" / "done.json", tree, lambda: align(tree, work / "base" / "run"))
    return str(work / "base" / "run")


def tone_votes(work: Path, size: Size, seed: int) -> dict[int, Path]:
    """Comparison files for k = 1, 3, 5, which name equally many pictures. Pairs are those of the groups of 5."""
    rows: dict[int, list[Tree]] = {1: [], 3: [], 5: []}
    for prompt, places in list(by_caption([each for each in known() if each.voted_on]).items())[: size.concepts]:
        votes = {k: groups.diversity_votes(LAW, k, 30 // k, seed, prompt) for k in (3, 5)}
        votes[1] = groups.matched_pairs(votes[5])
        for k, sides in votes.items():
            rows[k] += [
                {"prompt": prompt, "chosen": [places[tone] for tone in chosen], "rejected": [places[tone] for tone in rejected]}
                for chosen, rejected in sides
            ]
    return {k: write_rows(work / f"tones-{k}-{seed}.jsonl", each) for k, each in rows.items()}


def people(size: Size) -> list[str]:
    """Held-out prompts of people and hands."""
    return spread(list(dict.fromkeys(each.caption for each in known() if each.split == "held_out")), size.people)


def for_tuning(size: Size) -> list[str]:
    """Train prompts of people and hands that no vote is about."""
    voted = {each.caption for each in known() if each.voted_on}
    captions = dict.fromkeys(each.caption for each in known() if each.split == "train" and each.caption not in voted)
    return spread(list(captions), size.tuning)


def judged_tones(source: str, out: Path, size: Size, prompts: Sequence[str]) -> Tree:
    """Tones and caption match of what a model draws: lists of one entry per picture, prompt by prompt."""
    pictures = draw(source, prompts, range(size.draws), out, UNGUIDED)
    told = [prompt for prompt in prompts for _ in range(size.draws)]
    match = judges()["caption_match"].score(pictures, told).tolist()
    return {"prompts": list(prompts), "tones": tone_judge()(pictures), "caption_match": match}


def tone_tree(base: str, files: dict[int, Path], arm: Arm, size: Size, seed: int, work: Path) -> Tree:
    tree = settings(base, files[arm.k], arm, size.tone_steps, seed, work)
    tree["train"] |= {"timestep_range": [0.5, 1.0], "learning_rate": 3e-4}  # the times at which a tone is decided
    return tree


def drawn_by(
    arms: Sequence[Arm], work: Path, size: Size, seed: int, prompts: list[str], kind: str, done: Done
) -> dict[str, Tree]:
    """What the biased base and every arm draw of the prompts, by name; `kind` names the prompts."""
    base = biased_base(work, size)
    done("biased base")
    about = {"prompts": prompts, "draws": size.draws, "guidance": UNGUIDED}

    def judged(source: str, folder: Path) -> Tree:
        return judged_tones(source, folder / kind, size, prompts)

    found = {"base": kept(work / "base" / f"{kind}.json", about, lambda: judged(base, work / "base"))}
    files = tone_votes(work, size, seed)
    for arm in arms:
        folder = work / "tones" / f"{arm.name}-{seed}"
        tree = tone_tree(base, files, arm, size, seed, work)

        def make(tree: Tree = tree, folder: Path = folder) -> Tree:
            learned = align(tree, folder / "run")
            return judged(str(folder / "run"), folder) | {"learned": learned}

        found[arm.name] = kept(folder / f"{kind}.json", tree | about, make)
        done(f"{arm.name}, seed {seed}: index {mean_index(found[arm.name], size.draws):.3f} on {kind} prompts")
    return found


def debias(work: Path, size: Size, seeds: Sequence[int], done: Done) -> Tree:
    each = [drawn_by(DEBIAS, work, size, seed, people(size), "held_out", done) for seed in seeds]
    arms = {name: [found[name] for found in each] for name in each[0]}
    return {"judge": tone_judge().accuracy, "arms": arms | {"base": arms["base"][:1]}, "draws": size.draws}


def strengths(work: Path, size: Size, done: Done) -> Tree:
    """Index and caption match at every strength tried, on prompts kept for that, and the best."""
    found: Tree = {}
    for objective, k in (("dpo", 1), ("ipo", 1), ("mdpo", 5), ("mipo", 5), ("all_pairs", 5)):
        arms = [arm(objective, k, strength) for strength in TRIED[knob(objective)]]
        drawn = drawn_by(arms, work, size, 0, for_tuning(size), "tuning", done)
        match = {name: float(np.mean(each["caption_match"])) for name, each in drawn.items()}
        found |= {
            name: {"index": mean_index(each, size.draws), "caption_match": match[name] - match["base"]}
            for name, each in drawn.items()
        }
        fit = [arm.name for arm in arms if found[arm.name]["caption_match"] > -LOST_CAPTION] or [arms[-1].name]
        done(f"{objective}: best {max(fit, key=lambda name: found[name]['index'])}")
    return found


def mean_index(figures: Tree, draws: int) -> float:
    shown = figures["tones"]
    each = [groups.simpson(shown[start : start + draws]) for start in range(0, len(shown), draws)]
    return sum(each) / len(each)


# ------------------------------------------------------------------------------------------------ label noise
def style_pool(work: Path, size: Size) -> list[tuple[str, list[tuple[str, str]]]]:
    """Five (Fluent, Noto) pairs for each of some train prompts: the drawings' own, and four that tiny-sd drew by name."""
    lines = [json.loads(line) for line in STYLE_PAIRS.read_text().splitlines()]
    rows = {row["prompt"]: row for row in lines}
    prompts, seeds = spread(list(rows), size.prompts), range(4)
    named = [f"{prompt}, {style}" for prompt in prompts for style in STYLES]
    folder = work / "styles" / "pictures"
    draw(TINY, named, seeds, folder, GUIDANCE)
    pool = []
    for number, prompt in enumerate(prompts):
        own = tuple(str((STYLE_PAIRS.parent / rows[prompt][side]).resolve()) for side in ("chosen", "rejected"))
        drawn = [
            tuple(
                str((folder / f"{(2 * number + style) * len(seeds) + seed:05d}-{seed}.png").resolve())
                for style in range(len(STYLES))
            )
            for seed in seeds
        ]
        pool.append((prompt, [own, *drawn]))
    return pool


def style_votes(pool: Sequence[tuple[str, list[tuple[str, str]]]], k: int, rate: float, seed: int, whole: bool) -> list[Tree]:
    """Groups of k of a prompt's pairs, where each vote was turned round with probability `rate`: pairs', or whole groups'."""
    rows = []
    for prompt, pairs in pool:
        for ring in groups.rings(len(pairs), k):
            names = [(prompt, *ring)] * k if whole else [(prompt, place) for place in ring]
            turned = [groups.flipped(rate, seed, *name) for name in names]
            sides = [pairs[place][::-1] if turn else pairs[place] for place, turn in zip(ring, turned, strict=True)]
            chosen, rejected = zip(*sides, strict=True)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def judged_style(source: str, out: Path, size: Size) -> Tree:
    prompts = held_out_captions(size.captions)
    pictures = draw(source, prompts, [0], out, GUIDANCE)
    return {name: judge.score(pictures, prompts).tolist() for name, judge in judges().items()}


def label_noise(work: Path, size: Size, seeds: Sequence[int], done: Done) -> Tree:
    pool = style_pool(work, size)
    done("pool of styles")
    about = {"captions": size.captions}
    found: list[Tree] = []
    base = kept(work / "styles" / "base.json", about, lambda: judged_style(TINY, work / "styles" / "drawn", size))
    grid = [(k, rate, False) for rate in RATES for k in (1, 3, 5)] + [(5, rate, True) for rate in (0.4, 0.2)]
    for seed in seeds:
        for k, rate, whole in grid:
            name = f"k{k}-{rate:.1f}{'-whole' if whole else ''}-{seed}"
            folder = work / "styles" / name
            path = write_rows(work / "styles" / f"{name}.jsonl", style_votes(pool, k, rate, seed, whole))
            arm = Arm(name, {"name": "dpo" if k == 1 else "mdpo", "beta": STYLE_BETA}, k)
            tree = settings(TINY, path, arm, size.style_steps, seed, work)
            tree["data"] |= {"validation": HELD_OUT_PAIRS}

            def make(tree: Tree = tree, folder: Path = folder) -> Tree:
                learned = align(tree, folder / "run")
                return judged_style(str(folder / "run"), folder / "drawn", size) | {"learned": learned}

            figures = kept(folder / "figures.json", tree | about, make)
            found.append({"k": k, "rate": rate, "whole": whole, "seed": seed} | figures)
            share = sum(score > 0.5 for score in figures["style"]) / len(figures["style"])
            done(f"{name}: share {share:.2f}, accuracy {figures['learned']['eval/rewards/accuracies']:.2f}")
    return {"base": base, "runs": found}


def main() -> None:
    options = parser().parse_args()
    size = QUICK if options.quick else FULL
    work = options.work / "quick" if options.quick else options.work
    started = time.perf_counter()

    def done(what: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {what}", flush=True)

    if "strengths" in options.only:
        found = strengths(work, size, done)
        write_text(work / "strengths.json", json.dumps(found, indent=1) + "\n")
        return
    found = {"seeds": options.seeds}
    if "tones" in options.only:
        found["debias"] = debias(work, size, options.seeds, done)
    if "noise" in options.only:
        found["noise"] = label_noise(work, size, options.seeds, done)
    write_page(found, work if options.quick else Path("docs/results"), work)
    done("page")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    made.add_argument("--work", type=Path, default=Path("runs/multi_sample"), help="where finished parts are kept")
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    made.add_argument("--only", nargs="+", choices=("tones", "noise", "strengths"), default=["tones", "noise"])
    made.add_argument("--quick", action="store_true", help="a smoke test of a few steps; its figures mean nothing")
    return made


if __name__ == "__main__":
    main()
