"""Scores are those of the reference implementations, given the same weights: open_clip, transformers, formulas written out."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from flowalign.errors import CheckpointError, ConfigError
from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards import aesthetic, open_clip_tower, published, transformers_tower
from flowalign.scoring.rewards.base import Reward, Shelf
from flowalign.scoring.rewards.contrastive import Contrastive, reading
from flowalign.scoring.rewards.framing import normalised
from tests.conftest import clip_tokenizer
from tests.scoring import tiny_towers
from tests.scoring.test_every_reward import PROMPTS, pictures

pytestmark = pytest.mark.usefixtures("one_thread")


def load(name: str, **settings: object) -> Reward:
    return load_rewards([{"name": name, **settings}], Shelf(torch.device("cpu")))[0]


def reference(folder: Path) -> tuple[Tensor, Tensor]:
    """Unit vectors of pictures and prompts, by open_clip alone."""
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    transform = image_transform_v2(PreprocessCfg(**open_clip.get_model_preprocess_cfg(model)), is_train=False)
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.no_grad():
        images = model.encode_image(torch.stack([transform(image) for image in pictures()]), normalize=True)
        return images, model.encode_text(tokenize(list(PROMPTS)), normalize=True)


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_clip_is_open_clips_cosine(tmp_path: Path, quick_gelu: bool) -> None:
    folder = tiny_towers.open_clip_folder(tmp_path, quick_gelu=quick_gelu)
    images, texts = reference(folder)
    cosine = (images * texts).sum(1)
    found = load("clip", model=str(folder)).score(pictures(), PROMPTS)
    torch.testing.assert_close(found, cosine, rtol=0, atol=1e-5)
    hundred = load("clip", model=str(folder), scale=100.0).score(pictures(), PROMPTS)
    torch.testing.assert_close(hundred, 100 * cosine, rtol=0, atol=1e-3)


def test_the_activation_changes_the_score(tmp_path: Path) -> None:
    scores = []
    for quick_gelu in (False, True):
        (tmp_path / str(quick_gelu)).mkdir()
        folder = tiny_towers.open_clip_folder(tmp_path / str(quick_gelu), quick_gelu=quick_gelu)
        reward = load("clip", model=str(folder))
        scores.append((reward.card.fingerprint, reward.score(pictures(), PROMPTS)))
    assert scores[0][0] != scores[1][0]
    assert float((scores[0][1] - scores[1][1]).abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("model", "tag", "expected"),
    [
        ("ViT-L-14", "", True),
        ("ViT-L-14", "openai", True),
        ("ViT-L-14", "laion2b_s32b_b82k", False),
        ("ViT-H-14", "laion2b_s32b_b79k", False),
        ("ViT-B-32", "openai", True),
        ("ViT-B-32-quickgelu", "metaclip_400m", True),
    ],
)
def test_the_activation_is_that_of_the_weights(model: str, tag: str, expected: bool) -> None:
    """OpenAI's weights want quick_gelu, whatever open_clip's configuration of the name says."""
    spec = open_clip_tower._named(model, tag)
    assert spec.config["quick_gelu"] is expected
    assert spec.weights == (tag or "openai")


def test_a_model_of_a_name_is_built_as_open_clip_builds_it() -> None:
    spec = open_clip_tower._named("ViT-B-32", "laion2b_s34b_b79k")
    theirs = open_clip.create_model("ViT-B-32", load_weights=False)
    with torch.device("meta"):
        ours = open_clip_tower.build(spec.config)
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }
    assert repr(ours) == repr(theirs)


def test_hps_is_the_cosine_of_its_checkpoint(tmp_path: Path) -> None:
    config, checkpoint = tiny_towers.hps_checkpoint(tmp_path)
    reward = load("hpsv2", model=str(config), weights=str(checkpoint))
    model = tiny_towers.open_clip_model()
    tokenize = open_clip.get_tokenizer("ViT-H-14")
    framing = reward.backbone.framing  # that it is the authors' is tested with framings
    assert (framing.fit, framing.arithmetic, framing.fill) == ("longest", "floats", 0)
    with torch.no_grad():
        x = normalised([framing.picture(image) for image in pictures()], *framing.statistics(torch.device("cpu")))
        images, texts, _ = model(x, tokenize(list(PROMPTS)))  # both normalised, as their scorer takes them
    torch.testing.assert_close(reward.score(pictures(), PROMPTS), (images @ texts.T).diagonal(), rtol=0, atol=1e-5)


def square() -> list[Image.Image]:
    """Of the towers' own size, so that nothing is resized and every processor agrees."""
    return [image.resize((32, 32)) for image in pictures()]


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_pickscore_is_transformers_clip(tmp_path: Path, activation: str) -> None:
    """As the authors' code says it: exp(logit_scale) times the cosine."""
    from transformers import AutoModel, AutoProcessor

    folder = tiny_towers.transformers_clip(tmp_path, activation=activation)
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    inputs = processor(images=square(), text=list(PROMPTS), padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits_per_image.diagonal()
    scale = math.exp(model.logit_scale.item())
    reward = load("pickscore", model=str(folder))
    torch.testing.assert_close(reward.score(square(), PROMPTS), logits, rtol=1e-5, atol=1e-5)
    assert reward.card.range == pytest.approx((-scale, scale))
    cosine = load("clip", model=str(folder)).score(square(), PROMPTS)
    torch.testing.assert_close(cosine, logits / scale, rtol=0, atol=1e-5)


def test_pickscore_takes_tokenizer_and_preprocessing_from_elsewhere(tmp_path: Path) -> None:
    """As published: the weights in one place, the processor in another."""
    for name in ("whole", "weights"):
        (tmp_path / name).mkdir()
    whole = tiny_towers.transformers_clip(tmp_path / "whole")
    for file in ("config.json", "model.safetensors"):
        (whole / file).rename(tmp_path / "weights" / file)
    with pytest.raises(CheckpointError, match="with its processor"):
        load("pickscore", model=str(tmp_path / "weights"))
    apart = load("pickscore", model=str(tmp_path / "weights"), processor=str(whole)).score(pictures(), PROMPTS)
    (tmp_path / "again").mkdir()
    together = load("pickscore", model=str(tiny_towers.transformers_clip(tmp_path / "again"))).score(pictures(), PROMPTS)
    assert torch.equal(apart, together)


def test_siglip_is_transformers_logit(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoProcessor

    folder = tiny_towers.transformers_siglip(tmp_path)
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    settings = dict(padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    inputs = processor(images=square(), text=list(PROMPTS), **settings)
    inputs.pop("attention_mask", None)  # SigLIP was trained without
    with torch.no_grad():
        logits = model(**inputs).logits_per_image.diagonal()
    found = load("siglip", model=str(folder)).score(square(), PROMPTS)
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)


def test_a_clip_is_no_siglip(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="use the reward clip"):
        load("siglip", model=str(tiny_towers.transformers_clip(tmp_path)))


def test_features_of_transformers_4_and_5_are_taken_alike() -> None:
    """The older ones give the tensor itself."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    x = torch.randn(2, 3)
    assert transformers_tower.plain(x) is x
    assert transformers_tower.plain(BaseModelOutputWithPooling(pooler_output=x)) is x


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_head_is_affine_maps_on_the_unit_vector(tmp_path: Path, version: str) -> None:
    folder = tiny_towers.open_clip_folder(tmp_path)
    path = tiny_towers.head(tmp_path, version)
    images, _ = reference(folder)
    assert images.norm(dim=1).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    state = torch.load(path, weights_only=True)
    x = images.double().numpy()
    for name in [""] if version == "v1" else [f"layers.{number}." for number in (0, 2, 4, 6, 7)]:
        x = x @ state[f"{name}weight"].double().numpy().T + state[f"{name}bias"].double().numpy()
    found = load("aesthetic", model=str(folder), weights=str(path)).score(pictures(), PROMPTS)
    assert found.tolist() == pytest.approx(x[:, 0].tolist(), rel=1e-5, abs=1e-4)


PUBLISHED = {
    "sa_0_4_vit_l_14_linear.pth": (-2.46, -0.14, 1.90, 3.58, 5.10, 6.47, 7.79, 9.05, 10.23, 11.30),
    "sac+logos+ava1-l14-linearMSE.pth": (1.66, 2.36, 3.07, 3.67, 4.24, 4.70, 5.07, 5.37, 5.58, 5.75),
}


@pytest.mark.parametrize("file", PUBLISHED)
def test_published_heads_give_published_values(file: str, test_data: Path) -> None:
    """On ten real vectors of OpenAI's ViT-L/14; the values are known to two digits."""
    folder = test_data / "aesthetic"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    layers = aesthetic.read_head(published.read(folder / file)[0], folder / file)
    vectors = [np.load(folder / "vit_l_14_embeddings" / f"rating{rating}.npy").reshape(-1) for rating in range(10)]
    x = F.normalize(torch.from_numpy(np.stack(vectors)).float(), dim=1)
    found = aesthetic.apply(layers, x).tolist()
    assert [round(value, 2) for value in found] == pytest.approx(PUBLISHED[file], abs=1e-3)
    longer = aesthetic.apply(layers, 12 * x).tolist()  # vectors that are not normalised have such lengths
    assert max(abs(value) for value in longer) > 20
    known = {head.address.rpartition("/")[2].replace("%2B", "+"): head.sha256 for head in aesthetic.HEADS.values()}
    assert known[file] == hashlib.sha256((folder / file).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"weight": torch.ones(1, 24)}, "holds weight"),
        ({"weight": torch.ones(2, 24), "bias": torch.ones(2)}, "end in one number"),
        ({"layers.0.weight": torch.ones(3, 24), "layers.0.bias": torch.ones(3)}, "end in one number"),
        ({"weight": torch.ones(24), "bias": torch.ones(1)}, "end in one number"),
        ({"weight": torch.ones(1, 24), "bias": torch.ones(1), "more": torch.ones(1)}, "holds bias, more, weight"),
        ({"weight": torch.ones(1, 25), "bias": torch.ones(1)}, "for vectors of 25 numbers"),
        ({}, "holds nothing"),
        ({"weight": "text"}, "more than named tensors"),
    ],
)
def test_what_is_no_head_is_refused(tmp_path: Path, state: dict[str, Tensor], reason: str) -> None:
    folder = tiny_towers.open_clip_folder(tmp_path)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=reason):
        load("aesthetic", model=str(folder), weights=str(tmp_path / "odd.pth"))


