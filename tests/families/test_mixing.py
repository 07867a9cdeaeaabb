"""Several denoisers in one pipeline: what is drawn is what the pipeline draws of their weighted predictions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from flowalign import runs
from flowalign.align.reference import second
from flowalign.errors import CheckpointError, ConfigError
from flowalign.families.loading import open_checkpoint, open_family
from flowalign.families.mixing import mix, oppose, weighted
from flowalign.families.sampling import SamplerSettings, generator_id, sample
from flowalign.runs.mixing import open_mixed
from flowalign.settings import Config

HOW = SamplerSettings(steps=3, guidance=3.0)
PROMPTS, SEEDS = ["a b", "c"], [0, 1]


@pytest.fixture(scope="module")
def trained(settings: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one tiny model: two LoRAs, and one of the opposite taste."""
    folder = tmp_path_factory.mktemp("parts")
    common = ("train.steps=1", "train.learning_rate=3e-2", "data.validation=null", "sample.count=1")
    for name, more in {
        "one": (),
        "two": ("train.seed=5", "trainable.rank=2"),
        "against": ("data.order=reversed",),
    }.items():
        runs.align(settings(folder / name, *common, *more), progress=False)
    return {path.name: path for path in folder.iterdir()}


def drawn(pipeline: Any, how: SamplerSettings = HOW) -> np.ndarray:
    return np.stack([np.asarray(picture) for _, picture in sample(pipeline, PROMPTS, SEEDS, how, progress=False)]).astype(int)


def close(first: np.ndarray, other: np.ndarray) -> bool:
    """Rounded to 8 bits alike, but for single steps."""
    return int(np.abs(first - other).max()) <= 1


def test_a_weighted_sum_of_tensors() -> None:
    parts = [torch.full((2, 3), value) for value in (1.0, 10.0)]
    assert torch.equal(weighted([0.5, 2.0], parts), torch.full((2, 3), 20.5))


def test_guided_pictures_of_a_mix_are_ddims_own_of_the_weighted_predictions(
    trained: dict[str, Path], folders: dict[str, Path]
) -> None:
    """DDIM written out: guidance, negative branch and mean of predictions over two LoRAs and their opposite."""
    names = ["one", "two", "against"]
    one, two, against = (open_family(trained[name]) for name in names)
    pipeline, _ = open_mixed({str(trained["one"]): 0.6, str(trained["two"]): 0.4}, str(trained["against"]), 0.7, guidance=3.0)
    found = drawn(pipeline, SamplerSettings(steps=3, guidance=3.0, sampler="ddim"))

    plain = open_checkpoint(folders["epsilon"])
    scheduler = DDIMScheduler.from_config(plain.scheduler.config)
    pictures = []
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        asked, empty = (one.encode_prompts([text]).tensors["prompt_embeds"] for text in (prompt, ""))
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        scheduler.set_timesteps(3)
        with torch.no_grad():
            for t in scheduler.timesteps:

                def said(family: Any, states: torch.Tensor, x: torch.Tensor = x, t: torch.Tensor = t) -> torch.Tensor:
                    return family.denoiser(x, t, encoder_hidden_states=states, return_dict=False)[0]

                positive = 0.6 * said(one, asked) + 0.4 * said(two, asked)
                own = 0.6 * said(one, empty) + 0.4 * said(two, empty)
                negative = 0.3 * own + 0.7 * said(against, empty)
                x = scheduler.step(negative + 3.0 * (positive - negative), t, x).prev_sample
            image = plain.vae.decode(x / plain.vae.config.scaling_factor + (plain.vae.config.shift_factor or 0)).sample
        pictures.append(np.asarray(plain.image_processor.postprocess(image, output_type="pil")[0]))
    assert close(found, np.stack(pictures).astype(int))
    assert not close(found, drawn(open_checkpoint(trained["one"]), SamplerSettings(steps=3, guidance=3.0, sampler="ddim")))


def test_lora_runs_share_the_base_and_the_pipeline_stays_plain(trained: dict[str, Path]) -> None:
    pipeline, name = open_mixed({str(trained["one"]): 0.5, str(trained["two"]): 0.5}, None, 1.0, guidance=1.0)
    assert type(pipeline.unet).__name__ == "UNet2DConditionModel"
    assert len(name) == 12
    other, different = open_mixed({str(trained["one"]): 0.4, str(trained["two"]): 0.6}, None, 1.0, guidance=1.0)
    assert name != different != generator_id(other)


