"""Pictures depend on their seed alone, and a folder of them can be finished after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_dataset
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPImageProcessor

from flowalign.errors import ConfigError, DataError, UserError
from flowalign.families.loading import open_checkpoint
from flowalign.families.sampling import SAMPLERS, SamplerSettings, generator_id, sample, write_images
from tests.families.conftest import flux, sdxl

PROMPTS = ["a cat", "a dog", "", "fog"]
SEEDS = [11, 12, 13, 11]


ZERO_SNR_UNKNOWN = ("heun", "pndm")


@pytest.fixture
def pipeline(folders: dict[str, Path]) -> StableDiffusionPipeline:
    return open_checkpoint(folders["v_zero_snr"])


def draw(pipeline: Any, settings: SamplerSettings, batch_size: int) -> np.ndarray:
    pictures = dict(sample(pipeline, PROMPTS, SEEDS, settings, batch_size=batch_size, progress=False))
    assert list(pictures) == [0, 1, 2, 3]
    return np.stack([np.asarray(pictures[index], dtype=int) for index in range(4)])


@pytest.mark.parametrize("sampler", ["default", *SAMPLERS])
def test_a_picture_does_not_depend_on_its_batch(folders: dict[str, Path], sampler: str) -> None:
    pipeline = open_checkpoint(folders["epsilon" if sampler in ZERO_SNR_UNKNOWN else "v_zero_snr"])
    own = pipeline.scheduler
    settings = SamplerSettings(sampler=sampler, steps=3, guidance=3.0)
    alone, together = draw(pipeline, settings, 1), draw(pipeline, settings, 4)
    assert alone.shape == (4, 32, 32, 3)
    assert np.abs(alone - together).max() <= 1
    assert np.abs(alone[0] - alone[1]).max() > 8
    assert pipeline.scheduler is own


def test_a_picture_is_the_one_that_plain_diffusers_draws(pipeline: StableDiffusionPipeline, folders: dict[str, Path]) -> None:
    plain = StableDiffusionPipeline.from_pretrained(folders["v_zero_snr"], safety_checker=None)
    plain.scheduler = EulerDiscreteScheduler.from_config(plain.scheduler.config)
    ours = draw(pipeline, SamplerSettings(sampler="euler", steps=3, guidance=2.5), 4)
    for index, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        theirs = plain(prompt, num_inference_steps=3, guidance_scale=2.5, generator=generator).images[0]
        assert np.abs(np.asarray(theirs, dtype=int) - ours[index]).max() <= 1


def test_size_steps_guidance_and_precision_are_those_asked_for(pipeline: StableDiffusionPipeline) -> None:
    calls: list[tuple[torch.Size, torch.dtype]] = []
    pipeline.unet.register_forward_hook(lambda module, inputs, output: calls.append((inputs[0].shape, output[0].dtype)))
    settings = SamplerSettings(sampler="ddim", steps=5, guidance=1.0, height=48, width=24, precision="bf16")
    _, picture = next(sample(pipeline, ["a"], [0], settings, progress=False))
    assert picture.size == (24, 48)
    assert calls == [(torch.Size([1, 4, 24, 12]), torch.bfloat16)] * 5
    calls.clear()
    list(sample(pipeline, ["a"], [0], SamplerSettings(sampler="ddim", steps=2), progress=False))
    assert calls == [(torch.Size([2, 4, 16, 16]), torch.float32)] * 2  # with guidance: the prompt and the empty one


class Packed(torch.nn.Linear):
    """A layer whose weight is stored as bytes, as a quantised one is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.view(torch.bfloat16), self.bias)


def test_a_denoiser_that_begins_with_a_quantised_layer_draws_in_what_it_computes_in() -> None:
    torch.manual_seed(0)
    pipeline, settings = flux().to(torch.bfloat16), SamplerSettings(steps=1, height=32, width=32, precision="bf16")
    ((_, plain),) = sample(pipeline, ["a"], [0], settings, progress=False)
    first = next(layer for layer in pipeline.transformer.modules() if isinstance(layer, torch.nn.Linear))
    first.weight = torch.nn.Parameter(first.weight.data.view(torch.uint8), requires_grad=False)
    first.__class__ = Packed
    assert next(pipeline.transformer.parameters()).dtype == torch.uint8
    ((_, packed),) = sample(pipeline, ["a"], [0], settings, progress=False)
    assert packed.tobytes() == plain.tobytes()


