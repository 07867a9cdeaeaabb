"""Pipelines of every family under weights: what is added, to whom, and that it goes away again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flowalign import steered, unsteered
from flowalign.align.steer import Steered
from flowalign.data.weights import WEIGHTS
from flowalign.errors import CheckpointError, ConfigError
from flowalign.families.base import CONTEXT, Family
from flowalign.families.sampling import SamplerSettings, generator_id, sample, write_images
from flowalign.families.steer import STEER, Shift, Steering, load_steering, steering_of, write_steering
from flowalign.settings import Steer
from tests.families.test_every_family import PROMPTS, SIDE, SMALL, latents, load, plainly, told

STEERED = Steer(objectives=("clip", "style"), hidden=8, gain=1.0)
IN_WORDS = Steer(objectives=("clip", "style"), form="prompt")
WISH = {"clip": 3.0, "style": 1.0}


def a_shift(width: int, scale: float = 1.0) -> Shift:
    """One that says something."""
    shift = Shift(2, width, 8, gain=1.0)
    with torch.no_grad():
        shift.layers[-1].weight.normal_(std=scale, generator=torch.Generator().manual_seed(2))
    return shift.requires_grad_(False)


@pytest.fixture
def family(checkpoint: Path) -> Family:
    return load(checkpoint)


def saved(folder: Path, settings: Steer, shift: Shift | None) -> Path:
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / STEER).write_bytes(write_steering(settings, shift))
    return folder


def test_before_training_a_steered_denoiser_is_the_base_and_without_weights_it_stays(family: Family) -> None:
    conditioning, x_t, t = told(family, PROMPTS), latents(family), torch.full((4,), 0.6)
    assert CONTEXT in conditioning.tensors
    width = conditioning.tensors[CONTEXT].shape[-1]
    weights = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.0, 0.0], [0.5, 0.5]])
    steered = conditioning.joined(WEIGHTS, weights)
    with torch.no_grad():
        base = family.predict(family.denoiser, x_t, t, conditioning)
        fresh = Steered(family.denoiser, Shift(2, width, 8, gain=10.0))(family, x_t, t, steered)
        moved = Steered(family.denoiser, a_shift(width))(family, x_t, t, steered)
    assert torch.equal(fresh, base)
    assert torch.equal(moved[2], base[2])
    assert all((moved[place] - base[place]).abs().max() > 1e-4 for place in (0, 1, 3))


def test_what_is_added_is_the_network_written_out() -> None:
    shift, weights, tokens = a_shift(6), torch.tensor([[0.25, 0.75]]), torch.randn(1, 5, 6)
    first, _, second, _, last = shift.layers
    silu = lambda x: x * torch.sigmoid(x)  # noqa: E731
    hidden = silu(second.weight @ silu(first.weight @ torch.tensor([-0.5, 0.5]) + first.bias) + second.bias)
    shift.gain = 3.0
    torch.testing.assert_close(shift(tokens, weights), tokens + 3 * (last.weight @ hidden + last.bias))
    assert shift(tokens.bfloat16(), weights).dtype == torch.bfloat16
    made = [Shift(2, 6, 8, seed).layers[0].weight for seed in (0, 0, 1)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def texts(pipeline: Any, family: Family, **call: Any) -> list[list[torch.Tensor]]:
    """The prompts' tokens that the denoiser is given at the first step, `[l, D]` each, for each call of it."""
    calls: list[list[torch.Tensor]] = []

    def record(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        found = named.get("encoder_hidden_states", given[2] if len(given) > 2 else None)
        calls.append([row.clone() for row in found])

    call = {name: list(value) if isinstance(value, list) else value for name, value in call.items()}  # some write into them
    hook = getattr(pipeline, family.component).register_forward_pre_hook(record, with_kwargs=True)
    pipeline(list(PROMPTS), num_inference_steps=2, generator=torch.Generator().manual_seed(0), **call, **SMALL)
    hook.remove()
    return calls[: len(calls) // 2]


def test_a_steered_pipeline_shifts_prompts_and_no_negative_prompts(checkpoint: Path, family: Family, tmp_path: Path) -> None:
    pipeline = plainly(checkpoint)
    call = family.call(3.0, 4)
    if family.name == "flux":
        call |= {"true_cfg_scale": 3.0}
    call["negative_prompt"] = ["ugly"] * 4
    plain = texts(pipeline, family, **call)
    shift = a_shift(plain[0][0].shape[-1])
    before = generator_id(pipeline)
    steered(pipeline, saved(tmp_path / "run", STEERED, shift), WISH)
    told = texts(pipeline, family, **call)
    weights = torch.tensor([[0.75, 0.25]])
    kinds = []
    for ours, theirs in zip(told, plain, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            moved = not torch.equal(mine, other)
            kinds.append(moved)
            torch.testing.assert_close(mine, shift(other[None], weights)[0] if moved else other)
    assert sum(kinds) == len(PROMPTS)
    assert len(kinds) == 2 * len(PROMPTS)
    negative = plainly(checkpoint)
    alone = texts(negative, family, **{**family.call(1.0, 4)})  # the prompts, and no negative ones
    positive = [other for theirs in plain for other in theirs]
    for each in alone[0]:
        place = next(
            n for n, other in enumerate(positive) if other.shape == each.shape and torch.allclose(other, each, atol=1e-5)
        )
        assert kinds[place]
    assert generator_id(pipeline) != before
    first, *_ = pipeline.encode_prompt("a cat", device="cpu", **named(pipeline))  # outside of a drawing it is a prompt's
    second, *_ = pipeline.encode_prompt("a cat", device="cpu", **named(pipeline))
    unsteered(pipeline)
    third, *_ = pipeline.encode_prompt("a cat", device="cpu", **named(pipeline))
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[0], shift(third[0][None], weights)[0])
    assert steering_of(pipeline) is None
    for ours, theirs in zip(texts(pipeline, family, **call), plain, strict=True):
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
    assert generator_id(pipeline) == before


def named(pipeline: Any) -> dict[str, Any]:
    """Arguments that some of the pipelines have no default for."""
    kind = type(pipeline).__name__
    if kind == "StableDiffusionPipeline":
        return {"num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    return {"prompt_2": None} if kind == "FluxPipeline" else {"prompt_2": None, "prompt_3": None} if "3" in kind else {}


def test_weights_in_words_are_read_as_a_prompt_that_has_them(checkpoint: Path, family: Family, tmp_path: Path) -> None:
    run = saved(tmp_path / "run", IN_WORDS, None)
    pipeline = steered(plainly(checkpoint), run, WISH)
    told, *_ = pipeline.encode_prompt(["cat", "dog"], device="cpu", **named(pipeline))
    words = ["clip 0.8 style 0.2: cat", "clip 0.8 style 0.2: dog"]
    unsteered(pipeline)
    expected, *_ = pipeline.encode_prompt(words, device="cpu", **named(pipeline))
    assert all(torch.equal(mine, other) for mine, other in zip(told, expected, strict=True))


# ------------------------------------------------------------------------------------------------ drawing
SETTINGS = SamplerSettings(steps=2, guidance=3.0, height=SIDE, width=SIDE)


@pytest.fixture
def pipeline(folders: dict[str, Path]) -> Any:
    return plainly(folders["epsilon"])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return saved(tmp_path / "run", STEERED, a_shift(32, 5.0))


def drawn(pipeline: Any, weights: Any = None, count: int = 3) -> list[bytes]:
    prompts = ["a cat", "a dog", "b"][:count]
    return [
        picture.tobytes()
        for _, picture in sample(pipeline, prompts, [1, 2, 3][:count], SETTINGS, weights=weights, progress=False)
    ]


def test_each_picture_is_drawn_under_its_own_weights(pipeline: Any, run: Path) -> None:
    plain = drawn(pipeline)
    steered(pipeline, run)
    assert drawn(pipeline) == plain  # no weights yet
    mixed = drawn(pipeline, [{"clip": 1}, None, {"clip": 1, "style": 1}])
    assert mixed[1] == plain[1]
    assert drawn(steered(pipeline, run, {"clip": 2.0}), None)[0] == mixed[0]
    assert drawn(steered(pipeline, run, {"clip": 0.5, "style": 0.5}))[2] == mixed[2]
    assert len({mixed[0], drawn(pipeline)[0], plain[0]}) == 3
    assert drawn(unsteered(pipeline)) == plain


def test_several_pictures_of_a_prompt_are_under_its_weights(pipeline: Any, run: Path) -> None:
    steering = steering_of(steered(pipeline, run, {"clip": 1}))
    assert steering is not None
    plain, _ = type(pipeline).encode_prompt(pipeline, ["a", "b"], "cpu", 2, False)
    with steering.under(((1.0, 0.0), (0.0, 0.0))):
        told, _ = pipeline.encode_prompt(["a", "b"], "cpu", 2, False)
    assert torch.equal(told[2:], plain[2:])
    torch.testing.assert_close(told[:2], steering.shift(plain[:2], torch.tensor([[1.0, 0.0]] * 2)))  # type: ignore[misc]
    with steering.under(((1.0, 0.0),) * 3), pytest.raises(ConfigError, match="weights for 3 prompts, and 4 pictures"):
        pipeline.encode_prompt(["a", "b"], "cpu", 2, False)


def test_the_table_says_under_which_weights_a_picture_was_drawn(pipeline: Any, run: Path, tmp_path: Path) -> None:
    import json

    steered(pipeline, run)
    arguments = (tmp_path / "out", pipeline, ["a", "a"], [1, 1], SETTINGS)
    write_images(*arguments, weights=[{"clip": 3, "style": 1}, None], progress=False)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert rows[0]["weights"] == {"clip": 0.75, "style": 0.25}
    assert "weights" not in rows[1]
    time = (tmp_path / "out" / "00000-1.png").stat().st_mtime_ns
    write_images(*arguments, weights=[{"clip": 6, "style": 2}, {"style": 1}], progress=False)
    assert (tmp_path / "out" / "00000-1.png").stat().st_mtime_ns == time
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert rows[1]["weights"] == {"clip": 0.0, "style": 1.0}


def test_what_cannot_be_steered_is_said_in_a_sentence(pipeline: Any, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"weights name 'clib'.*did you mean 'clip'\? allowed: clip, style"):
        steered(pipeline, run, {"clib": 1})
    with pytest.raises(ConfigError, match="the weight of clip is -1"):
        steered(pipeline, run, {"clip": -1})
    with pytest.raises(ConfigError, match="all weights are 0; give one above 0 to any of clip, style"):
        steered(pipeline, run, {"clip": 0})
    with pytest.raises(CheckpointError, match=f"holds no {STEER}; give the folder of a finished run with a section steer"):
        steered(pipeline, tmp_path, {"clip": 1})
    with pytest.raises(ConfigError, match="weights of clip are given, and what draws knows none"):
        drawn(pipeline, [{"clip": 1}] * 3)
    steered(pipeline, run, {"clip": 1})
    with pytest.raises(ConfigError, match="weights for 2 of 3 pictures; give one for each"):
        drawn(pipeline, [{"clip": 1}] * 2)
    other = saved(tmp_path / "other", STEERED, a_shift(31))
    with pytest.raises(CheckpointError, match="tokens of 31 numbers, and this pipeline's have 32"):
        drawn(steered(pipeline, other, {"clip": 1}))
    save_file({"a": torch.zeros(1)}, run / "weights" / STEER)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_steering(run)


def test_saved_and_loaded_it_is_the_same(run: Path) -> None:
    loaded = load_steering(run / "weights")
    assert loaded.settings == STEERED
    assert loaded.shift is not None
    before = a_shift(32, 5.0).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.shift.state_dict().items())
    assert loaded.fingerprint == Steering(STEERED, a_shift(32, 5.0)).fingerprint
    assert loaded.fingerprint != Steering(STEERED, a_shift(32, 4.0)).fingerprint