def test_the_same_run_twice_is_that_run(trained: dict[str, Path], folders: dict[str, Path]) -> None:
    alone = drawn(open_checkpoint(trained["one"]))
    copy = Path(f"{trained['one']}/../one")
    pipeline, _ = open_mixed({str(trained["one"]): 0.25, str(copy): 0.75}, str(trained["one"]), 0.5, guidance=3.0)
    assert close(drawn(pipeline), alone)
    base = str(folders["epsilon"])
    pipeline, _ = open_mixed({base: 1.0}, base, 1.0, guidance=3.0)
    assert close(drawn(pipeline), drawn(open_checkpoint(base)))


def test_a_strength_of_nothing_is_the_plain_picture_bit_for_bit(trained: dict[str, Path], tmp_path: Path) -> None:
    plain = open_checkpoint(trained["one"])
    before = drawn(plain)
    oppose(plain.unet, second(open_family(trained["against"]).denoiser), 0.0, "first")
    assert np.array_equal(drawn(plain), before)
    against = str(trained["against"])
    for folder, more in {
        "plain": {},
        "none": {"negative": against, "negative_strength": 0.0},
        "some": {"negative": against, "negative_strength": 1.0},
    }.items():
        runs.generate(str(trained["one"]), PROMPTS, out=tmp_path / folder, steps=2, guidance=3.0, progress=False, **more)  # type: ignore[arg-type]
    lines = {name: (tmp_path / name / "metadata.jsonl").read_text() for name in ("plain", "none", "some")}
    assert lines["plain"] == lines["none"]
    assert json.loads(lines["plain"].splitlines()[0])["generator"] != json.loads(lines["some"].splitlines()[0])["generator"]
    shown = {}
    for name in lines:
        pictures = []
        for path in sorted((tmp_path / name).glob("*.png")):
            with Image.open(path) as picture:
                pictures.append(np.asarray(picture).astype(int))
        shown[name] = np.stack(pictures)
    assert np.array_equal(shown["plain"], shown["none"])
    assert not close(shown["plain"], shown["some"])


