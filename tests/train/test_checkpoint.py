"""Saved state: all of it comes back, in the right place, or is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flowalign.errors import CheckpointError
from flowalign.settings import Train
from flowalign.train.checkpoint import State, load, save, states
from flowalign.train.optimizer import make_optimizer

ABOUT: dict[str, object] = {
    "objective": {"name": "dpo", "beta": 2000.0},
    "pairs_per_step": 8,
    "train": {"adam_betas": (0.9, 0.99)},
}


def convolution(*, ema: bool = True, seed: int = 0) -> tuple[nn.Module, State]:
    """Weights in channels_last, as runs have them, trained by the fused optimiser, which walks through raw memory."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 2, 3)).to(memory_format=torch.channels_last)
    parameters = dict(model.named_parameters())
    averages = {name: parameter.detach().clone() for name, parameter in parameters.items()} if ema else None
    return model, State(parameters, torch.optim.AdamW(parameters.values(), lr=0.01, fused=True), averages)


def train(model: nn.Module, state: State, steps: int) -> None:
    for _ in range(steps):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(state.step))
        model(x.contiguous(memory_format=torch.channels_last)).square().mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1


def weights(state: State) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in state.parameters.items()}


def test_training_goes_on_in_the_same_bits_whatever_the_memory_format(tmp_path: Path) -> None:
    model, state = convolution()
    train(model, state, 3)
    save(tmp_path, state, ABOUT, 2)
    train(model, state, 3)
    other_model, other = convolution(seed=9)
    load(states(tmp_path)[-1], other, ABOUT)
    assert other.step == 3
    train(other_model, other, 3)
    for name, tensor in weights(state).items():
        assert torch.equal(weights(other)[name], tensor), name
        for slot in ("exp_avg", "exp_avg_sq"):
            one, two = (each.optimizer.state[each.parameters[name]][slot] for each in (state, other))
            assert torch.equal(one, two)
            assert one.stride() == two.stride()


def test_a_state_holds_every_number_that_training_needs(tmp_path: Path) -> None:
    model, state = convolution()
    train(model, state, 2)
    found = load_file(save(tmp_path, state, ABOUT, 1) / "state.safetensors")
    kinds = ("parameter", "ema", "optimizer/exp_avg", "optimizer/exp_avg_sq", "optimizer/step")
    assert set(found) == {f"{kind}/{name}" for kind in kinds for name in state.parameters}
    assert found["optimizer/step/0.weight"].item() == 2
    assert torch.equal(found["parameter/1.bias"], state.parameters["1.bias"].detach())


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("begins", ["anew", "goes back"])
def test_moments_of_8_bits_go_on_in_the_same_bits(tmp_path: Path, begins: str) -> None:
    """Moments lie as weights do, also of layers in channels_last: on a GPU bitsandbytes goes through both as they lie."""

    def wide(seed: int) -> tuple[nn.Module, State]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3)).to(memory_format=torch.channels_last)
        parameters = dict(model.named_parameters())
        cfg = Train(optimizer="adamw8bit", learning_rate=0.01)
        return model, State(parameters, make_optimizer(cfg, list(parameters.values()), torch.device("cpu")), None)

    model, state = wide(0)
    train(model, state, 3)
    found = load_file(save(tmp_path, state, ABOUT, 2) / "state.safetensors")
    assert {name: found[f"optimizer/state2/{name}"].dtype for name in state.parameters} == {
        name: torch.uint8 if name == "1.weight" else torch.float32 for name in state.parameters
    }
    assert found["optimizer/absmax2/1.weight"].shape == (9216 / 256,)
    train(model, state, 3)
    expected = weights(state)
    other_model, other = (model, state) if begins == "goes back" else wide(9)
    load(states(tmp_path)[-1], other, ABOUT)
    steps = [other.optimizer.state[parameter]["step"] for parameter in other.parameters.values()]
    assert steps == [3] * 4
    assert all(isinstance(step, int) for step in steps)
    train(other_model, other, 3)
    for name, tensor in expected.items():
        assert torch.equal(weights(other)[name], tensor), name
        parameter = other.parameters[name]
        assert other.optimizer.state[parameter]["state1"].stride() == parameter.stride()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"objective": {"name": "dpo", "beta": 500.0}}, "objective.beta was 2000.0 and is 500.0"),
        ({"objective": {"name": "ipo", "tau": 500.0}}, "objective.name was dpo and is ipo"),
        ({"pairs_per_step": 16}, "pairs_per_step was 8 and is 16"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    model, state = convolution()
    train(model, state, 1)
    path = save(tmp_path, state, ABOUT, 1)
    _, other = convolution(seed=1)
    before = weights(other)
    with pytest.raises(CheckpointError, match=said) as caught:
        load(path, other, ABOUT | change)
    assert str(path) in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(other).items())
    load(path, other, dict(ABOUT))  # a tuple that JSON made a list of is no difference


def test_other_parameters_are_refused(tmp_path: Path) -> None:
    model, state = convolution(ema=False)
    train(model, state, 1)
    path = save(tmp_path, state, ABOUT, 1)
    with pytest.raises(CheckpointError, match="4 parameters were saved and 8 are here"):
        load(path, convolution(ema=True)[1], ABOUT)


def test_what_a_killed_save_left_behind_is_no_state(tmp_path: Path) -> None:
    model, state = convolution()
    train(model, state, 1)
    whole = save(tmp_path, state, ABOUT, 5)
    for name in (".step-00000002.k3j2.tmp", ".step-00000001.x.old", "step-2", "step-00000002.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.safetensors").write_bytes((whole / "state.safetensors").read_bytes()[:100])
    assert states(tmp_path) == [whole]
    load(states(tmp_path)[-1], convolution()[1], ABOUT)


@pytest.mark.parametrize("damage", ["cut", "missing", "no json"])
def test_a_damaged_state_is_one_sentence(tmp_path: Path, damage: str) -> None:
    model, state = convolution()
    train(model, state, 1)
    path = save(tmp_path, state, ABOUT, 1)
    if damage == "cut":
        (path / "state.safetensors").write_bytes((path / "state.safetensors").read_bytes()[:100])
    elif damage == "missing":
        (path / "about.json").unlink()
    else:
        (path / "about.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot be read .*delete that folder and resume again"):
        load(path, convolution()[1], ABOUT)