@pytest.mark.parametrize(("model", "pretrained"), [("ViT-H-14", ""), ("ViT-L-14", "laion2b_s32b_b82k"), ("ViT-B-32", "")])
def test_published_heads_are_for_their_own_towers(model: str, pretrained: str) -> None:
    with pytest.raises(CheckpointError, match="is for OpenAI's ViT-L-14 and not for"):
        load("aesthetic", model=model, pretrained=pretrained)


def test_one_forward_for_rewards_on_one_tower(tmp_path: Path) -> None:
    """However the tower is spelt; and heads do not disturb one another."""
    folder = tiny_towers.open_clip_folder(tmp_path)
    shelf = Shelf(torch.device("cpu"))
    path = str(tiny_towers.head(tmp_path, "v1"))
    spelt = f"{folder.parent}/./{folder.name}"
    specs = [
        {"name": "clip", "model": str(folder)},
        {"name": "aesthetic", "model": spelt, "weights": path},
        {"name": "clip", "as": "same", "model": str(folder), "pretrained": str(folder / "open_clip_model.safetensors")},
    ]
    rewards = load_rewards(specs, shelf)
    assert len(shelf.held) == 1
    assert len({id(reward.backbone) for reward in rewards}) == 1
    tower = rewards[0].backbone
    features = tower.see([tower.prepare(image) for image in pictures()])
    for reward, spec in zip(rewards, specs, strict=True):
        alone = load(**{key: value for key, value in spec.items() if key != "as"}).score(pictures(), PROMPTS)
        torch.testing.assert_close(reward.judge(features, PROMPTS), alone, rtol=0, atol=1e-6)