def test_reversed_data_train_as_data_with_both_sides_exchanged(
    settings: Callable[..., Config], votes: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    names = {"chosen": "rejected", "rejected": "chosen"}
    turned = votes.with_name("turned.jsonl")
    turned.write_text("".join(json.dumps({names.get(name, name): row[name] for name in row}) + "\n" for row in rows))
    common = ("train.steps=2", "data.validation=null", "sample.count=1")
    runs.align(settings(tmp_path / "reversed", *common, "data.order=reversed"), progress=False)
    runs.align(settings(tmp_path / "turned", *common, f"data.train={turned}"), progress=False)
    runs.align(settings(tmp_path / "given", *common), progress=False)
    one, two, three = (
        (tmp_path / name / "weights/pytorch_lora_weights.safetensors").read_bytes() for name in ("reversed", "turned", "given")
    )
    assert one == two != three


@pytest.mark.parametrize("kind", ["v_zero_snr", "sample"])
def test_a_mix_of_other_kinds_of_prediction(folders: dict[str, Path], kind: str) -> None:
    base = open_family(folders[kind])
    other = second(base.denoiser)
    pipeline = base.pipeline(base.denoiser)
    before = drawn(pipeline)
    mix(pipeline.unet, [other], [0.5, 0.5])
    assert close(drawn(pipeline), before)


def test_every_family_mixes_and_those_that_guide_in_one_call_take_a_negative(checkpoint: Path) -> None:
    """With itself beside it and as its negative, a model draws what it draws alone; with another one it does not."""
    how = SamplerSettings(steps=2, guidance=3.0, height=32, width=32)
    family = open_family(checkpoint)
    alone = drawn(family.pipeline(family.denoiser), how)
    pipeline = family.pipeline(second(family.denoiser))
    denoiser = getattr(pipeline, family.component)
    mix(denoiser, [family.denoiser], [0.3, 0.7])
    assert close(drawn(pipeline, how), alone)
    other = open_family(checkpoint).denoiser
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += (
                0.2 * parameter.std() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                if parameter.numel() > 1
                else 0
            )
    if family.negative is None:
        with pytest.raises(ConfigError, match="this one does not; leave the negative run out"):
            oppose(denoiser, other, 1.0, family.negative)
        return
    oppose(denoiser, family.denoiser, 1.0, family.negative)
    assert close(drawn(pipeline, how), alone)
    oppose(denoiser, other, 1.0, family.negative)
    moved = drawn(pipeline, how)
    assert not close(moved, alone)
    # without guidance the rows that are kept are the prompt's: nothing of them may have moved
    told: list[Any] = []
    denoiser.register_forward_hook(lambda *each: told.append(each[-1][0]))
    before: list[Any] = []
    plain = family.pipeline(second(family.denoiser))
    getattr(plain, family.component).register_forward_hook(lambda *each: before.append(each[-1][0]))
    one = SamplerSettings(steps=1, guidance=3.0, height=32, width=32)
    drawn(pipeline, one)
    drawn(plain, one)
    half = len(told[0]) // 2
    asked, empty = (slice(half, None), slice(0, half)) if family.negative == "first" else (slice(0, half), slice(half, None))
    for mine, other_said in zip(told[0][asked], before[0][asked], strict=True):
        torch.testing.assert_close(mine, other_said, atol=1e-4, rtol=1e-4)
    assert any(float((mine - said).abs().max()) > 1e-3 for mine, said in zip(told[0][empty], before[0][empty], strict=True))


@pytest.mark.parametrize(
    ("shares", "negative", "guidance", "error", "said"),
    [
        ({"one": 0.6, "two": 0.6}, None, 3.0, ConfigError, "give each run a finite share, 1 in sum"),
        ({}, None, 3.0, ConfigError, "mixed as nothing"),
        ({"one": 1.0}, "against", 1.0, ConfigError, "guidance 1 is none; give more than 1"),
        ({"one": 0.5, "nowhere": 0.5}, None, 3.0, CheckpointError, "nowhere does not exist"),
    ],
)
def test_what_cannot_be_mixed_is_one_sentence(
    trained: dict[str, Path], shares: dict[str, float], negative: str | None, guidance: float, error: type[Exception], said: str
) -> None:
    named = {str(trained.get(name, name)): share for name, share in shares.items()}
    with pytest.raises(error, match=said):
        open_mixed(named, None if negative is None else str(trained[negative]), 1.0, guidance=guidance)


def test_other_targets_and_both_or_neither_checkpoint_are_refused(
    trained: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"the mixture names .* predicts another target"):
        open_mixed({str(trained["one"]): 0.5, str(folders["v_zero_snr"]): 0.5}, None, 1.0, guidance=3.0)
    for checkpoint, shares in ((None, None), (str(trained["one"]), {str(trained["two"]): 1.0})):
        with pytest.raises(ConfigError, match="give one of the two"):
            runs.generate(checkpoint, PROMPTS, mix=shares, out=tmp_path, progress=False)


def test_weights_of_a_steered_run_do_not_go_with_others(trained: dict[str, Path], tmp_path: Path) -> None:
    one, two = str(trained["one"]), str(trained["two"])
    for more in ({"checkpoint": None, "mix": {one: 0.5, two: 0.5}}, {"checkpoint": one, "negative": two}):
        with pytest.raises(ConfigError, match="weights steer one run alone"):
            runs.generate(prompts=PROMPTS, weights={"a": 1.0}, out=tmp_path, progress=False, **more)  # type: ignore[arg-type]


def test_whole_models_are_mixed_too(folders: dict[str, Path], tmp_path: Path) -> None:
    base, whole = str(folders["epsilon"]), str(tmp_path / "whole")
    pipeline = open_checkpoint(base)
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 0.1
    pipeline.save_pretrained(whole)
    own = drawn(pipeline)
    assert not close(own, drawn(open_checkpoint(base)))
    both, _ = open_mixed({base: 0.0, whole: 1.0}, None, 1.0, guidance=3.0)
    assert close(drawn(both), own)
    half, _ = open_mixed({base: 0.5, whole: 0.5}, None, 1.0, guidance=3.0)
    with torch.no_grad():
        pipeline.unet.conv_out.bias -= 0.05  # the last layer is linear in its bias
    assert close(drawn(half), drawn(pipeline))
