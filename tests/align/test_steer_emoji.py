"""Steering in the embedded world: one policy draws Fluent or Noto emoji, as its weights say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowalign import runs, steered
from flowalign.config import load
from flowalign.demo import held_out_captions
from flowalign.evaluate.judges import load_judges
from flowalign.families.loading import open_checkpoint
from flowalign.families.sampling import SamplerSettings, sample

SHARES = (0.0, 0.5, 1.0)


def told(source: Path, out: Path) -> Path:
    """Style pairs, each under drawn weights of the two styles, turned around where Noto has the larger one."""
    rng, lines = np.random.default_rng(0), []
    for line in source.read_text().splitlines():
        row = json.loads(line)
        row["chosen"], row["rejected"] = (str(source.parent / row[side]) for side in ("chosen", "rejected"))
        for fluent in rng.dirichlet([0.3, 0.3], 2)[:, 0]:
            sides = (row["chosen"], row["rejected"]) if fluent > 0.5 else (row["rejected"], row["chosen"])
            weights = {"fluent": fluent, "noto": 1 - fluent}
            held = {"prompt": row["prompt"], "chosen": sides[0], "rejected": sides[1], "objective_weights": weights}
            lines.append(json.dumps(held) + "\n")
    out.write_text("".join(lines))
    return out


def drawn_under(run: Path, prompts: list[str]) -> list[list[Image.Image]]:
    """Pictures under each of SHARES, of Fluent."""
    pipeline = steered(open_checkpoint(run, dtype=torch.bfloat16), run)
    how, found = SamplerSettings(steps=12, guidance=3.0, precision="bf16"), []
    for share in SHARES:
        weights = [{"fluent": share, "noto": 1 - share}] * len(prompts)
        seeds = list(range(len(prompts)))
        drawn = sample(pipeline, prompts, seeds, how, weights=weights, batch_size=len(prompts), progress=False)
        found.append([picture.convert("RGB") for _, picture in drawn])
    return found


@pytest.mark.slow
def test_the_style_of_the_pictures_follows_the_weights(root: Path, tmp_path: Path) -> None:
    """With the weights swapped the same figures fail: the order turns around.

    Not with weights in words: this model's text tower has never read numbers, and loses its captions (docs/results/mo_odpo.md).
    """
    pairs = told((root / "samples/emoji/preferences/fluent_over_noto-train.jsonl").resolve(), tmp_path / "pairs.jsonl")
    config = load(
        root / "configs" / "emoji-dpo-lora.yaml",
        [
            f"output={tmp_path / 'run'}",
            f"model.checkpoint={root / 'samples/emoji/tiny-sd'}",
            f"data={{train: {pairs}, held_out: 0.0}}",
            "steer={objectives: [fluent, noto], form: tokens}",
            "objective.beta=400.0",
            "train.steps=160",
            "train.learning_rate=1e-3",
            "sample={count: 3, steps: 2}",
            "judges=null",
            "guard.policy=off",
        ],
    )
    runs.align(config, progress=False)
    prompts = held_out_captions(16)
    judge = {each.name: each for each in load_judges(root / "samples/emoji/judges")}["style"]
    shares = [
        float((judge.score(pictures, prompts) > 0.5).float().mean()) for pictures in drawn_under(tmp_path / "run", prompts)
    ]
    assert shares[0] < shares[1] < shares[2]
    assert shares[2] - shares[0] >= 0.5
