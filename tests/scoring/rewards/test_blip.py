"""ImageReward and BLIP matching are those of other implementations of the same architecture, given the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from flowalign.errors import CheckpointError, ConfigError
from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards.base import Reward, Shelf
from tests.scoring import tiny_models, tiny_towers
from tests.scoring.test_every_reward import PROMPTS, pictures

pytestmark = pytest.mark.usefixtures("one_thread")


def load(name: str, **settings: object) -> Reward:
    return load_rewards([{"name": name, **settings}], Shelf(torch.device("cpu")))[0]


def imagereward(folder: Path) -> Reward:
    checkpoint, tokenizer = tiny_models.imagereward_checkpoint(folder)
    return load("imagereward", weights=str(checkpoint), tokenizer=str(tokenizer))


def tokens(folder: Path) -> dict[str, Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return dict(tokenizer(list(PROMPTS), padding="max_length", truncation=True, max_length=35, return_tensors="pt"))


def test_imagereward_is_the_published_formula(tmp_path: Path) -> None:
    """In other people's parts: timm's vision transformer, transformers' BERT with cross-attention, torchvision's transforms."""
    found = imagereward(tmp_path).score(pictures(), PROMPTS)
    vision, text, head = tiny_models.imagereward_parts()
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    resize = Resize(32, interpolation=InterpolationMode.BICUBIC)
    transform = Compose([resize, CenterCrop(32), ToTensor(), Normalize(mean, std)])
    encoded = tokens(tmp_path / "tokenizer")
    allowed = encoded["attention_mask"][:, None, None].expand(-1, 1, 35, -1)  # in both directions, but not of the padding
    mask = torch.where(allowed.bool(), 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        looked = vision.forward_features(torch.stack([transform(image) for image in pictures()]))
        x = text(input_ids=encoded["input_ids"], attention_mask=mask, encoder_hidden_states=looked).last_hidden_state[:, 0]
        for number in (0, 2, 4, 6, 7):
            x = x @ head[f"layers.{number}.weight"].T + head[f"layers.{number}.bias"]
    expected = (x[:, 0] - 0.16717362830052426) / 1.0333394966054072
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float(expected.std()) > 1e-2


def test_both_pictures_and_prompts_count_in_imagereward(tmp_path: Path) -> None:
    reward = imagereward(tmp_path)
    straight = reward.score(pictures(), PROMPTS)
    assert float((reward.score(pictures()[::-1], PROMPTS) - straight).abs().min()) > 1e-4
    assert float((reward.score(pictures(), PROMPTS[::-1]) - straight).abs().min()) > 1e-4


def test_long_prompts_are_cut_where_imagereward_cuts_them(tmp_path: Path) -> None:
    reward = imagereward(tmp_path)
    first, second = reward.score(pictures()[:2], ["a" * 33 + "b"] * 2), reward.score(pictures()[:2], ["a" * 33] * 2)
    assert torch.equal(first, second)  # 35 tokens with the first and the last
    assert not torch.equal(second, reward.score(pictures()[:2], ["a" * 32] * 2))


def test_heads_are_64_wide_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published sizes: 16 heads of 1024 for pictures, 12 of 768 for prompts."""
    import transformers

    from flowalign.scoring.rewards import imagereward as module

    large = {
        "patch_embed.proj.weight": torch.zeros(1024, 3, 16, 16),
        "pos_embed": torch.zeros(1, 197, 1024),
        "blocks.0.mlp.fc1.weight": torch.zeros(4, 1024),
    }
    base = {
        "embeddings.word_embeddings.weight": torch.zeros(8, 768),
        "embeddings.position_embeddings.weight": torch.zeros(8, 768),
        "encoder.layer.0.intermediate.dense.weight": torch.zeros(4, 768),
    }
    seen: dict[str, dict[str, Any]] = {}

    def spied(name: str, made: Any) -> Any:
        return lambda **settings: made(**seen.setdefault(name, settings))

    for name in ("BlipVisionConfig", "BlipTextConfig"):
        monkeypatch.setattr(transformers, name, spied(name, getattr(transformers, name)))
    with pytest.raises(CheckpointError):  # these few tensors are no checkpoint
        module._towers(large, base, Path("x"))
    assert {name: each["num_attention_heads"] for name, each in seen.items()} == {"BlipVisionConfig": 16, "BlipTextConfig": 12}
    assert (seen["BlipVisionConfig"]["image_size"], seen["BlipVisionConfig"]["patch_size"]) == (224, 16)


LOST_KEY = "blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"


