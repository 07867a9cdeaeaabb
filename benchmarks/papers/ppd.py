"""PPD (Dang et al. 2025, arXiv 2501.06655) on the emoji: one model for several users, and a new one from four comparisons.

    python -m benchmarks.papers.ppd [--work runs/ppd] [--seed 0] [--quick]

Four users judge the same pairs, each by one thing: fluent and noto by the drawing's style, colourful and pale by its colour.
One run learns an embedding of each over the frozen tiny-sd; for each user a LoRA of its own, trained on that user's votes,
is the ceiling. Then embeddings of fluent and noto are mixed, and two users whom the run has not seen are taken in from four
comparisons each: one with the taste of noto, and one who likes both Fluent and colour. Pictures of held-out captions are held
against the base's of the same seeds by the users' own rewards: style by a judge that nothing was trained on, colour by its
formula. What is finished in --work is kept.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.papers.stages import TINY, Tree, align, draw, judges, kept, options_of, publish, recipe, write_rows
from flowalign import runs
from flowalign.data.images import decode
from flowalign.demo import GUIDANCE, PICTURES, held_out_captions
from flowalign.evaluate.compare import compare
from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards.base import Shelf

VOTES = Path("samples/emoji/preferences/fluent_over_noto-train.jsonl")
USERS = ("colourful", "fluent", "noto", "pale")
NEW = {"noto too": "noto", "fluent and colourful": "both"}
"""Users who come later: by what they judge."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
SHOTS = 4
PAGE = Path("docs/results/ppd.md")


def worth(style: np.ndarray, colour: np.ndarray, taste: str) -> np.ndarray:
    """What pictures are worth to a user, from how Fluent (0 to 1) and how colourful they are, the latter in spreads."""
    parts = {"fluent": style, "noto": -style, "colourful": colour, "pale": -colour, "both": style / 0.5 + colour}
    return parts[taste]


def colours(pictures: Sequence[Image.Image]) -> np.ndarray:
    (colour,) = load_rewards(["colourfulness"], Shelf(torch.device("cpu")))
    return np.asarray(colour.score(pictures, [""] * len(pictures)))


def votes(work: Path, concepts: int) -> tuple[dict[str, Path], float]:
    """(comparison files: of all known users, of each of them, of each new one; the spread of colourfulness)."""
    rows = [json.loads(line) for line in VOTES.read_text(encoding="utf-8").splitlines()][: concepts + SHOTS]
    places = [(int(row["chosen"].rpartition("#")[2]), int(row["rejected"].rpartition("#")[2])) for row in rows]
    column = pq.read_table(PICTURES, columns=["image"])["image"]
    shown = [decode(column[place]["bytes"].as_py()) for pair in places for place in pair]
    found = colours(shown)
    spread = float(found.std())
    style, colour = np.tile([1.0, 0.0], len(rows)), found / spread

    def of(who: str, taste: str, part: slice) -> list[Tree]:
        out = []
        worths = worth(style, colour, taste).reshape(-1, 2)
        for row, (fluent, noto), (first, second) in list(zip(rows, places, worths, strict=True))[part]:
            best, worst = (fluent, noto) if first >= second else (noto, fluent)
            named = {"chosen": f"{PICTURES.resolve()}#{best}", "rejected": f"{PICTURES.resolve()}#{worst}"}
            out.append({"prompt": row["prompt"], "annotator": who} | named)
        return out

    train, late = slice(0, concepts), slice(concepts, None)
    files = {who: write_rows(work / f"{who}.jsonl", of(who, who, train)) for who in USERS}
    files["all"] = write_rows(work / "all.jsonl", [row for who in USERS for row in of(who, who, train)])
    for who, taste in NEW.items():
        files[who] = write_rows(work / f"{who}.jsonl", of(who, taste, late))
    return files, spread


def settings(pairs: Path, steps: int, seed: int, work: Path, more: Tree) -> Tree:
    train = {"caption_dropout": 0.1} | more["train"]
    sections = {name: value for name, value in more.items() if name != "train"}
    loss = {"name": "dpo", "beta": 800.0}
    return recipe(pairs, loss, steps=steps, seed=seed, cache=work / "cache", train=train, **sections)


PERSONAL: Tree = {"users": {"tokens": 4}, "trainable": {"kind": "none"}, "train": {"learning_rate": 1e-3}}
ALONE: Tree = {"trainable": {"kind": "lora", "rank": 32}, "train": {"learning_rate": 4e-4}}


