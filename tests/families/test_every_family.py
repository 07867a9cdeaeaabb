"""One battery over every family: what its own diffusers pipeline feeds and gets is what ours feeds and gets."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image
from safetensors.torch import load_file
from torch._dynamo.exc import Unsupported

from flowalign import plugins, runs
from flowalign.chosen import choose_trainable
from flowalign.config import parse
from flowalign.data.batch import GEOMETRY, Conditioning
from flowalign.device import make_accelerator
from flowalign.errors import CheckpointError, ConfigError
from flowalign.families.base import Family
from flowalign.families.loading import detect_family, open_checkpoint
from flowalign.families.noise import FlowNoise
from flowalign.families.sampling import SamplerSettings, drawn, sample
from flowalign.plan.flops import count, counted
from flowalign.plan.model import outline
from flowalign.rng import Keyed
from flowalign.settings import Config
from flowalign.setup import Prepared, prepare
from flowalign.train.trainable import trained
from tests.families.conftest import BUILDERS

PROMPTS = ["a cat", "", "zebra in a fog with many more letters than sixteen", "b"]
SIDE = 32
SMALL = {"height": SIDE, "width": SIDE}
LONG = pytest.mark.parametrize(
    "checkpoint", [pytest.param(name, marks=pytest.mark.slow if "-" in name else ()) for name in BUILDERS], indirect=True
)
"""Tests that take seconds: other checkpoints of a family than its first are for the slow ones."""


KOHYA = {
    f"lora_unet_{block}_transformer_blocks_0_{attention}_{layer}.{part}"
    for block in (
        "down_blocks_0_attentions_0",
        "mid_block_attentions_0",
        "up_blocks_1_attentions_0",
        "up_blocks_1_attentions_1",
    )
    for attention in ("attn1", "attn2")
    for layer in ("to_q", "to_k", "to_v", "to_out_0")
    for part in ("lora_down.weight", "lora_up.weight", "alpha")
}
"""What a LoRA of the tiny U-Nets holds in kohya's format."""


@pytest.fixture
def family(checkpoint: Path) -> Family:
    return load(checkpoint)


def load(checkpoint: Path, dtype: torch.dtype = torch.float32) -> Family:
    return plugins.load("families", detect_family(checkpoint)).load(checkpoint, dtype=dtype)


def plainly(checkpoint: Path) -> Any:
    """Plain diffusers' own pipeline, which wants to hear which parts a checkpoint leaves out."""
    index = json.loads((checkpoint / "model_index.json").read_text())
    pipeline = DiffusionPipeline.from_pretrained(checkpoint, **{n: None for n, v in index.items() if v == [None, None]})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def told(family: Family, prompts: list[str], sizes: list[list[int]] | None = None) -> Conditioning:
    rows = sizes or [[SIDE, SIDE, 0, 0, SIDE, SIDE]] * len(prompts)
    return family.encode_prompts(prompts).joined(GEOMETRY, torch.tensor(rows, dtype=torch.float32))


def latents(family: Family, count: int = 4) -> torch.Tensor:
    pixels = torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return family.encode_images(pixels).mean


def test_every_family_of_the_package_has_a_checkpoint_here() -> None:
    assert {plugins.load("families", name).name for name in plugins.names("families")} == {
        name.partition("-")[0] for name in BUILDERS
    }


