"""Learning a style from few pairs carries over to concepts that were not trained on, and the reverse labels to the reverse.

Who won is decided here by plain diffusers from the pictures' own style, so that sides swapped anywhere show.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from flowalign import runs
from flowalign.settings import Config

SIDE = 32
CONCEPTS = slice(0, 240, 10)
DRAWS = 4


@dataclass
class Found:
    """Held-out accuracies of one run, in its own account before and after, and as a share of votes for Fluent drawings."""

    before: float
    after: float
    fluent: float


def lines(emoji: Path, name: str, take: slice, path: Path) -> Path:
    """Some lines of a bundled file of comparisons, with their pictures named from anywhere."""
    text = (emoji / "preferences" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[take]
    table = (emoji / "emoji.parquet").as_posix()
    rows = [json.loads(line) for line in text]
    named = [row | {side: table + "#" + row[side].rpartition("#")[2] for side in ("chosen", "rejected")} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in named), encoding="utf-8")
    return path


def votes(emoji: Path, checkpoint: Path, weights: Path) -> float:
    """Share of (concept, time, noise) at which the LoRA came to denoise the Fluent drawing better than the Noto one."""
    table = pq.read_table(emoji / "emoji.parquet", columns=["image", "caption", "concept", "style", "split"]).to_pylist()
    drawings = {(row["concept"], row["style"]): row for row in table if row["split"] == "held_out"}
    concepts = [concept for concept, style in drawings if style == "fluent" and (concept, "noto") in drawings][CONCEPTS]
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    captions = [drawings[concept, "fluent"]["caption"] for concept in concepts]
    embeds, _ = pipeline.encode_prompt(captions, "cpu", 1, False)

    def latents(style: str) -> Tensor:
        pictures = [Image.open(io.BytesIO(drawings[concept, style]["image"]["bytes"])) for concept in concepts]
        small = np.stack([np.asarray(p.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)) for p in pictures])
        pixels = torch.from_numpy(small).permute(0, 3, 1, 2).float() / 127.5 - 1
        vae = pipeline.vae
        return (vae.encode(pixels).latent_dist.mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor

    def errors(style: str) -> Tensor:
        """`[draws, concepts]`"""
        x0, generator, found = latents(style), torch.Generator().manual_seed(0), []
        for draw in range(DRAWS):
            noise = torch.randn(x0.shape, generator=generator)
            t = torch.full((len(x0),), int((draw + 0.5) / DRAWS * scheduler.config.num_train_timesteps))
            kind = scheduler.config.prediction_type
            target = noise if kind == "epsilon" else scheduler.get_velocity(x0, noise, t)
            prediction = pipeline.unet(scheduler.add_noise(x0, noise, t), t, embeds).sample
            found.append((prediction - target).square().mean((1, 2, 3)))
        return torch.stack(found)

    with torch.no_grad():
        before = {style: errors(style) for style in ("fluent", "noto")}
        pipeline.load_lora_weights(weights)
        gain = {style: before[style] - errors(style) for style in ("fluent", "noto")}
    return (gain["fluent"] > gain["noto"]).float().mean().item()


@pytest.fixture(scope="module")
def learned(settings: Callable[..., Config], emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """After 50 steps on 96 pairs of either labelling; the runs themselves are always asked about preferring Fluent."""
    checkpoint = emoji / "tiny-sd"
    if not (checkpoint / "model_index.json").is_file():
        pytest.skip("samples/emoji/tiny-sd is not there; train it with samples/emoji/pretrain.py")
    folder, found = tmp_path_factory.mktemp("learning"), {}
    held_out = lines(emoji, "fluent_over_noto-held_out", CONCEPTS, folder / "held_out.jsonl")
    for labels in ("fluent_over_noto", "noto_over_fluent"):
        train = lines(emoji, f"{labels}-train", slice(0, 1344, 14), folder / f"{labels}.jsonl")
        config = settings(
            folder / labels,
            f"model.checkpoint={checkpoint}",
            f"data={{train: {train}, validation: {held_out}, resolution: {SIDE}}}",
            "trainable.rank=8",
            "train.steps=50",
            "train.learning_rate=2e-3",
            "train.batch_size=8",
            "train.caption_dropout=0",
            f"train.validation_draws={DRAWS}",
        )
        runs.align(config, progress=False)
        metrics = [json.loads(line) for line in (folder / labels / "metrics.jsonl").read_text().splitlines()]
        before, after = (line["eval/rewards/accuracies"] for line in metrics if "eval/loss" in line)
        found[labels] = Found(before, after, votes(emoji, checkpoint, folder / labels / "weights"))
    return found


def test_before_training_no_style_is_preferred(learned: dict[str, Found]) -> None:
    assert [found.before for found in learned.values()] == [0.5, 0.5]


def test_held_out_concepts_follow_the_preference(learned: dict[str, Found]) -> None:
    found = learned["fluent_over_noto"]
    assert found.after >= 0.6  # about 0.7; the standard error of 24 x 4 votes is 0.05
    assert found.fluent >= 0.6


def test_the_reverse_preference_is_learned_in_reverse(learned: dict[str, Found]) -> None:
    found = learned["noto_over_fluent"]
    assert found.after <= 0.4  # about 0.2
    assert found.fluent <= 0.4
