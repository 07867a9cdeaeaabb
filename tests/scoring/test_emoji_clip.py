"""The embedded rewards know what held-out drawings show and in which style they are drawn, clean and as `tiny-sd` draws."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards.base import Reward, Shelf

EMOJI = Path(__file__).resolve().parents[2] / "samples" / "emoji"
FOLDER = EMOJI / "emoji-clip"

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Held:
    """Held-out drawings and what the rewards' tower sees in them."""

    rows: list[dict[str, str]]
    pictures: list[Image.Image]
    fluent: Tensor
    images: Tensor
    texts: Tensor
    """`[N, D]`, of each drawing's caption"""


@pytest.fixture(scope="module")
def rewards() -> dict[str, Reward]:
    return {reward.card.name: reward for reward in load_rewards([str(EMOJI / "rewards.yaml")], Shelf(torch.device("cpu")))}


@pytest.fixture(scope="module")
def held(rewards: dict[str, Reward]) -> Held:
    rows = [row for row in pq.read_table(EMOJI / "emoji.parquet").to_pylist() if row["split"] == "held_out"]
    pictures = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
    tower = rewards["emoji_clip"].backbone
    with torch.no_grad():
        images = tower.see([tower.prepare(picture) for picture in pictures])
        texts = tower.read([row["caption"] for row in rows])
    return Held(rows, pictures, torch.tensor([row["style"] == "fluent" for row in rows]), images, texts)


def recall(scores: Tensor, k: int) -> float:
    """Share of rows whose own column is among the k highest, in `[M, M]`."""
    return float(((scores > scores.diagonal()[:, None]).sum(1) < k).float().mean())


@torch.no_grad()
def as_drawn(pictures: list[Image.Image], noise: float) -> list[Image.Image]:
    """Through the autoencoder of `tiny-sd`, with noise on its latents."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(EMOJI / "tiny-sd" / "vae", dtype=torch.float32)
    x = torch.stack([torch.frombuffer(bytearray(each.tobytes()), dtype=torch.uint8).view(64, 64, 3) for each in pictures])
    mean = vae.encode(x.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mean
    mean = mean + noise * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    pixels = ((vae.decode(mean).sample + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    return [Image.fromarray(each.contiguous().numpy()) for each in pixels]


def test_it_is_small_and_open_clip_builds_it(held: Held) -> None:
    import open_clip

    assert sum(file.stat().st_size for file in FOLDER.rglob("*")) <= 12e6
    model = open_clip.create_model(f"local-dir:{FOLDER}").eval()
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{FOLDER}")
    tokens = open_clip.get_tokenizer(f"local-dir:{FOLDER}")([row["caption"] for row in held.rows[:8]])
    with torch.no_grad():
        images = model.encode_image(torch.stack([transform(picture) for picture in held.pictures[:8]]), normalize=True)
        texts = model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(images, held.images[:8], rtol=0, atol=1e-5)
    torch.testing.assert_close(texts, held.texts[:8], rtol=0, atol=1e-5)


def test_its_text_tower_is_that_of_tiny_sd(held: Held) -> None:
    from safetensors.torch import load_file
    from transformers import CLIPTextModel, CLIPTokenizer

    tower = CLIPTextModel.from_pretrained(EMOJI / "tiny-sd" / "text_encoder", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI / "tiny-sd" / "tokenizer")
    projection = load_file(FOLDER / "open_clip_model.safetensors")["text_projection"].float()
    tokens = tokenizer([row["caption"] for row in held.rows[:8]], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = F.normalize(tower(tokens).pooler_output @ projection, dim=1)
    torch.testing.assert_close(held.texts[:8], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("style", ["fluent", "noto"])
def test_held_out_captions_find_their_drawings(held: Held, style: str) -> None:
    """Chance is 0.4 % at one and 4 % at ten. With captions of other drawings it is not beaten."""
    which = held.fluent if style == "fluent" else ~held.fluent
    scores = held.texts[which] @ held.images[which].T
    for table in (scores, scores.T):
        assert recall(table, 1) > 0.18
        assert recall(table, 10) > 0.4
    swapped = scores.roll(len(scores) // 2, 0)  # far away, since concepts that stand side by side are alike
    assert recall(swapped, 1) < 0.03
    assert recall(swapped, 10) < 0.25


def test_styles_of_held_out_drawings_are_told_apart(held: Held, rewards: dict[str, Reward]) -> None:
    logits = rewards["style"].judge(held.images, [""] * len(held.images))
    assert float(((logits > 0) == held.fluent).float().mean()) > 0.8
    assert float(((logits > 0) == ~held.fluent).float().mean()) < 0.2


def test_it_holds_for_pictures_as_tiny_sd_draws_them(held: Held, rewards: dict[str, Reward]) -> None:
    """A seventh of the held-out drawings, through the autoencoder with a little noise: chance at one is 1.4 %."""
    which = torch.arange(0, len(held.rows), 7)
    pictures = as_drawn([held.pictures[place] for place in which], noise=0.15)
    captions = [held.rows[place]["caption"] for place in which]
    fluent = held.fluent[which]
    style = rewards["style"].score(pictures, captions)
    assert float(((style > 0) == fluent).float().mean()) > 0.78
    tower = rewards["emoji_clip"].backbone
    with torch.no_grad():
        images = tower.see([tower.prepare(picture) for picture in pictures])
    assert recall(held.texts[which] @ images.T, 1) > 0.3
    right = rewards["emoji_clip"].score(pictures, captions)
    half = len(captions) // 2
    wrong = rewards["emoji_clip"].score(pictures, captions[half:] + captions[:half])
    assert float((right > wrong).float().mean()) > 0.8


def test_the_card_says_what_is_measured(held: Held, rewards: dict[str, Reward]) -> None:
    card = json.loads((FOLDER / "card.json").read_text(encoding="utf-8"))
    found = card["retrieval_held_out"]
    for style, which in (("fluent", held.fluent), ("noto", ~held.fluent)):
        scores = held.texts[which] @ held.images[which].T
        for k in (1, 5, 10):
            said = found[f"{style}_clean"]
            assert said[f"caption_to_picture_recall_at_{k}"] == pytest.approx(recall(scores, k), abs=0.009)
            assert said[f"picture_to_caption_recall_at_{k}"] == pytest.approx(recall(scores.T, k), abs=0.009)
            assert found["chance"][f"recall_at_{k}"] == pytest.approx(k / int((~held.fluent).sum()), abs=1e-3)
    logits = rewards["style"].judge(held.images, [""] * len(held.images))
    accuracy = float(((logits > 0) == held.fluent).float().mean())
    assert card["style_held_out"]["clean"]["accuracy"] == pytest.approx(accuracy, abs=0.005)
    assert rewards["emoji_clip"].card.licence == card["licence"] == "Apache-2.0"


def test_no_reward_is_a_judge(rewards: dict[str, Reward]) -> None:
    """What evaluation asks is never what is optimised: other towers, other heads."""
    import flowalign.scoring.loading as loading

    for path in (Path(loading.__file__).parent).rglob("*.py"):
        assert "flowalign.evaluate" not in path.read_text(encoding="utf-8"), f"{path.name} knows of evaluation"
    assert "judges/" not in (EMOJI / "rewards.yaml").read_text(encoding="utf-8").lower()
    for reward in rewards.values():
        assert "EfficientNet" not in str(reward.backbone.model)
