"""Inverted noise against diffusers' inversion, an exact solution, and the way back; stored noise; and both in the step."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor

from flowalign import runs
from flowalign.align.inversion import inverted
from flowalign.align.step import PreferenceStep
from flowalign.data.batch import Batch
from flowalign.errors import ConfigError
from flowalign.families.loading import open_checkpoint
from flowalign.families.noise import DiscreteNoise, FlowNoise, Noise
from flowalign.families.sampling import SamplerSettings, write_images
from flowalign.rng import Keyed
from flowalign.settings import Config
from flowalign.setup import Prepared
from flowalign.watch import validation
from tests.conftest import schedulers
from tests.families.conftest import sd3

Make = Callable[..., Prepared]
INVERTED = "switches.noise=inverted"


def path_of(kind: str) -> Noise:
    if kind == "flow":
        return FlowNoise(FlowMatchEulerDiscreteScheduler(shift=3.0))
    return DiscreteNoise(kind, schedulers()[kind])


def gaussian(noise: Noise, kind: str, spread: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The best denoiser of latents that are N(0, spread²)."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        signal, sigma = noise.scales(t, x)
        total = signal**2 * spread**2 + sigma**2
        x0, eps = signal * spread**2 * x / total, sigma * x / total
        return {"epsilon": eps, "v_zero_snr": signal * eps - sigma * x0, "flow": eps - x0}[kind]

    return predict


@pytest.mark.parametrize("kind", ["epsilon", "v_zero_snr", "flow"])
def test_inversion_tends_to_the_exact_solution_and_back_to_the_picture(kind: str) -> None:
    """The spread of N(0, s²) along the way is √(a²s² + b²), so x_t = x0 √(a²s² + b²) / s; at every t of the batch at once."""
    spread, noise = 0.4, path_of(kind)
    predict = gaussian(noise, kind, spread)
    x0 = spread * torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.03, 0.2, 0.4, 0.6, 0.8, 0.97])
    signal, sigma = noise.scales(t, x0)
    exact = x0 * (signal**2 * spread**2 + sigma**2).sqrt() / spread
    arrived, returned = [], []
    for steps in (20, 80, 320):
        there = noise.noisy(x0, inverted(noise, predict, x0, t, steps), t)[0]
        arrived.append(float((there - exact).square().mean() / exact.square().mean()) ** 0.5)
        x = there
        for step in range(steps, 0, -1):  # DDIM by hand: solve for x0 and ε, put them together at the next time
            (a, b), told = noise.scales(t * (step / steps), x0), predict(x, t * (step / steps))
            eps = noise.implied(x, told, a, b)
            clean = (x - b * eps) / a
            a, b = noise.scales(t * ((step - 1) / steps), x0) if step > 1 else (1.0, 0.0)
            x = a * clean + b * eps
        returned.append(float((x - x0).square().mean() / x0.square().mean()) ** 0.5)
    for errors in (arrived, returned):
        assert errors[2] < errors[1] < errors[0]
        assert errors[2] < errors[0] / 3
        assert errors[2] < 0.015


def tiny_predict(prepared: Make, folder: Path) -> tuple[Prepared, Callable[[Tensor, Any], Tensor], Tensor]:
    ready = prepared(f"model.checkpoint={folder}", "train.caption_dropout=0", "train.batch_size=2")
    batch = ready.first_batch()
    x0, conditioning = batch.mean[:, 0], ready.step.told(batch)[::2]

    def predict(x: Tensor, t: Any) -> Tensor:
        with torch.no_grad():
            return ready.family.predict(ready.family.denoiser, x, t, conditioning)

    return ready, predict, x0


def trailing(kind: str) -> dict[str, Any]:
    """Settings of the checkpoint's schedule for diffusers' DDIM, from all noise to no noise."""
    kept = {name: value for name, value in schedulers()[kind].config.items() if not name.startswith("_")}
    return kept | {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}


@pytest.mark.parametrize("kind", ["epsilon", "v_zero_snr"])
def test_grid_steps_are_those_of_diffusers_inverse_scheduler(prepared: Make, folders: dict[str, Path], kind: str) -> None:
    """Its grid of ten times, spaced trailing, is ours for a t in the last tenth-thousandth of the schedule."""
    ready, predict, x0 = tiny_predict(prepared, folders[kind])
    oracle = DDIMInverseScheduler.from_config(trailing(kind))
    oracle.set_timesteps(10)
    total = oracle.config.num_train_timesteps
    unet = UNet2DConditionModel.from_pretrained(folders[kind], subfolder="unet").eval()
    embeds = ready.step.told(ready.first_batch()).tensors["prompt_embeds"][::2]
    x = x0
    for time in oracle.timesteps:
        with torch.no_grad():
            x = oracle.step(unet(x, time, embeds).sample, int(time), x).prev_sample
    t = torch.full((2,), 1 - 0.5 / total)
    noise = inverted(ready.family, predict, x0, t, 10)
    torch.testing.assert_close(ready.family.noisy(x0, noise, t)[0], x, rtol=1e-4, atol=1e-4)
    assert float((x - x0).abs().mean()) > 0.1


@pytest.mark.parametrize("kind", ["epsilon", "v_zero_snr"])
def test_diffusers_sampling_from_there_draws_the_picture(prepared: Make, folders: dict[str, Path], kind: str) -> None:
    """From half way, by the U-Net: near pure noise an untrained one that predicts ε says nothing about the picture."""
    ready, predict, x0 = tiny_predict(prepared, folders[kind])
    x0 = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))  # as spread as latents of a trained VAE
    scheduler, off = DDIMScheduler.from_config(trailing(kind)), []
    total = scheduler.config.num_train_timesteps
    t = torch.full((2,), 0.5 - 0.5 / total)
    for steps in (5, 25):
        scheduler.set_timesteps(2 * steps)
        x = start = ready.family.noisy(x0, inverted(ready.family, predict, x0, t, steps), t)[0]
        for time in scheduler.timesteps[-steps:]:
            told = predict(x, torch.full((2,), (int(time) + 0.5) / total))
            x = scheduler.step(told, int(time), x).prev_sample
        off.append(float((x - x0).abs().mean() / (start - x0).abs().mean()))
    assert off[1] < off[0] / 3
    assert off[1] < 0.15


def times_told(ready: Prepared) -> list[Tensor]:
    told: list[Tensor] = []
    ready.family.denoiser.register_forward_pre_hook(lambda _, inputs, options: told.append(inputs[1]), with_kwargs=True)
    return told


def test_the_last_step_ends_at_the_time_itself(prepared: Make) -> None:
    """Each picture at its own t, whatever the grid: x_t, the target and the noise must be those of that time."""
    ready = prepared(INVERTED, "switches.inversion_steps=3", "train.batch_size=6")
    batch, told = ready.first_batch(), times_told(ready)
    known = ready.step.with_noise(batch, Keyed(0))
    _, target, t = ready.step.noised(known, Keyed(0))
    wanted = ready.family.noise.timesteps(t)
    assert len(told) == 3
    assert torch.equal(told[2], wanted)
    assert torch.equal(told[0], (t * (1 / 3) * 1000).long())
    assert len(set(wanted.tolist())) == 6  # pictures of a comparison share it
    assert known.noise is not None
    assert torch.equal(target, known.noise.flatten(0, 1))
    chosen, rejected = known.noise.unbind(1)
    assert float((chosen - rejected).abs().mean()) > 1e-3
    assert not known.noise.requires_grad
    alone = Batch(**{name: value[:1] if value is not None else None for name, value in vars(batch).items()})
    torch.testing.assert_close(ready.step.with_noise(alone, Keyed(0)).noise, known.noise[:1], rtol=1e-3, atol=1e-4)
    told.clear()
    ready.step.terms(batch, Keyed(0))
    assert len(told) == 3 + 1  # and the reference's own prediction


def test_flows_are_inverted_too(prepared: Make, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sd3(with_t5=False).save_pretrained(tmp_path / "sd3")
    ready = prepared(INVERTED, "switches.inversion_steps=2", f"model.checkpoint={tmp_path / 'sd3'}", "data.resolution=32")
    batch = ready.step.with_noise(ready.first_batch(), Keyed(0))
    x_t, target, t = ready.step.noised(batch, Keyed(0))
    x0, t = ready.step._drawn(batch, Keyed(0))[0], t.view(-1, 1, 1, 1)

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        return ready.step._anchor(x, time.flatten(), ready.step.told(batch), lambda predicted: predicted.flatten(1).mean(1))[1]

    halfway = x0 + t / 2 * velocity(x0, t / 2)  # Euler by hand
    torch.testing.assert_close(x_t, halfway + t / 2 * velocity(halfway, t), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(target, (x_t - x0) / t, rtol=1e-3, atol=1e-3)
    assert ready.step.self_test(ready.first_batch(), Keyed(0)) == 0.0


def test_a_bank_holds_the_noise_and_trains_as_without(prepared: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full fine-tune, which with a bank has no reference to invert with."""
    common = (f"data.cache={tmp_path / 'cache'}", INVERTED, "switches.inversion_steps=2", "trainable.kind=full")
    common = (*common, "train.batch_size=5", "train.caption_dropout=0.5", "data.flip=true")
    ready, live = prepared("reference.bank=2", *common), prepared(*common)
    assert ready.step.self_test(ready.first_batch(), Keyed(0)) < 1e-3
    assert ready.step.reference is None
    told = times_told(ready)
    for batch in islice(ready.batches(0), 3):
        stored, found = (step.with_noise(batch, Keyed(0)).noise for step in (ready.step, live.step))
        torch.testing.assert_close(stored, found, rtol=1e-4, atol=1e-4)
        stored, found = (step.terms(batch, Keyed(0)).reference_error for step in (ready.step, live.step))
        torch.testing.assert_close(stored, found, rtol=1e-4, atol=1e-5)
    assert len(told) == 3  # the policy alone, which is the checkpoint's own module
    assert validation(ready.step, ready.held_out, ready.config, ready.accelerator, ready.held_out_bank)["loss"] > 0

    def ran(self: PreferenceStep, batch: Batch, rng: Keyed) -> Any:
        raise RuntimeError("the reference ran")

    monkeypatch.setattr(PreferenceStep, "for_bank", ran)
    prepared("reference.bank=2", *common)
    for change in ("switches.inversion_steps=3", "switches.noise=shared"):
        with pytest.raises(RuntimeError, match="the reference ran"):
            prepared("reference.bank=2", *common, change)