def drawn(source: Path | str, captions: Sequence[str], out: Path, spread: float, user: dict[str, float] | None = None) -> Tree:
    """How Fluent and how colourful pictures of captions are, lists of one entry a picture."""
    pictures = draw(str(source), captions, [7], out, GUIDANCE, user=user)
    style = judges()["style"].score(pictures, list(captions))
    caption = judges()["caption_match"].score(pictures, list(captions))
    return {"style": style.tolist(), "colour": (colours(pictures) / spread).tolist(), "caption": caption.tolist()}


def measure(work: Path, seed: int, *, concepts: int, steps: int, captions: int) -> Tree:
    """Style and colour on held-out captions by arm."""
    started = time.perf_counter()
    files, spread = votes(work, concepts)
    shown = held_out_captions(captions)
    about = {"concepts": concepts, "steps": steps, "captions": captions, "seed": seed}
    about |= {"personal": PERSONAL, "alone": ALONE}
    arms: dict[str, Tree] = {}

    def add(name: str, source: Path | str, user: dict[str, float] | None = None) -> None:
        folder = work / "drawn" / name
        arms[name] = kept(work / f"{name}.json", about | {"user": user}, lambda: drawn(source, shown, folder, spread, user))
        print(f"{time.perf_counter() - started:6.0f} s  {name}", flush=True)

    add("base", TINY)
    align(settings(files["all"], steps, seed, work, PERSONAL), work / "personal")
    for who in USERS:
        add(f"personal {who}", work / "personal", {who: 1.0})
    for share in SHARES[1:-1]:
        add(f"mixed {share:g}", work / "personal", {"fluent": 1 - share, "noto": share})
    for who, taste in NEW.items():
        add(f"mean {taste}", work / "personal", dict.fromkeys(USERS, 1.0))
        out = work / f"adapted-{taste}"
        if not (out / "weights").is_dir():
            more = [f"train.seed={seed}", "train.schedule=constant"]
            runs.adapt(work / "personal", str(files[who]), who, out, overrides=more, resume=True, progress=False)
        add(f"adapted {taste}", out, {who: 1.0})
    for who in USERS:
        align(settings(files[who], max(1, steps // 2), seed, work, ALONE), work / f"alone-{who}")
        add(f"alone {who}", work / f"alone-{who}")
    return {"arms": arms, "about": about, "seconds": time.perf_counter() - started}


def rate(found: Tree, arm: str, taste: str) -> Any:
    """Win rate of an arm against the base by what pictures are worth to a user, with its interval."""
    base, ours = (
        worth(np.array(found["arms"][name]["style"]), np.array(found["arms"][name]["colour"]), taste) for name in ("base", arm)
    )
    return compare(base.tolist(), ours.tolist()).win_rate


def page(found: Tree) -> list[str]:
    def cell(arm: str, taste: str) -> str:
        each = rate(found, arm, taste)
        return f"{each.value:.2f} [{each.low:.2f}, {each.high:.2f}]"

    def caption(arm: str) -> str:
        return f"{np.mean(found['arms'][arm]['caption']):.3f}"

    lines = ["| user | one run for all | a LoRA of that user's own | caption match of both |", "|---|---|---|---|"]
    for who in USERS:
        ours, own = f"personal {who}", f"alone {who}"
        lines.append(f"| {who} | {cell(ours, who)} | {cell(own, who)} | {caption(ours)}, {caption(own)} |")
    lines += ["", "| share of noto, rest fluent | mean of P(Fluent) |", "|---|---|"]
    between = ["personal fluent", *(f"mixed {share:g}" for share in SHARES[1:-1]), "personal noto"]
    lines += [f"| {share:g} | {np.mean(found['arms'][arm]['style']):.3f} |" for share, arm in zip(SHARES, between, strict=True)]
    lines += ["", "| new user, four comparisons | mean of the known users | its own embedding |", "|---|---|---|"]
    lines += [f"| {who} | {cell(f'mean {taste}', taste)} | {cell(f'adapted {taste}', taste)} |" for who, taste in NEW.items()]
    return [*lines, "", f"The base's caption match is {caption('base')}."]


def main() -> None:
    options = parser().parse_args()
    size = dict(concepts=300, steps=100, captions=60)
    if options.quick:
        size = dict(concepts=4, steps=2, captions=2)
    found = measure(options.work, options.seed, **size)
    lines = page(found)
    publish(PAGE, "ppd", lines, found, quick=options.quick)


def parser() -> argparse.ArgumentParser:
    made = options_of(__doc__, "runs/ppd")
    made.add_argument("--seed", type=int, default=0)
    return made


if __name__ == "__main__":
    main()