@pytest.mark.parametrize(
    ("lost", "new", "said"),
    [
        ("blip.visual_encoder.pos_embed", {}, "has no pos_embed"),
        (LOST_KEY, {}, "crossattention.self.key.bias"),
        ("mlp.layers.7.bias", {}, "no head of linear layers"),
        ("mlp.", {}, r"has no mlp\.\*"),
        ("blip.", {}, "give a checkpoint of ImageReward"),
        (None, {"blip.visual_encoder.blocks.0.new": torch.zeros(1)}, "encoder.layers.0.new"),
        (None, {"blip.visual_encoder.norm.weight": torch.zeros(3)}, "post_layernorm.weight"),
        (None, {"blip.text_encoder.new": torch.zeros(3)}, "new"),
    ],
)
def test_a_wrong_checkpoint_is_one_sentence(tmp_path: Path, lost: str | None, new: dict[str, Tensor], said: str) -> None:
    checkpoint, tokenizer = tiny_models.imagereward_checkpoint(tmp_path)
    state = torch.load(checkpoint, weights_only=True)
    torch.save({name: value for name, value in state.items() if not lost or not name.startswith(lost)} | new, checkpoint)
    with pytest.raises(CheckpointError, match=said) as caught:
        load("imagereward", weights=str(checkpoint), tokenizer=str(tokenizer))
    assert "\n" not in str(caught.value)


def test_imagereward_says_what_is_missing(tmp_path: Path) -> None:
    checkpoint, tokenizer = tiny_models.imagereward_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no file and no hub id"):
        load("imagereward", weights=str(tmp_path / "none.pt"))
    with pytest.raises(CheckpointError, match="cannot be downloaded"):
        load("imagereward")
    with pytest.raises(CheckpointError, match="tokenizer: FOLDER"):
        load("imagereward", weights=str(checkpoint))
    state = torch.load(checkpoint, weights_only=True)
    state["blip.text_encoder.embeddings.word_embeddings.weight"] = torch.zeros(20, tiny_models.WIDTH)
    torch.save(state, checkpoint)
    with pytest.raises(CheckpointError, match="knows 59 tokens and the model 20"):
        load("imagereward", weights=str(checkpoint), tokenizer=str(tokenizer))


def square() -> list[Image.Image]:
    """Of the model's own size, so that nothing is resized and every processor agrees."""
    return [image.resize((32, 32)) for image in pictures()]


def test_blip_matching_is_transformers_own(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, BlipForImageTextRetrieval

    folder = tiny_models.blip_retrieval(tmp_path)
    model = BlipForImageTextRetrieval.from_pretrained(folder).eval()
    inputs = dict(AutoImageProcessor.from_pretrained(folder)(square(), return_tensors="pt"))
    encoded = tokens(folder)
    inputs |= {name: encoded[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(**inputs).itm_score
        cosines = model(**inputs, use_itm_head=False).itm_score.diagonal()
    expected = {"probability": logits.softmax(1)[:, 1], "log_odds": logits[:, 1] - logits[:, 0], "cosine": cosines}
    for value, scores in expected.items():
        reward = load("blip_itm", model=str(folder), value=value)
        torch.testing.assert_close(reward.score(square(), PROMPTS), scores, rtol=0, atol=1e-5)
        assert float(scores.std()) > 1e-3


def test_the_values_of_one_blip_share_it(tmp_path: Path) -> None:
    folder = str(tiny_models.blip_retrieval(tmp_path))
    shelf = Shelf(torch.device("cpu"))
    specs = [{"name": "blip_itm", "as": value, "model": folder, "value": value} for value in ("cosine", "log_odds")]
    rewards = load_rewards(specs, shelf)
    assert rewards[0].backbone is rewards[1].backbone
    assert rewards[0].card.fingerprint != rewards[1].card.fingerprint


def test_another_tokenizer_is_another_blip(tmp_path: Path) -> None:
    folder = tiny_models.blip_retrieval(tmp_path)
    before = load("blip_itm", model=str(folder)).card.fingerprint
    rules = json.loads((folder / "tokenizer.json").read_text())
    words = rules["model"]["vocab"]
    first, second = list(words)[-2:]
    words[first], words[second] = words[second], words[first]
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    assert load("blip_itm", model=str(folder)).card.fingerprint != before


def test_other_models_are_no_blip_for_retrieval(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a clip model"):
        load("blip_itm", model=str(tiny_towers.transformers_clip(tmp_path)))
    with pytest.raises(CheckpointError, match="downloaded once while online"):
        load("blip_itm")
    with pytest.raises(ConfigError, match="value of the reward blip_itm is 'both'"):
        load("blip_itm", value="both")


def test_a_blip_without_the_heads_is_refused(tmp_path: Path) -> None:
    """transformers would make them up."""
    from safetensors.torch import load_file, save_file

    folder = tiny_models.blip_retrieval(tmp_path)
    state = {name: value for name, value in load_file(folder / "model.safetensors").items() if "itm_head" not in name}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="itm_head"):
        load("blip_itm", model=str(folder))