@pytest.mark.parametrize(("asks", "found"), [(True, torch.float32), (False, torch.float16)])
def test_a_vae_that_half_precision_may_overflow_decodes_in_float32(asks: bool, found: torch.dtype) -> None:
    pipeline, decoded, predicted = sdxl(), [], []
    pipeline.vae.register_to_config(force_upcast=asks)
    pipeline.vae.decoder.mid_block.resnets[0].conv1.register_forward_hook(lambda *given: decoded.append(given[-1].dtype))
    pipeline.unet.register_forward_hook(lambda *given: predicted.append(given[-1][0].dtype))
    settings = SamplerSettings(steps=1, height=32, width=32, precision="fp16")
    list(sample(pipeline, ["a"], [0], settings, progress=False))
    assert decoded == [found]
    assert predicted == [torch.float16]
    assert "decode" not in vars(pipeline.vae)


def test_a_pipeline_may_hold_an_image_processor(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    """As one with a safety checker does; it has settings, and no config."""
    found = {generator_id(pipeline)}
    for size in (224, 224, 336):
        pipeline.register_modules(feature_extractor=CLIPImageProcessor(size={"shortest_edge": size}))
        found.add(generator_id(pipeline))
    assert len(found) == 3
    settings = SamplerSettings(sampler="ddim", steps=1, guidance=1.0)
    assert write_images(tmp_path, pipeline, ["a"], [0], settings, progress=False)


@pytest.mark.parametrize("sampler", ZERO_SNR_UNKNOWN)
def test_samplers_that_would_use_another_schedule_are_refused(pipeline: StableDiffusionPipeline, sampler: str) -> None:
    own = pipeline.scheduler
    with pytest.raises(ConfigError, match="zero-terminal-SNR"):
        next(sample(pipeline, PROMPTS, SEEDS, SamplerSettings(sampler=sampler), progress=False))
    assert pipeline.scheduler is own


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in ZERO_SNR_UNKNOWN])
def test_samplers_start_from_the_checkpoints_own_schedule(pipeline: StableDiffusionPipeline, sampler: str) -> None:
    used: list[torch.Tensor] = []
    pipeline.unet.register_forward_pre_hook(lambda module, inputs: used.append(pipeline.scheduler.alphas_cumprod))
    next(sample(pipeline, PROMPTS, SEEDS, SamplerSettings(sampler=sampler, steps=1, guidance=1.0), progress=False))
    torch.testing.assert_close(used[0], pipeline.scheduler.alphas_cumprod, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampler": "eulr"}, "did you mean 'euler'"),
        ({"precision": "int8"}, "bf16, fp16, fp32"),
        ({"steps": 0}, "at least 1"),
        ({"height": 33}, "multiple of 8"),
    ],
)
def test_wrong_settings_are_one_sentence(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SamplerSettings(**change)


def test_wrong_calls_are_one_sentence(pipeline: StableDiffusionPipeline, folders: dict[str, Path], tmp_path: Path) -> None:
    cases: list[tuple[type[UserError], dict[str, Any]]] = [(DataError, {"seeds": [1]}), (ConfigError, {"batch_size": 0})]
    for error, change in cases:
        with pytest.raises(error):
            next(sample(**{"pipeline": pipeline, "prompts": PROMPTS, "seeds": SEEDS, "settings": SamplerSettings()} | change))
    half = open_checkpoint(folders["epsilon"], dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="weights are torch"):
        next(sample(half, PROMPTS, SEEDS, SamplerSettings(precision="fp32"), progress=False))
    with pytest.raises(DataError, match="4 prompts and 1 seeds"):
        write_images(tmp_path, pipeline, PROMPTS, [1], SamplerSettings())


def count_calls(pipeline: Any, stop_at: int | None = None) -> list[int]:
    """The batch size of each call of the U-Net; the call number `stop_at` is interrupted."""
    calls: list[int] = []

    def record(module: Any, inputs: tuple[Any, ...]) -> None:
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        calls.append(len(inputs[0]))

    pipeline.unet.register_forward_pre_hook(record)
    return calls


def test_a_folder_is_finished_after_a_kill(folders: dict[str, Path], tmp_path: Path) -> None:
    # Some hold what splits lines elsewhere than in JSON.
    prompts, seeds = ["a a", "a\u2028b", "a\u2029c", "a\x85d", "a e"], [5, 6, 7, 8, 9]
    settings = SamplerSettings(sampler="euler_a", steps=2, guidance=1.0)
    whole = write_images(tmp_path / "whole", open_checkpoint(folders["epsilon"]), prompts, seeds, settings, progress=False)

    killed = open_checkpoint(folders["epsilon"])
    count_calls(killed, stop_at=3)  # in the second batch of two
    with pytest.raises(KeyboardInterrupt):
        write_images(tmp_path / "killed", killed, prompts, seeds, settings, batch_size=2, progress=False)
    done = sorted((tmp_path / "killed").glob("*.png"))
    assert [path.name for path in done] == ["00000-5.png", "00001-6.png"]
    times = [path.stat().st_mtime_ns for path in done]

    again = open_checkpoint(folders["epsilon"])
    calls = count_calls(again)
    paths = write_images(tmp_path / "killed", again, prompts, seeds, settings, batch_size=2, progress=False)
    assert calls == [2, 2, 1, 1]
    assert [path.stat().st_mtime_ns for path in done] == times
    assert [path.name for path in paths] == [path.name for path in whole]
    for ours, theirs in zip(paths, whole, strict=True):
        difference = np.asarray(Image.open(ours), dtype=int) - np.asarray(Image.open(theirs), dtype=int)
        assert np.abs(difference).max() <= 1
    assert (tmp_path / "killed" / "metadata.jsonl").read_text() == (tmp_path / "whole" / "metadata.jsonl").read_text()
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [*(path.name for path in paths), "metadata.jsonl"]

    calls.clear()
    write_images(tmp_path / "killed", again, prompts, seeds, settings, batch_size=2, progress=False)
    assert calls == []
    changed = ["a a", "another", *prompts[2:]]
    write_images(tmp_path / "killed", again, changed, seeds, settings, batch_size=2, progress=False)
    assert calls == [1, 1]  # only the picture whose prompt changed


def test_the_table_lists_what_the_last_call_asked_for(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    """Or what compares and scores folders would take pictures of an earlier call for this one's."""
    settings, calls = SamplerSettings(sampler="ddim", steps=1, guidance=1.0), count_calls(pipeline)

    def listed(*prompts: str) -> list[str]:
        write_images(tmp_path, pipeline, prompts, [5] * len(prompts), settings, progress=False)
        return [json.loads(line)["prompt"] for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]

    assert listed("a", "b") == ["a", "b"]
    assert listed("a", "b", "c") == ["a", "b", "c"]
    assert calls == [2, 1]  # what is there is not drawn again
    assert listed("b") == ["b"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["00000-5.png", "00001-5.png", "00002-5.png"]


def test_the_folder_is_an_image_folder_of_datasets(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    settings = SamplerSettings(sampler="ddim", steps=2, guidance=2.0)
    write_images(tmp_path / "pictures", pipeline, PROMPTS, SEEDS, settings, progress=False)
    rows = list(
        load_dataset("imagefolder", data_dir=str(tmp_path / "pictures"), cache_dir=str(tmp_path / "cache"), split="train")
    )
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["seed"] for row in rows] == SEEDS
    assert rows[0]["image"].size == (32, 32)
    assert {key: rows[0][key] for key in ("sampler", "steps", "guidance", "height", "width", "precision", "generator")} == {
        "sampler": "ddim",
        "steps": 2,
        "guidance": 2.0,
        "height": 32,
        "width": 32,
        "precision": "fp32",
        "generator": generator_id(pipeline),
    }


def test_a_table_of_something_else_is_refused(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"text": "no file"}) + "\n")
    with pytest.raises(DataError, match="is not a table of pictures"):
        write_images(tmp_path, pipeline, PROMPTS, SEEDS, SamplerSettings(), progress=False)


def test_the_generators_name_follows_what_draws(folders: dict[str, Path]) -> None:
    pipeline = open_checkpoint(folders["epsilon"])
    name = generator_id(pipeline)
    assert len(name) == 12
    list(sample(pipeline, ["a"], [0], SamplerSettings(sampler="euler", steps=1), progress=False))
    assert generator_id(pipeline) == name == generator_id(open_checkpoint(folders["epsilon"]))
    assert len({name, *(generator_id(open_checkpoint(folders[kind])) for kind in ("v_zero_snr", "sample"))}) == 3
    with torch.no_grad():
        pipeline.unet.conv_out.bias[0] += 1e-3
    assert generator_id(pipeline) != name