def test_prompts_are_encoded_once_and_forgotten_at_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = load("clip", model=str(tiny_towers.open_clip_folder(tmp_path)))
    tower: Contrastive = reward.backbone
    encoded: list[str] = []
    plain = type(tower).text_vectors

    def counted(self: Contrastive, prompts: list[str]) -> Tensor:
        encoded.extend(prompts)
        return plain(self, prompts)

    monkeypatch.setattr(type(tower), "text_vectors", counted)
    monkeypatch.setattr("flowalign.scoring.rewards.contrastive.KEPT_PROMPTS", 3)
    first = tower.read(["a", "b", "a", "c"])
    assert encoded == ["a", "b", "c"]
    assert torch.equal(first[0], first[2])
    tower.read(["a", "d"])  # "b" is the one that was longest not asked for
    assert encoded == ["a", "b", "c", "d"]
    tower.read(["a", "c", "d", "b"])
    assert encoded == ["a", "b", "c", "d", "b"]
    assert tower.read([f"{number}" for number in range(150)]).shape == (150, 24)  # more at once than are kept


def test_a_gradient_flows_after_scoring(tmp_path: Path) -> None:
    """Text vectors that were kept while scoring do not stand in its way."""
    reward = load("clip", model=str(tiny_towers.open_clip_folder(tmp_path)))
    reward.score(pictures(), PROMPTS)
    pixels = torch.rand(1, 3, 40, 40, requires_grad=True)
    reward.score_pixels(pixels, PROMPTS[:1]).sum().backward()
    assert pixels.grad is not None
    assert float(pixels.grad.abs().sum()) > 0