class Recorder:
    """What a denoiser is given and gives, whatever it calls its arguments."""

    def __init__(self, family: Family, pipeline: Any) -> None:
        self.family, self.pipeline = family, pipeline
        self.calls: list[dict[str, Any]] = []
        names = ("sample", "timestep") if family.component == "unet" else ("hidden_states", "timestep", "encoder_hidden_states")

        def record(module: Any, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
            self.calls.append(dict(zip(names, inputs, strict=False)) | options | {"output": output[0]})

        getattr(pipeline, family.component).register_forward_hook(record, with_kwargs=True)

    def picture(self, value: Any) -> torch.Tensor:
        """Latents, packed, listed or plain -> `[B, C, h, w]`."""
        if isinstance(value, list):
            return torch.stack(value)[:, :, 0]
        if value.ndim == 3:
            value = self.pipeline._unpack_latents(value, SIDE, SIDE, self.pipeline.vae_scale_factor)
        return value[:, :, 0] if value.ndim == 5 else value


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal values; of texts that ours holds at a fixed length, those that theirs has."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert_same(ours[name], value)
    elif isinstance(theirs, list) and isinstance(theirs[0], torch.Tensor):
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other)
    elif isinstance(theirs, torch.Tensor):
        if theirs.ndim == 0 or len(theirs) == 1:  # one for all
            theirs = theirs.expand_as(ours)
        if ours.ndim > 1 and ours.shape[1] > theirs.shape[1]:
            assert not ours[:, theirs.shape[1] :].any()
            ours = ours[:, : theirs.shape[1]]
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-6, atol=1e-6)
    else:
        assert ours == theirs


def test_a_prediction_is_what_the_pipelines_own_call_gets_and_feeds(checkpoint: Path, family: Family) -> None:
    """The arguments of the denoiser are recorded while the pipeline draws; ours must give the same output for them."""
    pipeline = plainly(checkpoint)
    theirs = Recorder(family, pipeline)
    # 3.5 is what FLUX is told as its guidance; elsewhere 1 keeps the negative prompt out of the batch.
    pipeline(list(PROMPTS), num_inference_steps=3, **family.call(3.5 if family.name == "flux" else 1.0, 4), **SMALL)
    ours = Recorder(family, family.pipeline(family.denoiser))
    conditioning = told(family, PROMPTS)
    if family.name == "sdxl":  # there guidance alone says that the empty prompt is all zeros; see test_sdxl.py
        conditioning = Conditioning({n: t.clone() for n, t in conditioning.tensors.items()})
        plain, _, pooled, _ = pipeline.encode_prompt("", None, "cpu", 1, False)
        conditioning.tensors["prompt_embeds"][1], conditioning.tensors["pooled"][1] = plain[0], pooled[0]
    assert len(theirs.calls) == 3
    for given in theirs.calls:
        x_t = theirs.picture(given["sample" if family.component == "unet" else "hidden_states"])
        times = given["timestep"].double().expand(4)
        if family.component == "unet":
            t = (times + 0.5) / family.noise.steps  # type: ignore[attr-defined]
        else:
            t = {"sd3": times / 1000, "z_image": 1 - times}.get(family.name, times).float()
        with torch.no_grad():
            prediction = family.predict(family.denoiser, x_t, t, conditioning)
        mine = ours.calls[-1]
        assert mine.keys() <= given.keys()
        assert not any(given[name] for name in given.keys() - mine.keys())
        for name in mine:
            assert_same(mine[name], given[name]) if name != "output" else None
        sign = -1 if family.name == "z_image" else 1
        torch.testing.assert_close(prediction, sign * theirs.picture(given["output"]), rtol=0, atol=1e-5)


