"""The compiled step: one graph per module and mode, made once, that gives what the plain step gives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import islice

import pytest
import torch
from torch._dynamo.utils import counters

from flowalign.rng import Keyed
from flowalign.setup import Prepared
from flowalign.train.trainable import trained
from flowalign.watch import validation

Make = Callable[..., Prepared]


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def perturb(ready: Prepared) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trained(ready.policy).values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def train(ready: Prepared, position: int) -> None:
    ready.model.train()
    for batch in islice(ready.batches(position), 3):
        loss, _ = ready.step(batch, Keyed(0))
        loss.mean().backward()
        ready.optimizer.step()
        ready.optimizer.zero_grad(set_to_none=True)


def test_the_graphs_are_whole_and_made_once(prepared: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What precedes code generation is the same for every backend; this one runs the graphs as they are."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    ready = prepared("train.compile=true")
    train(ready, 0)
    assert counters["stats"]["unique_graphs"] == 2  # policy and reference
    assert not counters["graph_break"]
    with torch.compiler.set_stance("fail_on_recompile"):
        train(ready, 6)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_validation_between_steps_makes_no_graph_anew(prepared: Make, monkeypatch: pytest.MonkeyPatch, trainable: str) -> None:
    """Nor does its last batch, which is smaller: each is compiled once and kept."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    ready = prepared("train.compile=true", f"trainable.kind={trainable}", "train.batch_size=5")

    def work(position: int) -> None:
        train(ready, position)
        ready.model.eval()
        validation(ready.step, ready.held_out, ready.config, ready.accelerator)

    work(0)
    made = counters["stats"]["unique_graphs"]
    # Policy and reference, each for a full batch and for the smaller one, and the policy with gradients and without.
    assert 2 <= made <= 5
    assert not counters["graph_break"]
    with torch.compiler.set_stance("fail_on_recompile"):
        work(15)
    assert counters["stats"]["unique_graphs"] == made


@pytest.mark.slow
@pytest.mark.parametrize(("trainable", "timesteps"), [("lora", "importance"), ("full", "auto")])
def test_compiled_losses_and_gradients_are_those_of_the_plain_step(prepared: Make, trainable: str, timesteps: str) -> None:
    found = []
    for switch in ("false", "true"):
        settings = (f"trainable.kind={trainable}", f"train.timesteps={timesteps}", "train.batch_size=4")
        ready = prepared(f"train.compile={switch}", *settings)
        ready.model.train()
        perturb(ready)
        loss, _ = ready.step(ready.first_batch(), Keyed(0))
        loss.mean().backward()
        found.append((loss.detach(), {name: parameter.grad for name, parameter in trained(ready.policy).items()}))
    (plain, one), (compiled, other) = found
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-4)
