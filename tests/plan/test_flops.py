"""FLOP of the plan: the known figures of SD 1.5, and no more done by a real step than was planned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import flops
from flowalign.align.terms import Terms, needs
from flowalign.config import parse
from flowalign.families.outline import META
from flowalign.plan.flops import Flops, count, counted
from flowalign.plan.model import outline
from flowalign.rng import Keyed
from flowalign.settings import Config
from flowalign.setup import Prepared, load_family

Make = Callable[..., Prepared]
TERA = 1e12


def public(root: Path, model: str, *overrides: str) -> Config:
    """A configuration of one of the public models' settings."""
    tree = {"model": {"checkpoint": str(root / "benchmarks" / "models" / model)}, "data": {"train": "none"}}
    return parse(tree, "test", overrides)


def test_sd15_costs_what_is_known(root: Path) -> None:
    """LoRA of rank 8, one pair at 512 px: 7.29 TFLOP re-encoding, 5.04 with caches, 3.44 with the bank."""
    found = count(outline(public(root, "sd15", "trainable.rank=8")))
    assert [round(each / TERA, 2) for each in (found.re_encoded, found.cached, found.bank)] == [7.29, 5.04, 3.44]
    assert flops.row("sd15", "lora", found) in flops.table((root / "docs" / "plan.md").read_text(encoding="utf-8"))
    assert found == Flops(
        policy_forward=1_611_104_415_744,
        policy_backward=1_824_465_936_384,
        reference=1_606_546_882_560,
        images=2_233_316_933_632,
        prompts=13_298_503_680,
    )


@pytest.mark.slow
def test_the_table_of_the_page_is_what_is_counted(root: Path) -> None:
    found = [flops.row(model, kind, flops.measure(model, kind)) for model in flops.MODELS for kind in flops.KINDS]
    assert flops.table((root / "docs" / "plan.md").read_text(encoding="utf-8")) == [*flops.HEAD, *found]


PARAMETERS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sdxl": {"unet": 2_567_463_684, "text_encoder_2": 694_659_840},
    "sd3-medium": {"transformer": 2_028_328_000, "vae": 83_819_683, "text_encoder_3": 4_762_310_656},
    "flux-dev": {"transformer": 11_901_408_320},
}
"""Of the published weights."""


@pytest.mark.parametrize("model", list(PARAMETERS))
def test_settings_of_public_models_have_their_parameters(root: Path, model: str) -> None:
    family = load_family(public(root, model), META)
    modules = {family.component: family.denoiser, **family.outline_encoders()}
    sizes = {name: sum(parameter.numel() for parameter in module.parameters()) for name, module in modules.items()}
    assert sizes.items() >= PARAMETERS[model].items()


def test_one_layer_by_hand() -> None:
    """y = x W with x [3, 5], W [5, 7]: 2·3·5·7; its backward the same twice, or once for x alone."""
    x, weight = torch.empty(3, 5, device=META, requires_grad=True), torch.empty(5, 7, device=META, requires_grad=True)
    assert counted(lambda: x @ weight) == 2 * 3 * 5 * 7
    assert counted(lambda: (x @ weight).sum().backward()) == 3 * 2 * 3 * 5 * 7
    assert counted(lambda: (x @ weight.detach()).sum().backward()) == 2 * 2 * 3 * 5 * 7


def executed(ready: Prepared) -> int:
    """What one real step of the trainer and its backward pass do."""
    batch = ready.first_batch()
    ready.model.train()

    def train() -> None:
        loss, _ = ready.step(batch, Keyed(0))
        loss.mean().backward()

    return counted(train)


@pytest.mark.parametrize(
    ("trainable", "bank", "checkpointing"),
    [("lora", "null", "false"), ("lora", "1", "true"), ("full", "null", "true"), ("full", "1", "false")],
)
def test_a_step_does_what_the_plan_says(prepared: Make, trainable: str, bank: str, checkpointing: str) -> None:
    ready = prepared(
        f"trainable.kind={trainable}",
        f"reference.bank={bank}",
        f"trainable.gradient_checkpointing={checkpointing}",
    )
    found = count(outline(ready.config))
    planned = found.cached if bank == "null" else found.bank
    assert executed(ready) == 2 * planned  # two comparisons a step
    assert 0.8 * found.policy_forward < found.reference <= found.policy_forward  # less by the adapters, if any
    again = 0.9 * found.policy_forward if checkpointing == "true" else 0.0
    if trainable == "full":  # gradients of all inputs but the first, and of all weights
        assert found.policy_backward == pytest.approx(2 * found.policy_forward + again, rel=0.1)
    else:
        assert found.policy_backward < 1.5 * found.policy_forward + again


def test_chunks_cost_one_more_forward(prepared: Make) -> None:
    joint, chunked = prepared(), prepared("train.backward=chunked", "train.chunk=2")
    plain, found = (count(outline(ready.config)) for ready in (joint, chunked))
    assert executed(chunked) == 2 * found.cached
    assert found.cached == pytest.approx(plain.cached + plain.policy_forward, rel=0.01)


def test_an_objective_that_needs_no_reference_runs_none(prepared: Make) -> None:
    @needs()
    def winner(terms: Terms) -> torch.Tensor:
        return terms.policy_error[:, 0]

    ready = prepared()
    outlined = outline(ready.config)
    alone = {"objective": winner, "knobs": {}}
    found = count(replace(outlined, step=replace(outlined.step, **alone), banked=replace(outlined.banked, **alone)))
    assert found.reference == 0
    with_reference = executed(ready)
    without = executed(replace(ready, step=replace(ready.step, **alone)))
    assert without == 2 * found.cached == 2 * found.bank < with_reference


def test_the_resolution_is_the_configurations(settings: Callable[..., Config], tmp_path: Path) -> None:
    small, large = (count(outline(settings(tmp_path, f"data.resolution={side}"))) for side in (16, 32))
    assert 3.5 * small.images < large.images
    assert 3 * small.policy_forward < large.policy_forward < 6 * small.policy_forward
    assert small.prompts == large.prompts
