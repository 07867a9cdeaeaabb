"""Every objective against its formula written out, the identities of its family, and another library's implementation."""

from __future__ import annotations

import ast
import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign import plugins
from flowalign.align.terms import Terms

POLICY = [[0.30, 0.42], [0.51, 0.50], [0.20, 0.29], [0.90, 0.70]]
REFERENCE = [[0.31, 0.40], [0.50, 0.52], [0.20, 0.29], [0.85, 0.71]]
MARGINS = [0.5 * ((r[0] - p[0]) - (r[1] - p[1])) for p, r in zip(POLICY, REFERENCE, strict=True)]  # Δ, by hand
NAMES = ("dpo", "hinge", "ipo")


def terms(preference: float = 1.0, policy: Any = POLICY, reference: Any = REFERENCE) -> Terms:
    policy, reference = torch.as_tensor(policy), torch.as_tensor(reference)
    return Terms(policy, reference, None, torch.full((len(policy),), preference))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def objective(name: str, *args: Any, **knobs: float) -> Tensor:
    return plugins.load("objectives", name)(*args, **knobs)


def test_the_folder_holds_what_is_tested_here() -> None:
    assert plugins.names("objectives") == NAMES


def test_dpo_is_its_formula() -> None:
    beta = 40.0
    expected = [-math.log(sigmoid(beta * margin)) for margin in MARGINS]
    assert objective("dpo", terms(), beta=beta).tolist() == pytest.approx(expected, rel=1e-5)


def test_dpo_equals_the_published_codes_beta_conventions() -> None:
    # Diffusion-DPO and the diffusers SDXL script: −log σ(−½·β·m), m = (e_w − e_ref,w) − (e_l − e_ref,l); SD 1.5 script: no ½.
    m = torch.tensor([(p[0] - r[0]) - (p[1] - r[1]) for p, r in zip(POLICY, REFERENCE, strict=True)])
    ours = objective("dpo", terms(), beta=50.0)
    torch.testing.assert_close(ours, -torch.nn.functional.logsigmoid(-0.5 * 50.0 * m))
    torch.testing.assert_close(ours, -torch.nn.functional.logsigmoid(-25.0 * m))


def test_label_smoothing_is_conservative_dpo() -> None:
    beta, eps = 40.0, 0.1
    expected = [-(1 - eps) * math.log(sigmoid(beta * d)) - eps * math.log(sigmoid(-beta * d)) for d in MARGINS]
    assert objective("dpo", terms(), beta=beta, label_smoothing=eps).tolist() == pytest.approx(expected, rel=1e-5)


def test_label_smoothing_of_a_vote_is_a_soft_label() -> None:
    smoothed = objective("dpo", terms(1.0), beta=40.0, label_smoothing=0.2)
    torch.testing.assert_close(smoothed, objective("dpo", terms(0.8), beta=40.0))


def test_ipo_is_its_formula_at_zero_and_at_its_minimum() -> None:
    tau = 25.0
    assert objective("ipo", terms(), tau=tau).tolist() == pytest.approx([(d - 1 / (2 * tau)) ** 2 for d in MARGINS], rel=1e-4)
    at = lambda margin: objective("ipo", terms(policy=[[0.5, 0.5 + 2 * margin]], reference=[[0.5, 0.5]]), tau=tau).item()  # noqa: E731
    assert at(0.0) == pytest.approx(1 / (4 * tau**2))
    assert at(1 / (2 * tau)) == pytest.approx(0.0, abs=1e-12)


def test_hinge_is_its_formula() -> None:
    expected = [max(0.0, 1 - 40.0 * d) for d in MARGINS]
    assert objective("hinge", terms(), beta=40.0).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("beta", [1.0, 2000.0])
def test_dpo_is_log_2_where_policy_and_reference_agree(beta: float) -> None:
    same = terms(policy=REFERENCE)
    torch.testing.assert_close(objective("dpo", same, beta=beta), torch.full((4,), math.log(2)))
    assert same.margin.abs().max() == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_soft_label_is_the_expectation_over_votes(name: str) -> None:
    swapped = terms(policy=torch.tensor(POLICY).flip(1), reference=torch.tensor(REFERENCE).flip(1))
    mixed = 0.3 * objective(name, terms()) + 0.7 * objective(name, swapped)
    torch.testing.assert_close(objective(name, terms(0.3)), mixed)


@pytest.mark.parametrize("name", NAMES)
def test_a_tie_does_not_care_which_picture_is_first(name: str) -> None:
    swapped = terms(0.5, torch.tensor(POLICY).flip(1), torch.tensor(REFERENCE).flip(1))
    torch.testing.assert_close(objective(name, terms(0.5)), objective(name, swapped))


@pytest.mark.parametrize("name", NAMES)
def test_gradient_lowers_the_chosen_error_and_raises_the_rejected_one(name: str) -> None:
    policy = torch.tensor(REFERENCE, requires_grad=True)
    objective(name, Terms(policy, torch.tensor(REFERENCE), None, torch.ones(4))).sum().backward()
    assert policy.grad is not None
    assert (policy.grad[:, 0] > 0).all()  # descending makes the chosen error smaller
    assert (policy.grad[:, 1] < 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_adding_a_constant_to_policy_and_reference_changes_nothing(name: str) -> None:
    moved = terms(policy=torch.tensor(POLICY) + 0.5, reference=torch.tensor(REFERENCE) + 0.5)
    torch.testing.assert_close(objective(name, moved), objective(name, terms()), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_unreduced(name: str) -> None:
    assert objective(name, terms()).shape == (4,)
    assert objective(name, terms()).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "trl_name", "knobs"),
    [("dpo", "sigmoid", {"beta": 0.7}), ("hinge", "hinge", {"beta": 0.7}), ("ipo", "ipo", {"tau": 0.7})],
)
def test_agrees_with_trl(name: str, trl_name: str, knobs: dict[str, float]) -> None:
    h = terms().log_ratio
    torch.testing.assert_close(objective(name, terms(), **knobs), trl_loss(trl_name, h[:, 0], h[:, 1], 0.7))


def trl_loss(name: str, chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Run TRL's own branch for one loss. It lies in the middle of a long method, so it is taken out of the syntax tree."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("TRL is not installed; pip install trl to compare with its losses")
    tree = ast.parse((Path(spec.origin).parent / "trainer" / "dpo_trainer.py").read_text("utf-8"))
    wanted = f"loss_type == {name!r}"
    (branch,) = (node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == wanted)
    scope = {
        "F": torch.nn.functional,
        "torch": torch,
        "self": SimpleNamespace(beta=beta),
        "chosen_scores": chosen,
        "rejected_scores": rejected,
        "delta_score": chosen - rejected,
        "completion_mask": torch.ones(2 * len(chosen), 1),
    }
    exec(compile(ast.Module(branch.body, []), spec.origin, "exec"), scope)
    result = scope["per_sequence_loss"]
    assert isinstance(result, Tensor)
    return result
