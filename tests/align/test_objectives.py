"""Every objective in the folder, and one of another package, against the same contract; the terms that they are made of."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign import plugins
from flowalign.align.terms import NEEDS, Terms, carries, needs, tangent_exp
from tests.align.objective_plain import Comparison, slack
from tests.align.objective_rows import ROWS, SHAPES, Row, comparisons, example

POLICY = [[0.30, 0.42], [0.51, 0.50], [0.20, 0.29], [0.90, 0.70]]
REFERENCE = [[0.31, 0.40], [0.50, 0.52], [0.20, 0.29], [0.85, 0.71]]
MARGINS = [0.5 * ((r[0] - p[0]) - (r[1] - p[1])) for p, r in zip(POLICY, REFERENCE, strict=True)]  # Δ, by hand
NAMES = tuple(ROWS)
ERRORS = ("policy_error", "reference_error", "drift")


def terms(preference: float = 1.0, policy: Any = POLICY, reference: Any = REFERENCE) -> Terms:
    policy, reference = torch.as_tensor(policy), torch.as_tensor(reference)
    return Terms(policy, reference, None, torch.full((len(policy),), preference))


def objective(name: str, *args: Any, **knobs: Any) -> Tensor:
    return plugins.load("objectives", name)(*args, **knobs)


def scalars(carried: Mapping[str, float] | None, like: Tensor) -> list[dict[str, Tensor]]:
    """What follows the terms in a call: nothing, or the carried scalars."""
    return [] if carried is None else [{name: like.new_tensor(value) for name, value in carried.items()}]


def call(function: Callable[..., Tensor], row: Row, made: Terms) -> Tensor:
    return function(made, *scalars(row.carried, made.policy_error), **row.knobs)


def cut(made: Terms, row: Row) -> Terms:
    """The terms as a step hands them over: without what the objective declares no need of."""
    fields = {"reference": "reference_error", **{name: name for name in NEEDS[1:]}}
    return replace(made, **{field: None for name, field in fields.items() if name not in row.needs})


def slopes(function: Callable[..., Tensor], row: Row, made: Terms) -> Tensor:
    """`[B, N]` gradient in the policy's errors."""
    policy = made.policy_error.clone().requires_grad_()
    loss = call(function, row, replace(made, policy_error=policy))
    return torch.autograd.grad(loss.sum(), policy)[0]


def doubled(made: Terms) -> Terms:
    names = ("policy_error", "reference_error", "drift", "preference", "scores", "grades")
    return replace(made, **{name: getattr(made, name).double() for name in names})


def relabelled(made: Terms, preference: float) -> Terms:
    return replace(made, preference=torch.full_like(made.preference, preference))


def at_reference(made: Terms) -> Terms:
    assert made.reference_error is not None
    return replace(made, policy_error=made.reference_error.clone())