def other_words(folder: Path) -> Path:
    """Give a folder a tokenizer in which letters stand for one another's numbers."""
    words = list(clip_tokenizer().get_vocab())
    shifted = {word: index for index, word in enumerate([*words[:2], *words[3:], words[2]])}
    type(clip_tokenizer())(vocab=shifted, merges=[], model_max_length=16).save_pretrained(folder)
    return folder


def test_another_tokenizer_has_another_fingerprint(tmp_path: Path) -> None:
    """Or the cache would give the scores of one for those of the other."""
    model, one, same, other = (tmp_path / name for name in ("model", "one", "same", "other"))
    tiny_towers.transformers_clip(model)
    for folder in (one, same, other):
        shutil.copytree(model, folder)
    other_words(other)
    rewards = [load("pickscore", model=str(model), processor=str(folder)) for folder in (one, same, other)]
    scores = [reward.score(pictures(), PROMPTS) for reward in rewards]
    marks = [reward.card.fingerprint for reward in rewards]
    assert torch.equal(scores[0], scores[1])
    assert marks[0] == marks[1]
    assert not torch.equal(scores[0], scores[2])
    assert marks[0] != marks[2]
    again = rewards[0].backbone
    assert isinstance(again, transformers_tower.TransformersTower)
    assert reading(again.tokenizer) == reading(clip_tokenizer())  # whose padding was not set by a call