def drawn(folder: Path, to: Path, side: int) -> tuple[str, dict[int, Tensor]]:
    """Comparisons of pictures that the checkpoint drew, and of each seed the latents that its U-Net was given first."""
    pipeline, given = open_checkpoint(folder), {}
    seeds = iter(range(5, 9))
    pipeline.unet.register_forward_pre_hook(lambda _, inputs: given.update({next(seeds): inputs[0][0].clone()}))
    settings = SamplerSettings(sampler="ddim", steps=1, guidance=1.0, height=side, width=side)
    write_images(to, pipeline, ["a", "a", "b", "b"], range(5, 9), settings, batch_size=1, progress=False)
    made = [json.loads(line) for line in (to / "metadata.jsonl").read_text().splitlines()]
    pairs = [
        {"prompt": chosen["prompt"]}
        | {side: row["file_name"] for side, row in (("chosen", chosen), ("rejected", rejected))}
        | {f"{side}_seed": row["seed"] for side, row in (("chosen", chosen), ("rejected", rejected))}
        for chosen, rejected in zip(made[::2], made[1::2], strict=True)
    ]
    (to / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return str(to / "pairs.jsonl"), given


def test_stored_noise_is_what_the_sampler_started_from(prepared: Make, folders: dict[str, Path], tmp_path: Path) -> None:
    pairs, given = drawn(folders["epsilon"], tmp_path / "made", 16)
    data = (f"data.train={pairs}", f"data.validation={pairs}", f"data.cache={tmp_path / 'cache'}")
    ready = prepared("switches.noise=stored", *data)
    for step, batch in ((ready.step, ready.first_batch()), (ready.step.on_held_out(), ready.first_batch())):
        x_t, target, t = step.noised(batch, Keyed(0))
        first = list(ready.train.cached.ids).index(batch.ids[0]) == 0
        own = torch.stack([given[seed] for seed in ((5, 6, 7, 8) if first else (7, 8, 5, 6))])
        assert torch.equal(target, own)  # of an ε-model the target is the noise
        assert torch.equal(x_t, ready.family.noisy(step._drawn(batch, Keyed(0))[0], own, t)[0])
    banked = prepared("switches.noise=stored", "reference.bank=2", *data)
    assert banked.step.self_test(banked.first_batch(), Keyed(0)) < 1e-3
    with pytest.raises(ConfigError, match=r"a mirrored picture was drawn from none; set data\.flip=false"):
        prepared("switches.noise=stored", "data.flip=true", *data)


def test_a_model_of_the_picture_itself_is_not_inverted(prepared: Make, folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="predicts just that, which says nothing about noise there"):
        prepared(INVERTED, f"model.checkpoint={folders['sample']}")


def test_inversion_reads_nothing_back(prepared: Make, no_read_back: Any) -> None:
    ready = prepared(INVERTED, "switches.inversion_steps=2")
    batch = ready.first_batch()
    ready.step(batch, Keyed(0))
    with no_read_back():
        ready.step(batch, Keyed(0))[0].mean().backward()


def test_a_plan_counts_the_inversion_and_what_is_attached(settings: Callable[..., Config], tmp_path: Path) -> None:
    found = {}
    for noise, mask in (("shared", "none"), ("stored", "given"), ("inverted", "none")):
        switches = (f"switches.noise={noise}", f"switches.mask={mask}", "switches.inversion_steps=4")
        found[noise] = SimpleNamespace(**runs.plan(settings(tmp_path / "run", *switches, "reference.bank=2")))
    flops = {noise: plan.flops_per_comparison for noise, plan in found.items()}
    assert flops["inverted"]["reference"] == 5 * flops["shared"]["reference"] > 0
    assert flops["inverted"]["configured"] == flops["shared"]["configured"] == flops["stored"]["configured"]
    assert found["inverted"].run["reference_forwards"]["per_draw"] == 5 * found["shared"].run["reference_forwards"]["per_draw"]
    noise, mask = 4 * 4 * 8 * 8, 4 * 8 * 8  # bytes
    assert found["stored"].disk["per_picture"] - found["shared"].disk["per_picture"] == noise + mask
    draws = 12 * 2 + 12  # of training and of validation
    assert found["inverted"].disk["bank"] - found["shared"].disk["bank"] == draws * 2 * noise