def check_it_declares_what_it_takes(function: Callable[..., Tensor], row: Row) -> None:
    assert function.needs == row.needs
    assert function.takes in SHAPES
    parameters = list(inspect.signature(function).parameters.values())
    positional = [parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert positional == ["terms"] + ["carried"] * (row.carried is not None)
    assert (function.carry is None) == (row.carried is None)
    knobs = {parameter.name for parameter in parameters[len(positional) :]}
    assert all(parameter.default is not inspect.Parameter.empty for parameter in parameters[len(positional) :])
    if function.carry is not None:
        for part in (function.carry.start, function.carry.observe, function.carry.advance):
            named = inspect.signature(part).parameters.values()
            assert {each.name for each in named if each.kind is inspect.Parameter.KEYWORD_ONLY} == knobs


def check_it_is_its_formula(function: Callable[..., Tensor], row: Row) -> None:
    made = example(row.takes)
    expected = [row.formula(c, c) for c in comparisons(made, row.carried)]
    assert call(function, row, made).tolist() == pytest.approx(expected, rel=2e-4, abs=1e-6)


def check_its_loss_is_unreduced(function: Callable[..., Tensor], row: Row) -> None:
    loss = call(function, row, cut(example(row.takes, 5), row))
    assert loss.shape == (5,)
    assert loss.dtype == torch.float32


def check_its_gradient_is_that_of_the_formula(function: Callable[..., Tensor], row: Row) -> None:
    """In every error and drift, by differences of the plain formula whose still parts do not move."""
    made = doubled(example(row.takes))
    moved = [made.policy_error.clone().requires_grad_(), made.drift.clone().requires_grad_()]  # type: ignore[union-attr]
    loss = call(function, row, replace(made, policy_error=moved[0], drift=moved[1]))
    found = torch.autograd.grad(loss.sum(), moved, allow_unused=True, materialize_grads=True)
    width = 1e-6
    for at, c in enumerate(comparisons(made, row.carried)):
        for name, gradient in zip(("e", "q"), found, strict=True):
            values = getattr(c, name)
            for i in range(len(values)):
                up, down = (replace(c, **{name: (*values[:i], values[i] + side * width, *values[i + 1 :])}) for side in (1, -1))
                slope = (row.formula(up, c) - row.formula(down, c)) / (2 * width)
                assert float(gradient[at, i]) == pytest.approx(slope, rel=1e-4, abs=1e-6), (at, name, i)


def check_double_precision_gradients(function: Callable[..., Tensor], row: Row) -> None:
    if row.stops:
        return
    made = doubled(example(row.takes, 3))
    policy, drift = (getattr(made, name).clone().requires_grad_() for name in ("policy_error", "drift"))
    assert torch.autograd.gradcheck(
        lambda e, q: call(function, row, replace(made, policy_error=e, drift=q)), (policy, drift), eps=1e-7, atol=1e-4
    )


def check_a_soft_label_is_the_expectation_over_votes(function: Callable[..., Tensor], row: Row) -> None:
    made = example(row.takes)
    losses = {p: call(function, row, relabelled(made, p)) for p in (0.0, 0.3, 1.0)}
    if row.label == "unread":
        torch.testing.assert_close(losses[0.3], losses[1.0])
        return
    if row.label == "gradient":
        losses = {p: slopes(function, row, relabelled(made, p)) for p in losses}
    torch.testing.assert_close(losses[0.3], 0.3 * losses[1.0] + 0.7 * losses[0.0])
    if SHAPES[row.takes][0] > 1 and not row.carried:  # running means of margins are not turned round by one vote
        turned = call(function, row, relabelled(made, 1.0).swapped())
        torch.testing.assert_close(call(function, row, relabelled(made, 1.0)), turned)
        opposite = relabelled(made, 0.0).swapped()
        torch.testing.assert_close(call(function, row, relabelled(made, 0.0)), call(function, row, opposite))


def check_its_signs_where_policy_and_reference_agree(function: Callable[..., Tensor], row: Row) -> None:
    """Descending lowers the chosen error and raises the rejected one, and the other way round under the opposite label."""
    made = relabelled(at_reference(example(row.takes)), 1.0)
    assert made.scores is not None
    assert made.grades is not None
    other = replace(made, preference=1 - made.preference, scores=made.scores.flip(1), grades=made.grades.flip(1))
    opposite = row.opposite or row.signs[::-1]
    for labelled, signs in ((made, row.signs), (other, opposite)):
        gradient = slopes(function, row, labelled)
        assert gradient.abs().max() > 0 or signs == (0, 0)
        places = (0,) if gradient.shape[1] == 1 else (0, -1)
        for place in places:
            close = gradient[:, place].abs() < 1e-6
            assert (torch.where(close, 0.0, gradient[:, place].sign()) == signs[place]).all(), (signs, place, gradient)


def check_large_margins_are_finite(function: Callable[..., Tensor], row: Row) -> None:
    """Errors of 20,000 on either side, a margin of ±10⁴ at the default knobs: β times that is 2·10⁷."""
    carried = None if function.carry is None else function.carry.start(**defaults(function))
    for first, last in ((0.5, 2e4), (2e4, 0.5)):
        made = example(row.takes)
        policy, drift = torch.full_like(made.policy_error, first), torch.full_like(made.policy_error, 2 * first)
        policy[:, made.num_chosen :], drift[:, made.num_chosen :] = last, 2 * last
        policy, drift = policy.requires_grad_(), drift.requires_grad_()
        loss = function(replace(made, policy_error=policy, drift=drift), *scalars(carried, policy))
        assert loss.isfinite().all()
        for gradient in torch.autograd.grad(loss.sum(), (policy, drift), allow_unused=True):
            assert gradient is None or gradient.isfinite().all()


def check_a_batch_is_its_comparisons(function: Callable[..., Tensor], row: Row) -> None:
    made = example(row.takes, 8)
    names = (*ERRORS, "preference", "scores", "grades")
    alone = [replace(made, **{name: getattr(made, name)[at : at + 1] for name in names}) for at in range(8)]
    torch.testing.assert_close(call(function, row, made), torch.cat([call(function, row, each) for each in alone]))


def check_a_constant_in_policy_and_reference_changes_nothing(function: Callable[..., Tensor], row: Row) -> None:
    if "reference" not in row.needs:
        return
    made = doubled(example(row.takes))
    constant = torch.rand(made.policy_error.shape, dtype=torch.float64) + 0.2
    if row.shift == "common":
        constant = constant[:, :1]
    moved = replace(made, policy_error=made.policy_error + constant, reference_error=made.reference_error + constant)
    torch.testing.assert_close(slopes(function, row, moved), slopes(function, row, made))
    if row.shift != "gradient":
        torch.testing.assert_close(call(function, row, moved), call(function, row, made))


CHECKS = [value for name, value in sorted(globals().items()) if name.startswith("check_")]
each_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
CASES = [pytest.param(name, row, id=f"{name}-{at}" if at else name) for name in NAMES for at, row in enumerate(ROWS[name])]


def defaults(function: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        name: each.default for name, each in inspect.signature(function).parameters.items() if name not in ("terms", "carried")
    }


@each_check
@pytest.mark.parametrize(("name", "row"), CASES)
def test_every_objective(name: str, row: Row, check: Callable[..., None]) -> None:
    check(plugins.load("objectives", name), row)


def test_the_folder_holds_what_is_tested_here() -> None:
    assert plugins.names("objectives") == tuple(sorted(NAMES))


@pytest.mark.parametrize("name", NAMES)
def test_an_objective_can_be_read_at_a_glance(name: str) -> None:
    assert len(inspect.getsource(plugins.load("objectives", name)).splitlines()) <= 40


def test_every_exception_has_its_reason() -> None:
    plain = Row(lambda c, _: 0.0, {})
    for name, rows in ROWS.items():
        for row in rows:
            excused = any(
                getattr(row, field) != getattr(plain, field) for field in ("label", "signs", "opposite", "shift", "stops")
            )
            assert bool(row.why) == excused, name


OUTSIDE = """
from flowalign.align.terms import carries, needs

def start(*, beta): return {"scale": beta}
def observe(terms, carried, *, beta): return {"h": terms.log_ratio.detach().mean(1)}
def advance(carried, means, *, beta): return {"scale": carried["scale"] * 0.5}

@carries(start=start, observe=observe, advance=advance)
@needs("reference")
def squared_hinge(terms, carried, *, beta: float = 2000.0):
    return terms.expected(lambda margin: (1 - carried["scale"] * margin).clamp_min(0).square())
"""


@each_check
def test_an_objective_of_another_package(check: Callable[..., None], install: Callable[..., None]) -> None:
    install("losses_of_others", OUTSIDE, "squared_hinge = losses_of_others:squared_hinge")
    assert "squared_hinge" in plugins.names("objectives")

    def formula(c: Comparison, _: Comparison) -> float:
        return c.p * slack(1 - 30 * c.margin) ** 2 + (1 - c.p) * slack(1 + 30 * c.margin) ** 2

    check(plugins.load("objectives", "squared_hinge"), Row(formula, {"beta": 40.0}, carried={"scale": 30.0}))


def test_log_ratio_is_half_the_errors_difference_and_positive_where_the_policy_is_better() -> None:
    h = terms().log_ratio
    assert h[0, 0].item() == pytest.approx(0.5 * (0.31 - 0.30))
    assert h[0, 1].item() == pytest.approx(0.5 * (0.40 - 0.42))
    assert terms().margin.tolist() == pytest.approx(MARGINS, abs=1e-7)


def test_the_policys_own_margin_is_the_one_against_a_reference_that_knows_nothing() -> None:
    torch.testing.assert_close(terms().policy_margin, terms(reference=[[0.7, 0.7]] * 4).margin)
    torch.testing.assert_close(terms().log_likelihood, -0.5 * torch.tensor(POLICY))


def test_a_swap_turns_margins_round_and_twice_is_none() -> None:
    made = example("groups")
    torch.testing.assert_close(made.swapped().margin, -made.margin)
    torch.testing.assert_close(made.swapped().score_margin, -made.score_margin)
    uneven = replace(made, num_chosen=1)
    assert uneven.swapped().num_chosen == 3
    for name in (*ERRORS, "preference", "scores", "grades"):
        assert torch.equal(getattr(uneven.swapped().swapped(), name), getattr(uneven, name))


def test_what_is_wanted_of_pairs_groups_and_single_pictures() -> None:
    assert terms(0.75).wanted.tolist() == [[0.75, 0.25]] * 4
    assert relabelled(example("groups", 1), 1.0).wanted.tolist() == [[1, 1, 0, 0]]
    assert example("unpaired", 3).wanted.flatten().tolist() == pytest.approx([1.0, 0.5, 0.8])


@pytest.mark.parametrize("name", NEEDS)
def test_what_is_missing_is_said_in_one_sentence(name: str) -> None:
    empty = Terms(torch.ones(2, 2), None, None, torch.ones(2))
    with pytest.raises(ValueError, match=rf"hold no {name}: the objective declares @needs\('{name}'\)"):
        empty.given(name)


@pytest.mark.parametrize("name", NAMES)
def test_an_objective_says_which_of_its_terms_is_missing(name: str) -> None:
    row = ROWS[name][0]
    for missing in row.needs:
        field = "reference_error" if missing == "reference" else missing
        with pytest.raises(ValueError, match=f"hold no {missing}"):
            call(plugins.load("objectives", name), row, replace(example(row.takes), **{field: None}))


def test_a_pair_objective_refuses_a_single_picture() -> None:
    with pytest.raises(ValueError, match="of 1 here 1 are chosen"):
        objective("dpo", example("unpaired"))
    with pytest.raises(ValueError, match="needs 2 pictures on either side, and here are 3 and 1"):
        objective("mipo", replace(example("groups"), num_chosen=3))


def test_needs_are_checked_where_they_are_declared() -> None:
    with pytest.raises(ValueError, match="cannot need refrence; allowed: reference, drift"):
        needs("refrence")


def test_needs_and_carries_may_stand_in_either_order() -> None:
    def loss(made: Terms, carried: Mapping[str, Tensor]) -> Tensor:
        return made.margin

    parts = {"start": lambda: {}, "observe": lambda made, carried: {}, "advance": lambda carried, means: {}}
    for first, second in ((needs("drift"), carries(**parts)), (carries(**parts), needs("drift"))):
        made = second(first(loss))
        assert made.carry.start is parts["start"]
        assert made.needs == {"drift"}


def test_dpo_equals_the_published_codes_beta_conventions() -> None:
    # Diffusion-DPO and the diffusers SDXL script: −log σ(−½·β·m), m = (e_w − e_ref,w) − (e_l − e_ref,l); SD 1.5 script: no ½.
    m = torch.tensor([(p[0] - r[0]) - (p[1] - r[1]) for p, r in zip(POLICY, REFERENCE, strict=True)])
    ours = objective("dpo", terms(), beta=50.0)
    torch.testing.assert_close(ours, -torch.nn.functional.logsigmoid(-0.5 * 50.0 * m))
    torch.testing.assert_close(ours, -torch.nn.functional.logsigmoid(-25.0 * m))


def test_groups_compare_means_and_a_pair_is_the_group_of_one() -> None:
    torch.manual_seed(0)
    policy, reference = torch.rand(3, 4), torch.rand(3, 4)
    group = Terms(policy, reference, None, torch.ones(3), num_chosen=2)
    h = 0.5 * (reference - policy)
    torch.testing.assert_close(group.margin, (h[:, 0] + h[:, 1]) / 2 - (h[:, 2] + h[:, 3]) / 2)


def test_the_tangent_goes_on_where_the_exponential_ends() -> None:
    x = torch.tensor([-3e7, -1.0, 0.0, 19.0, 20.0, 21.0, 2e7], dtype=torch.float64, requires_grad=True)
    y = tangent_exp(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    top = math.exp(20)
    expected = [0.0, math.exp(-1), 1.0, math.exp(19), top, 2 * top, top * (1 + 2e7 - 20)]
    assert y.tolist() == pytest.approx(expected)
    assert slope.tolist() == pytest.approx([0.0, math.exp(-1), 1.0, math.exp(19), top, top, top])


def test_gaussian_denoiser_has_the_exact_log_ratio() -> None:
    """For one-dimensional Gaussians N(prediction, 1) the log-density ratio of the target is exactly h."""
    target, policy, reference = torch.randn(5, 2), torch.randn(5, 2), torch.randn(5, 2)
    normal = torch.distributions.Normal
    exact = normal(policy, 1.0).log_prob(target) - normal(reference, 1.0).log_prob(target)
    made = Terms((policy - target).square(), (reference - target).square(), None, torch.ones(5))
    torch.testing.assert_close(made.log_ratio, exact)
