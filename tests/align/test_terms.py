"""The scalars that objectives are made of: what each is, what is said where one is absent, what steps carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flowalign.align.terms import NEEDS, Carry, Terms, carries, needs

POLICY = torch.tensor([[0.30, 0.42], [0.51, 0.50]])
REFERENCE = torch.tensor([[0.31, 0.40], [0.50, 0.52]])
PAIRS = Terms(POLICY, REFERENCE, None, torch.tensor([1.0, 0.7]))
ALONE = Terms(POLICY[:, :1], REFERENCE[:, :1], None, torch.tensor([1.0, 0.0]))


def group(chosen: int = 1) -> Terms:
    """Three comparisons of three pictures with every term."""
    torch.manual_seed(0)
    fields = [torch.rand(3, 3) for _ in range(5)]
    return Terms(*fields[:3], torch.tensor([1.0, 0.3, 0.5]), chosen, torch.rand(3), *fields[3:])


def test_log_ratio_is_half_the_errors_difference_and_positive_where_the_policy_is_better() -> None:
    torch.testing.assert_close(PAIRS.log_ratio, torch.tensor([[0.005, -0.01], [-0.005, 0.01]]))
    torch.testing.assert_close(PAIRS.margin, torch.tensor([0.015, -0.015]))


def test_the_surrogate_is_minus_half_the_policys_error() -> None:
    torch.testing.assert_close(PAIRS.surrogate, torch.tensor([[-0.15, -0.21], [-0.255, -0.25]]))
    torch.testing.assert_close(PAIRS.policy_margin, torch.tensor([0.06, -0.005]))


def test_groups_compare_means_and_a_pair_is_the_group_of_one() -> None:
    terms = group(2)
    h = 0.5 * (terms.given("reference") - terms.policy_error)
    torch.testing.assert_close(terms.margin, (h[:, 0] + h[:, 1]) / 2 - h[:, 2])
    assert (terms.chosen(h).shape, terms.rejected(h).shape) == ((3, 2), (3, 1))


def test_gaussian_denoiser_has_the_exact_log_ratio() -> None:
    """For one-dimensional Gaussians N(prediction, 1) the log-density ratio of the target is exactly h."""
    target, policy, reference = torch.randn(5, 2), torch.randn(5, 2), torch.randn(5, 2)
    normal = torch.distributions.Normal
    exact = normal(policy, 1.0).log_prob(target) - normal(reference, 1.0).log_prob(target)
    made = Terms((policy - target).square(), (reference - target).square(), None, torch.ones(5))
    torch.testing.assert_close(made.log_ratio, exact)


@pytest.mark.parametrize("name", NEEDS)
def test_an_absent_term_says_what_to_declare(name: str) -> None:
    bare = Terms(POLICY, None, None, torch.ones(2))
    with pytest.raises(ValueError, match=rf"hold no {name}.*declare @needs\('{name}'\)"):
        bare.given(name)


@pytest.mark.parametrize("name", NEEDS)
def test_terms_that_are_there_are_given(name: str) -> None:
    assert group().given(name).shape == ((3,) if name == "residual_dot" else (3, 3))


def test_a_picture_is_wanted_as_the_vote_says() -> None:
    torch.testing.assert_close(PAIRS.wanted, torch.tensor([[1.0, 0.0], [0.7, 0.3]]))
    torch.testing.assert_close(ALONE.wanted, torch.tensor([[1.0], [0.0]]))


def test_one_picture_alone_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="all 1 pictures are chosen"):
        _ = ALONE.margin


@pytest.mark.parametrize("chosen", [1, 2])
def test_swapping_moves_every_term_and_twice_is_nothing(chosen: int) -> None:
    terms = group(chosen)
    swapped = terms.swapped
    torch.testing.assert_close(swapped.margin, -terms.margin)
    torch.testing.assert_close(swapped.policy_margin, -terms.policy_margin)
    for name in ("scores", "grades", "drift"):
        torch.testing.assert_close(swapped.gap(swapped.given(name)), -terms.gap(terms.given(name)))
    back = swapped.swapped
    assert all(torch.equal(back.given(name), terms.given(name)) for name in NEEDS)
    assert (back.num_chosen, swapped.num_chosen) == (chosen, 3 - chosen)


def test_both_expectations_agree() -> None:
    terms = group()
    torch.testing.assert_close(terms.over_votes(lambda vote: vote.margin.exp()), terms.expected(torch.exp))
    certain = replace(terms, preference=torch.zeros(3))
    torch.testing.assert_close(certain.over_votes(lambda vote: vote.margin.exp()), (-terms.margin).exp())


def test_declarations_are_found_on_the_function_in_either_order() -> None:
    def start(*, rate: float) -> dict[str, float]:
        return {"mean": rate}

    def observe(terms: Terms, carried: Mapping[str, Tensor], *, rate: float) -> dict[str, Tensor]:
        return {"margin": terms.margin.detach()}

    def advance(carried: Mapping[str, Tensor], means: Mapping[str, Tensor], *, rate: float) -> dict[str, Tensor]:
        return {"mean": carried["mean"] + rate * (means["margin"] - carried["mean"])}

    def loss(terms: Terms, carried: Mapping[str, Tensor], *, rate: float = 0.5) -> Tensor:
        return carried["mean"] - terms.margin

    first = needs("reference", "scores")(carries(start=start, observe=observe, advance=advance)(loss))
    assert (first.needs, first.carry) == ({"reference", "scores"}, Carry(start, observe, advance))  # type: ignore[attr-defined]
    assert carries(start=start, observe=observe, advance=advance)(needs("drift")(loss)).needs == {"drift"}  # type: ignore[attr-defined]

    carried = {name: torch.tensor(value) for name, value in start(rate=0.5).items()}
    means = {name: value.mean() for name, value in observe(PAIRS, carried, rate=0.5).items()}
    assert advance(carried, means, rate=0.5)["mean"].item() == pytest.approx(0.25)


def test_an_objective_carries_nothing_unless_it_says_so() -> None:
    assert needs()(lambda terms: terms.margin).carry is None  # type: ignore[attr-defined]


def test_a_need_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match="'refrence' cannot be needed; allowed: reference, drift"):
        needs("refrence")