def test_what_open_clip_does_to_text_is_read_too(tmp_path: Path) -> None:
    clip_tokenizer().save_pretrained(tmp_path / "one")
    other_words(tmp_path / "other")
    simple, hub = open_clip.tokenizer.SimpleTokenizer, open_clip.tokenizer.HFTokenizer
    kinds = [
        simple(),
        simple(context_length=64),
        simple(clean="canonicalize"),
        simple(additional_special_tokens=["<fox>"]),
        hub(str(tmp_path / "one")),
        hub(str(tmp_path / "one"), strip_sep_token=True),
        hub(str(tmp_path / "other")),
    ]
    marks = [json.dumps(reading(kind)) for kind in kinds]
    assert len({*marks}) == len(marks)
    used = simple()
    used(["a red fox"])
    assert json.dumps(reading(used)) == marks[0]
    loaded = load("clip", model=str(tiny_towers.open_clip_folder(tmp_path))).card.fingerprint
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert load("clip", model=str(tmp_path)).card.fingerprint != loaded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_and_has_its_own_fingerprint(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = str(tiny_towers.open_clip_folder(tmp_path))
    whole = load("clip", model=folder)
    (half,) = load_rewards([{"name": "clip", "model": folder}], Shelf(torch.device("cpu"), dtype))
    assert half.card.fingerprint != whole.card.fingerprint
    scores = half.score(pictures(), PROMPTS)
    assert scores.dtype == torch.float32
    assert float((scores - whole.score(pictures(), PROMPTS)).abs().max()) < 0.03


def test_a_blank_prompt_is_an_error_where_prompts_are_read(tmp_path: Path) -> None:
    from flowalign.errors import DataError

    folder = tiny_towers.open_clip_folder(tmp_path)
    with pytest.raises(DataError, match="blank prompt for picture 2"):
        load("clip", model=str(folder)).score(pictures()[:2], ["a", " \n"])
    load("aesthetic", model=str(folder), weights=str(tiny_towers.head(tmp_path, "v1"))).score(pictures()[:1], [""])


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"model": "ViT-L-15"}, ConfigError, "did you mean 'ViT-L-1"),
        ({"model": "ViT-L-14", "pretrained": "openia"}, ConfigError, "did you mean 'openai'"),
        ({"model": "nowhere/config.json"}, CheckpointError, "open_clip_config.json of the model"),
        ({"scale": 0.0}, ConfigError, "above 0"),
        ({"scale": math.inf}, ConfigError, "above 0"),
    ],
)
def test_mistakes_are_one_sentence(settings: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        load("clip", **settings)
    assert "\n" not in str(caught.value)


def test_damaged_and_missing_weights_are_one_sentence(tmp_path: Path) -> None:
    folder = tiny_towers.open_clip_folder(tmp_path)
    weights = folder / "open_clip_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load("clip", model=str(folder))
    weights.unlink()
    with pytest.raises(CheckpointError, match="give pretrained: FILE"):
        load("clip", model=str(folder))
    with pytest.raises(CheckpointError, match=r"elsewhere\.pt is not there"):
        load("clip", model=str(folder), pretrained=str(tmp_path / "elsewhere.pt"))
    with pytest.raises(ConfigError, match="leave pretrained out"):
        load("clip", model="owner/name", pretrained="openai")


def test_a_checkpoint_that_holds_code_is_not_run(tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (Path(tmp_path / "ran"),)  # type: ignore[return-value]

    folder = tiny_towers.open_clip_folder(tmp_path)
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"weight": Evil()}, protocol=2))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load("aesthetic", model=str(folder), weights=str(path))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load("clip", model=str(folder), pretrained=str(path))
    assert not (tmp_path / "ran").exists()


def test_published_files_are_fetched_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a real server on this machine."""
    import functools
    import http.server
    import threading

    asked: list[str] = []

    class Server(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *said: object) -> None:
            asked.append(self.path)

    (tmp_path / "web").mkdir()
    data = tiny_towers.head(tmp_path / "web", "v1").read_bytes()
    monkeypatch.setenv("FLOWALIGN_CACHE", str(tmp_path / "cache"))
    handler = functools.partial(Server, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/v1.pth"
        with pytest.raises(CheckpointError, match="has the sha256"):
            published.from_address(address, "0" * 64)
        assert not list((tmp_path / "cache").rglob("*.pth"))
        for _ in range(2):
            path = published.from_address(address, hashlib.sha256(data).hexdigest())
            assert path.read_bytes() == data
        assert len(asked) == 2
        with pytest.raises(CheckpointError, match=r"none\.pth cannot be downloaded .* give weights: FILE"):
            published.from_address(f"http://127.0.0.1:{server.server_port}/none.pth", None)
        server.shutdown()