def test_latents_decode_to_the_pictures_they_were_made_from(checkpoint: Path, family: Family) -> None:
    """By the last lines of the pipeline itself, so that scale, shift and packing must be undone as they were done."""
    pipeline = plainly(checkpoint)
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    posterior = family.encode_images(images)
    assert posterior.mean.dtype == posterior.std.dtype == torch.float32
    assert float(posterior.std.min()) > 0
    with torch.no_grad():
        frames = images[:, :, None] if family.name == "qwen_image" else images
        exact = pipeline.vae.encode(frames * 2 - 1).latent_dist
        wanted = pipeline.vae.decode(exact.mean, return_dict=False)[0].reshape(2, 3, SIDE, SIDE)
    scheduler = pipeline.scheduler
    step = scheduler.step
    ends = family.pack(posterior.mean)

    def last(*inputs: Any, **options: Any) -> Any:
        step(*inputs, **options)
        return (ends,)

    scheduler.step = last
    found = pipeline(["a", "b"], num_inference_steps=2, output_type="pt", **family.call(1.0, 2), **SMALL).images
    torch.testing.assert_close(found, (wanted / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_what_the_sampler_ended_at_comes_with_a_picture_and_decodes_to_it(checkpoint: Path, family: Family) -> None:
    """In the shape and scale of `encode_images`, so that training can take it in place of the picture's encoding."""
    how = SamplerSettings(steps=2, guidance=1.0, **SMALL)
    found = list(drawn(family.pipeline(family.denoiser), ["a", "b"], [3, 4], how, batch_size=2, progress=False))
    assert [(each.index, each.seed) for each in found] == [(0, 3), (1, 4)]
    ends = torch.stack([each.latents for each in found])
    assert ends.shape == latents(family, 2).shape
    pipeline = plainly(checkpoint)
    step = pipeline.scheduler.step

    def last(*inputs: Any, **options: Any) -> Any:
        step(*inputs, **options)
        return (family.pack(ends),)

    pipeline.scheduler.step = last
    pictures = pipeline(["a", "b"], num_inference_steps=2, **family.call(1.0, 2), **SMALL).images
    for ours, theirs in zip(found, pictures, strict=True):
        assert np.abs(np.asarray(ours.picture, int) - np.asarray(theirs, int)).max() <= 1
    assert np.abs(np.asarray(pictures[0], int) - np.asarray(pictures[1], int)).max() > 1


def test_four_at_once_are_four_alone_and_calls_repeat(family: Family) -> None:
    together, x_t, t = told(family, PROMPTS), latents(family), torch.tensor([0.1, 0.4, 0.7, 0.99])
    with torch.no_grad():
        prediction = family.predict(family.denoiser, x_t, t, together)
        assert torch.equal(prediction, family.predict(family.denoiser, x_t, t, told(family, PROMPTS)))
        assert prediction.shape == x_t.shape
        for index, prompt in enumerate(PROMPTS):
            alone = told(family, [prompt])
            one = family.predict(family.denoiser, x_t[index : index + 1], t[index : index + 1], alone)
            torch.testing.assert_close(one[0], prediction[index], rtol=0, atol=2e-5)


def test_samplers_of_diffusion_are_refused_for_flows(family: Family) -> None:
    pipeline = family.pipeline(family.denoiser)
    drawing = sample(pipeline, ["a"], [0], SamplerSettings(sampler="ddim", steps=2, **SMALL), progress=False)
    if isinstance(family.noise, FlowNoise):  # type: ignore[attr-defined]
        with pytest.raises(ConfigError, match=r"'ddim' is for diffusion models.*choose 'default'"):
            next(drawing)
    else:
        assert next(drawing)[1].size == (SIDE, SIDE)


def test_one_step_is_refused_where_the_scheduler_has_no_such_schedule(family: Family) -> None:
    pipeline = family.pipeline(family.denoiser)
    drawing = sample(pipeline, ["a"], [0], SamplerSettings(steps=1, **SMALL), progress=False)
    if pipeline.scheduler.config.get("shift_terminal"):
        with pytest.raises(ConfigError, match=r"steps is 1, and .* at least 2"):
            next(drawing)
    else:
        assert next(drawing)[1].size == (SIDE, SIDE)


def test_text_times_and_latents_matter(family: Family) -> None:
    x_t, t = latents(family, 1), torch.tensor([0.3])
    with torch.no_grad():
        base = family.predict(family.denoiser, x_t, t, told(family, ["a"]))
        for other in (
            family.predict(family.denoiser, x_t, t + 0.4, told(family, ["a"])),
            family.predict(family.denoiser, x_t, t, told(family, ["b"])),
            family.predict(family.denoiser, x_t + 0.1, t, told(family, ["a"])),
        ):
            assert not torch.allclose(base, other, atol=1e-6)


def test_noise_and_targets(family: Family) -> None:
    x0, noise = latents(family), torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    ends = family.noisy(x0, noise, torch.tensor([0.0, 1.0, 0.0, 1.0]))
    if isinstance(family.noise, FlowNoise):  # type: ignore[attr-defined]
        t = torch.tensor([0.0, 0.25, 0.5, 1.0])
        x_t, target = family.noisy(x0, noise, t)
        assert torch.equal(target, noise - x0)
        torch.testing.assert_close(x_t, x0 + t[:, None, None, None] * target, rtol=0, atol=1e-6)
        scheduler = family.pipeline(family.denoiser).scheduler
        scheduler.set_timesteps(4, mu=0.5)
        level = scheduler.sigmas[1:2]
        theirs = scheduler.scale_noise(x0[:1], scheduler.timesteps[1:2], noise[:1])
        torch.testing.assert_close(family.noisy(x0[:1], noise[:1], level)[0], theirs, rtol=0, atol=1e-6)
    clean, pure = ends[0][0] - x0[0], ends[0][1] - noise[1]
    assert float(clean.norm() / x0[0].norm()) < 0.1
    assert float(pure.norm() / noise[1].norm()) < 0.4
    assert float(pure.norm() / x0[1].norm()) < 0.1


def test_shifted_times_are_the_schedulers(family: Family) -> None:
    """At 16 x 16 latents and at 128 x 128; the pipelines' own function gives μ where the scheduler shifts dynamically.

    What a scheduler does to the levels so that the last is the one it wants is compared where that last one was next to none.
    """
    t = torch.tensor([0.9, 0.5, 0.2])
    for side in (16, 128):
        found = family.shifted(t, (side, side))
        if not isinstance(family.noise, FlowNoise):  # type: ignore[attr-defined]
            assert torch.equal(found, t)
            continue
        scheduler = family.pipeline(family.denoiser).scheduler
        keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift((side // 2) ** 2, *(scheduler.config[key] for key in keys))
        scheduler.set_timesteps(sigmas=[*t.tolist(), 1e-8], **({"mu": mu} if scheduler.config.use_dynamic_shifting else {}))
        torch.testing.assert_close(found, scheduler.sigmas[:-2], rtol=0, atol=1e-6)
        ends = family.shifted(torch.tensor([1.0, 0.0]), (side, side))
        torch.testing.assert_close(ends, torch.tensor([1.0, scheduler.config.shift_terminal or 0.0]), rtol=0, atol=1e-6)


def test_dtypes_and_parts_in_bfloat16(checkpoint: Path) -> None:
    family = load(checkpoint, torch.bfloat16)
    conditioning, x_t = told(family, ["a"]), latents(family, 1)
    texts = [tensor for name, tensor in conditioning.tensors.items() if name != GEOMETRY and tensor.is_floating_point()]
    assert {tensor.dtype for tensor in texts} == {torch.bfloat16}
    with torch.no_grad():
        half = family.predict(family.denoiser, x_t, torch.tensor([0.5]), conditioning)
        exact = load(checkpoint)
        full = exact.predict(exact.denoiser, x_t, torch.tensor([0.5]), told(exact, ["a"]))
        with torch.autocast("cpu", torch.bfloat16):
            mixed = exact.predict(exact.denoiser, x_t, torch.tensor([0.5]), told(exact, ["a"]))
    assert (half.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    for other in (half, mixed):
        assert float((other.float() - full).norm() / full.norm()) < 0.1


@LONG
def test_pictures_of_ours_are_those_of_plain_diffusers(checkpoint: Path, family: Family) -> None:
    """A seed's picture does not depend on its batch, and is what the plain pipeline draws with that seed."""
    plain = plainly(checkpoint)
    pipeline = family.pipeline(family.denoiser)
    assert type(pipeline) is type(plain)
    assert getattr(pipeline, family.component) is family.denoiser
    settings = SamplerSettings(steps=2, guidance=3.5, **SMALL)
    pictures = [dict(sample(pipeline, PROMPTS, [5, 6, 7, 8], settings, batch_size=size, progress=False)) for size in (1, 4)]
    for index, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(5 + index)
        theirs = plain([prompt], num_inference_steps=2, generator=generator, **family.call(3.5, 1), **SMALL).images[0]
        for ours in pictures:
            assert np.abs(np.asarray(ours[index], int) - np.asarray(theirs, int)).max() <= 1


@pytest.fixture
def settings(checkpoint: Path, votes: Path, tmp_path: Path) -> Callable[..., Config]:
    """A run of the tiny checkpoint on eight comparisons, validated on four others; overrides as on the command line."""
    lines = [json.loads(line) for line in votes.read_text().splitlines()]
    # Relative, because what a picture is called keys its noise, and the folder above has another name at every start.
    rows = [
        row | {side: os.path.relpath(votes.parent / row[side], tmp_path) for side in ("chosen", "rejected")} for row in lines
    ]
    for name, some in (("train", rows[:8]), ("held_out", rows[8:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))

    def make(*overrides: str) -> Config:
        tree = {
            "model": {"checkpoint": str(checkpoint)},
            "data": {
                "train": str(tmp_path / "train.jsonl"),
                "validation": str(tmp_path / "held_out.jsonl"),
                "resolution": SIDE,
            },
            "objective": {"beta": 200.0},
            "trainable": {"rank": 4},
            "train": {
                "steps": 30,
                "batch_size": 4,
                "learning_rate": 5e-3,
                "precision": "fp32",
                "caption_dropout": 0.0,
                "validation_draws": 4,
                "device": "cpu",
                "threads": 2,
            },
            "sample": {"count": 1, "steps": 2},
            "output": str(tmp_path / "run"),
        }
        return parse(tree, "test", overrides)

    return make


def ready_to_train(config: Config) -> Prepared:
    return prepare(config, make_accelerator(config, Path(config.output)), progress=False)


@LONG
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_before_any_step_the_loss_is_log_2(settings: Callable[..., Config], trainable: str) -> None:
    ready = ready_to_train(settings(f"trainable.kind={trainable}"))
    assert ready.step.self_test(ready.first_batch(), Keyed(0)) == 0.0
    loss, _ = ready.step(ready.first_batch(), Keyed(0))
    torch.testing.assert_close(loss, torch.full((4,), 2.0).log(), rtol=0, atol=1e-6)
    loss.sum().backward()
    moved = [name for name, p in trained(ready.policy).items() if p.grad is not None and p.grad.abs().max() > 0]
    if trainable == "lora":
        assert moved
        assert all("lora_B" in name for name in moved)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_all_that_is_trained_has_a_gradient_and_the_rest_could_not_matter(
    settings: Callable[..., Config], family: Family, kind: str
) -> None:
    """Data parallelism waits for every gradient. What a family calls idle can be anything without a trace in the output."""
    choose_trainable(settings(f"trainable.kind={kind}"), family, family.denoiser)
    parameters = dict(family.denoiser.named_parameters())
    learns = trained(family.denoiser)
    for name, parameter in parameters.items():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(4))
    given = latents(family), torch.tensor([0.1, 0.4, 0.7, 0.99]), told(family, PROMPTS)
    output = family.predict(family.denoiser, *given)
    output.square().mean().backward()
    assert not [name for name, parameter in learns.items() if parameter.grad is None]
    nothing = {name for name, parameter in learns.items() if not parameter.grad.any()}  # type: ignore[union-attr]
    assert nothing <= {"x_pad_token"}  # of pictures whose tokens are no multiple of 32, which these are
    still = {name: p for name, p in parameters.items() if not p.requires_grad and (kind == "full" or "lora" in name)}
    assert bool(still) is bool(family.idle)
    for parameter in still.values():
        parameter.data.normal_(generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.equal(family.predict(family.denoiser, *given), output)


@LONG
def test_a_few_pairs_are_learned(settings: Callable[..., Config]) -> None:
    """Held-out pairs share only the tint with those trained on; with the sides swapped both figures would fall."""
    before = torch.get_num_threads()
    # Two threads add up in an order of their own, and at this rate last bits grow into another run.
    learning = settings("trainable.kind=full", "train.learning_rate=1e-3", "train.steps=60", "train.threads=1")
    metrics = runs.align(learning, progress=False)["metrics"]
    torch.set_num_threads(before)
    assert metrics["eval/rewards/margins"] > 0
    assert metrics["eval/rewards/accuracies"] > 0.75


@LONG
def test_the_exported_adapter_loads_in_plain_diffusers(
    settings: Callable[..., Config], checkpoint: Path, family: Family
) -> None:
    config = settings("train.steps=3", "train.learning_rate=0.05", "trainable.alpha=6.0", "data.validation=null")
    runs.align(config, progress=False)
    plain = plainly(checkpoint)
    ours = open_checkpoint(config.output)
    draw = {"num_inference_steps": 2, **family.call(3.5, 1), **SMALL}

    def picture(pipeline: Any) -> np.ndarray:
        image: Image.Image = pipeline(["a cat"], generator=torch.Generator().manual_seed(0), **draw).images[0]
        return np.asarray(image, int)

    before = picture(plain)
    plain.load_lora_weights(Path(config.output) / "weights")
    after = picture(plain)
    ours.set_progress_bar_config(disable=True)
    assert np.abs(after - before).max() > 1
    assert np.abs(after - picture(ours)).max() <= 1
    if family.component == "unet":
        plain.unload_lora_weights()
        assert np.abs(before - picture(plain)).max() <= 1
        kohya = runs.export_kohya(Path(config.output))["file"]
        held = load_file(kohya)
        assert set(held) == KOHYA
        assert {float(value) for name, value in held.items() if name.endswith(".alpha")} == {6.0}
        plain.load_lora_weights(kohya)
        assert np.abs(after - picture(plain)).max() <= 1
    else:
        with pytest.raises(CheckpointError, match="only LoRAs of U-Nets"):
            runs.export_kohya(Path(config.output))


@LONG
def test_a_step_reads_nothing_back(settings: Callable[..., Config], no_read_back: Callable[[], Any]) -> None:
    ready = ready_to_train(settings("trainable.gradient_checkpointing=false"))
    batch, rng = ready.first_batch(), Keyed(0)
    ready.step(batch, rng)  # tables of the schedule are made once
    with no_read_back():
        if ready.family.name == "z_image":  # its transformer takes texts at their own lengths; the docstring says so
            with pytest.raises(AssertionError, match="reads back"):
                ready.step(batch, rng)
            return
        loss, _ = ready.step(batch, rng)
        loss.mean().backward()
        ready.optimizer.step()


@LONG
def test_a_compiled_denoiser_is_one_graph_for_all_prompts(family: Family) -> None:
    """What precedes code generation is the same for every backend; this one runs the graph as it is."""
    torch.compiler.reset()
    denoiser: Any = torch.compile(family.denoiser, backend="eager", fullgraph=True)
    x_t, t = latents(family, 2), torch.tensor([0.3, 0.7])
    if family.name == "z_image":  # docs/performance.md says so
        with pytest.raises(Unsupported, match="context manager"):
            family.predict(denoiser, x_t, t, told(family, ["a cat", "b"]))
        denoiser = torch.compile(family.denoiser, backend="eager")
    first = told(family, ["a cat", "b"])
    torch.testing.assert_close(
        family.predict(denoiser, x_t, t, first), family.predict(family.denoiser, x_t, t, first), rtol=0, atol=1e-5
    )
    if family.name != "z_image":
        with torch.compiler.set_stance("fail_on_recompile"):
            family.predict(denoiser, x_t, t + 0.1, told(family, ["zebra in a fog", "a thing"]))
    torch.compiler.reset()


@pytest.mark.slow
def test_adapters_learn_beside_a_quantised_base(settings: Callable[..., Config]) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra cuda is not installed")
    ready = ready_to_train(settings("model.quantize=nf4", "train.precision=bf16"))
    assert ready.step.self_test(ready.first_batch(), Keyed(0)) < 1e-3
    loss, _ = ready.step(ready.first_batch(), Keyed(0))
    loss.mean().backward()
    ups = [parameter.grad for name, parameter in ready.policy.named_parameters() if "lora_B" in name]
    reached = [gradient is not None and bool(gradient.any()) for gradient in ups]
    assert sum(reached) >= len(ups) / 2  # the texts' stream of a last block leads nowhere, quantised or not
    assert all(gradient.isfinite().all() for gradient in ups if gradient is not None)
    how = SamplerSettings(steps=2, precision="bf16", **SMALL)
    assert len(list(sample(ready.family.pipeline(ready.policy), ["a"], [0], how, progress=False))) == 1


def without_weights(checkpoint: Path, folder: Path) -> Path:
    return shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.txt", "*token*"))


def test_an_outline_has_all_shapes_and_needs_no_weights(checkpoint: Path, family: Family, tmp_path: Path) -> None:
    bare = without_weights(checkpoint, tmp_path / "bare")
    outlined = type(family).outline(bare, dtype=torch.bfloat16)
    assert (outlined.resolution, outlined.multiple) == (family.resolution, family.multiple)
    weights = outlined.denoiser.state_dict()
    assert {name: value.shape for name, value in weights.items()} == {
        name: value.shape for name, value in family.denoiser.state_dict().items()
    }
    assert {(value.device.type, value.dtype) for value in weights.values()} == {("meta", torch.bfloat16)}
    real = load(checkpoint, torch.bfloat16).encode_prompts(["a" * 400, "b"]).tensors
    found = outlined.outline_prompts(2).tensors
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in real.items()}
    pixels = torch.zeros(2, 3, SIDE, SIDE)
    assert outlined.encode_images(pixels.to("meta")).mean.shape == family.encode_images(pixels).mean.shape
    pipeline = family.pipeline(family.denoiser)
    wanted = {name: part for name, part in pipeline.components.items() if name == "vae" or name.startswith("text_encoder")}
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in outlined.outline_encoders().items()}
    assert sizes == {name: sum(p.numel() for p in part.parameters()) for name, part in wanted.items() if part is not None}


def test_nothing_is_done_that_a_plan_does_not_say(settings: Callable[..., Config], checkpoint: Path, tmp_path: Path) -> None:
    """FLOP of a real step, its backward and of encoding, against those of an outline that knows no weights."""
    ready = ready_to_train(settings("train.batch_size=2", "train.threads=1"))
    bare = without_weights(checkpoint, tmp_path / "bare")
    planned = count(outline(settings(f"model.checkpoint={bare}")))
    batch = ready.first_batch()
    ready.model.train()

    def train() -> None:
        loss, _ = ready.step(batch, Keyed(0))
        loss.mean().backward()

    done = counted(train)
    images = counted(lambda: ready.family.encode_images(torch.rand(2, 3, SIDE, SIDE)))
    prompt = "a" * 400  # every letter is a token, and so is every byte of Qwen-Image's template
    if ready.family.name == "qwen_image":  # it encodes 1024 tokens, and a plan the 256 that are kept
        template = ready.family.pipeline(ready.family.denoiser).prompt_template_encode
        prompt = "a" * (34 + 256 - len(template.format("").encode()))
    prompts = counted(lambda: ready.family.encode_prompts([prompt]))
    if ready.family.name == "z_image":  # takes texts at their own lengths, and a plan the longest
        assert 0.1 * planned.cached < done / 2 < planned.cached
    else:
        assert done == 2 * planned.cached
    assert (images, prompts) == (planned.images, planned.prompts)


def test_geometry_reaches_the_step_per_picture(settings: Callable[..., Config]) -> None:
    ready = ready_to_train(settings())
    batch = ready.first_batch()
    assert batch.geometry.shape == (4, 2, 6)
    own = torch.arange(4 * 2 * 6).view(4, 2, 6).float()
    found = ready.step.told(replace(batch, geometry=own)).tensors[GEOMETRY]
    assert torch.equal(found, own.flatten(0, 1))
