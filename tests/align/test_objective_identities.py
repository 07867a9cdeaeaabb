"""How objectives relate to each other, to the vectors that their scalars stand for, and to what they estimate."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from sklearn.metrics import ndcg_score
from torch import Tensor
from torch.nn.functional import logsigmoid

from flowalign import plugins
from flowalign.align.terms import Terms
from tests.align.objective_rows import ROWS, example
from tests.align.test_objectives import at_reference, doubled, objective, relabelled, slopes, terms

BETA = 40.0


def pairs(takes: str = "pairs", **changes: Any) -> Terms:
    return replace(doubled(example(takes, 8)), **changes)


def log_ratios(chosen: Tensor, rejected: Tensor, **fields: Any) -> Terms:
    """Votes with these h: `[B, k]` and `[B, N − k]`."""
    h = torch.cat([chosen, rejected], 1)
    return Terms(-2 * h, torch.zeros_like(h), None, torch.ones(len(h), dtype=h.dtype), chosen.shape[1], **fields)


def equal(first: Tensor, second: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(first, second, **tolerance)


@pytest.mark.parametrize("beta", [1.0, 2000.0])
@pytest.mark.parametrize(
    ("name", "knobs", "takes"),
    [
        ("dpo", {}, "pairs"),
        ("rdpo", {}, "pairs"),
        ("mmpo", {}, "pairs"),
        ("smpo", {}, "pairs"),
        ("bpo", {"generator": "logistic"}, "pairs"),
        ("chi_po", {}, "pairs"),
        ("h_dpo", {"alpha": 1.0}, "pairs"),
        ("tdpo", {}, "pairs"),
        ("mdpo", {}, "groups"),
        ("all_pairs", {}, "groups"),
        ("epsilon_dpo", {}, "pairs"),
    ],
)
def test_the_sigmoid_family_is_log_2_where_policy_and_reference_agree(
    name: str, knobs: dict[str, Any], takes: str, beta: float
) -> None:
    made = at_reference(example(takes))
    assert made.drift is not None
    made = replace(made, drift=torch.zeros_like(made.drift))
    carried = ({"beta": torch.tensor(beta)},) if name == "epsilon_dpo" else ()
    equal(objective(name, made, *carried, beta=beta, **knobs), torch.full((6,), math.log(2)))


def test_ipo_at_zero_and_at_its_minimum() -> None:
    tau = 25.0
    at = lambda margin: objective("ipo", log_ratios(torch.tensor([[margin]]), torch.zeros(1, 1)), tau=tau).item()  # noqa: E731
    assert at(0.0) == pytest.approx(1 / (4 * tau**2))
    assert at(1 / (2 * tau)) == pytest.approx(0.0, abs=1e-12)
    assert at(1 / (2 * tau)) < min(at(1 / (2 * tau) + 0.001), at(1 / (2 * tau) - 0.001))


def test_label_smoothing_of_a_vote_is_a_soft_label() -> None:
    equal(objective("dpo", terms(1.0), beta=BETA, label_smoothing=0.2), objective("dpo", terms(0.8), beta=BETA))


@pytest.mark.parametrize(
    ("name", "knobs", "changes"),
    [
        ("mdpo", {}, {}),
        ("all_pairs", {}, {}),
        ("rdpo", {"flips": 0.0}, {}),
        ("h_dpo", {"alpha": 1.0}, {}),
        ("tdpo", {"alpha": 0.0}, {}),
        ("bpo", {"generator": "logistic"}, {}),
        ("odpo", {"alpha": 0.0}, {}),
        ("modpo", {"weight": 1.0}, {"scores": torch.ones(8, 2, dtype=torch.float64)}),
        ("plackett_luce", {"tau": 1e-3, "nll": 0.0}, {"preference": torch.ones(8, dtype=torch.float64)}),
    ],
)
def test_what_is_dpo_at_the_ends_of_its_knobs(name: str, knobs: dict[str, Any], changes: dict[str, Any]) -> None:
    made = pairs(**changes)
    equal(objective(name, made, beta=BETA, **knobs), objective("dpo", made, beta=BETA))


def test_a_gap_of_scores_of_one_is_dpo_without_an_offset() -> None:
    made = pairs(scores=torch.tensor([[3.0, 2.0]] * 8, dtype=torch.float64), preference=torch.ones(8, dtype=torch.float64))
    equal(objective("odpo", made, beta=BETA), objective("dpo", made, beta=BETA))


def test_scores_as_labels_are_soft_labels_of_dpo() -> None:
    made = pairs()
    probability = (2.2 * made.score_margin).sigmoid()
    equal(objective("mmpo", made, beta=BETA), objective("dpo", replace(made, preference=probability), beta=BETA))


def test_robust_dpo_is_dpo_in_expectation_over_flipped_votes() -> None:
    vote, flips = relabelled(pairs(), 1.0), 0.2
    other = objective("rdpo", replace(vote.swapped(), preference=vote.preference), beta=BETA, flips=flips)
    mixed = 0.8 * objective("rdpo", vote, beta=BETA, flips=flips) + 0.2 * other
    equal(mixed, objective("dpo", vote, beta=BETA))


def test_robust_dpo_is_unbiased_by_monte_carlo() -> None:
    generator = torch.Generator().manual_seed(0)
    flipped = torch.rand(100_000, generator=generator) < 0.3
    made = replace(terms(policy=[[0.42, 0.40]] * 100_000, reference=[[0.45, 0.39]] * 100_000))
    losses = objective("rdpo", replace(made, preference=1 - flipped.float()), beta=BETA, flips=0.3)
    error = float(losses.std()) / math.sqrt(len(losses))
    assert float(losses.mean()) == pytest.approx(float(objective("dpo", made, beta=BETA)[0]), abs=4 * error)


@pytest.mark.parametrize("sizes", [(2, 2), (3, 2), (5, 4)])
def test_mipo_is_unbiased_by_monte_carlo_and_the_plug_in_is_not(sizes: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    tau, count = 2.0, 100_000
    chosen, rejected = (torch.randn(count, size, generator=generator, dtype=torch.float64) for size in sizes)
    made = log_ratios(0.5 + 0.8 * chosen, 0.1 + 1.1 * rejected)
    truth = (0.5 - 0.1 - 1 / (2 * tau)) ** 2
    losses = objective("mipo", made, tau=tau)
    assert float(losses.min()) < 0
    assert float(losses.mean()) == pytest.approx(truth, abs=4 * float(losses.std()) / math.sqrt(count))
    plug_in = objective("mipo", made, tau=tau, estimator="plug_in")
    bias = 0.8**2 / sizes[0] + 1.1**2 / sizes[1]
    assert float(plug_in.mean()) == pytest.approx(truth + bias, abs=4 * float(plug_in.std()) / math.sqrt(count))


def test_mipo_of_pairs_by_its_plug_in_is_ipo() -> None:
    made = pairs()
    equal(objective("mipo", made, tau=25.0, estimator="plug_in"), objective("ipo", made, tau=25.0))


def test_all_pairs_are_never_below_the_comparison_of_means() -> None:
    made = pairs("groups")
    gap = objective("all_pairs", made, beta=BETA) - objective("mdpo", made, beta=BETA)
    assert float(gap.min()) > 0


def test_capo_with_equal_differences_is_ipo() -> None:
    made = relabelled(pairs(), 1.0)
    gap = 0.3
    scores = torch.tensor([[1.0 + gap, 1.0]] * 8, dtype=torch.float64)
    equal(
        objective("capo", replace(made, scores=scores), beta=BETA),
        4 * BETA**2 * objective("ipo", made, tau=BETA / gap),
    )


def test_reward_distillation_is_at_its_minimum_where_dpo_is_under_the_rewards_own_labels() -> None:
    made = pairs(scores=torch.tensor([[0.7, 0.2]] * 8, dtype=torch.float64))
    there = log_ratios(torch.full((8, 1), 0.5 / BETA, dtype=torch.float64), torch.zeros(8, 1, dtype=torch.float64))
    there = replace(there, scores=made.scores)
    for name, preference in (("reward_distillation", 1.0), ("dpo", 1 / (1 + math.exp(-0.5)))):
        policy = there.policy_error.clone().requires_grad_()
        at = relabelled(replace(there, policy_error=policy), preference)
        (slope,) = torch.autograd.grad(objective(name, at, beta=BETA).sum(), policy)
        equal(slope, torch.zeros_like(slope), atol=1e-9, rtol=0)


def test_dmpo_is_exo_and_tends_to_the_reverse_kl() -> None:
    """Less the part that grows without end, σ(−βΔ)·(−log α), it is minus the entropy of the policy's preference."""
    made = relabelled(pairs(), 1.0)
    equal(objective("dmpo", made, beta=BETA, alpha=0.02), objective("exo", made, beta=BETA, label_smoothing=0.02))
    x, alpha = BETA * made.margin, 1e-9
    rest = objective("dmpo", made, beta=BETA, alpha=alpha) + (-x).sigmoid() * math.log(alpha)
    equal(rest, x.sigmoid() * logsigmoid(x) + (-x).sigmoid() * logsigmoid(-x), atol=1e-7, rtol=0)


@pytest.mark.parametrize("power", [-1.0, -0.5, 0.0, 0.4, 1.0])
def test_basus_divergence_has_its_gradient_in_the_ratio(power: float) -> None:
    """¼(R^λ + R^{−λ−1}), whatever λ; at R = 1 that of dpo."""
    ratio = torch.tensor([0.4, 1.0, 2.5], dtype=torch.float64, requires_grad=True)
    h = -ratio.log()[:, None] / BETA
    loss = objective("bpo", log_ratios(h, torch.zeros_like(h)), beta=BETA, power=power)
    (slope,) = torch.autograd.grad(loss.sum(), ratio)
    equal(slope.detach(), (0.25 * (ratio**power + ratio ** (-power - 1))).detach())
    assert float(slope[1]) == pytest.approx(0.5)


def test_bpo_by_default_is_the_exponential_loss() -> None:
    made = relabelled(pairs(), 1.0)
    equal(objective("bpo", made, beta=BETA), (-BETA * made.margin / 2).exp() - 1)


def test_repo_is_simpos_limit() -> None:
    made = relabelled(pairs(), 1.0)
    steep = objective("simpo", made, beta=1e6, gamma=0.01 * 1e6) / 1e6
    equal(steep, objective("repo", made, gamma=0.01), atol=1e-6, rtol=0)


def test_slic_without_its_weight_is_repo() -> None:
    made = pairs()
    equal(objective("slic", made, delta=0.02, weight=0.0), objective("repo", made, gamma=0.02))


def test_alpha_dpo_without_alpha_is_simpo() -> None:
    made = pairs()
    carried = {"mean": torch.tensor(0.2), "deviation": torch.tensor(0.7)}
    knobs = {"beta": 9.0, "gamma": 0.3}
    equal(objective("alpha_dpo", made, carried, alpha=0.0, **knobs), objective("simpo", made, **knobs))


def test_linear_dpo_weighs_the_gradient_of_the_errors_by_a_clipped_line() -> None:
    made, beta, eta = relabelled(pairs(), 1.0), 60.0, 0.1
    policy = made.policy_error.clone().requires_grad_()
    loss = objective("linear_dpo", replace(made, policy_error=policy), beta=beta, eta=eta)
    (slope,) = torch.autograd.grad(loss.sum(), policy)
    weight = (0.5 + 0.2 * beta * -2 * made.margin).clamp(eta, 1 - eta)
    equal(slope, torch.stack([weight, -weight], 1))
    assert {float(weight.min()), float(weight.max())} == {eta, 1 - eta}
    dpo = objective("dpo", replace(made, policy_error=policy), beta=beta)
    (curved,) = torch.autograd.grad(dpo.sum(), policy)
    equal(curved / (beta / 2), torch.stack([(-beta * made.margin).sigmoid(), -(-beta * made.margin).sigmoid()], 1))


def vectors(count: int = 6, pictures: int = 2) -> tuple[Terms, Tensor, Tensor, Tensor]:
    """Terms of real predictions `[B, N, d]`, and those: policy, reference, target."""
    generator = torch.Generator().manual_seed(2)
    policy, reference, target = (torch.randn(count, pictures, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    sizes = [(a - b).square().mean(2) for a, b in ((policy, target), (reference, target), (policy, reference))]
    made = Terms(*sizes, torch.ones(count, dtype=torch.float64), residual_dot=None)
    return made, policy, reference, target


def test_dspo_is_the_distance_of_vectors_that_its_scalars_stand_for() -> None:
    made, policy, reference, target = vectors()
    kappa = 0.3 * (1 - (5.0 * made.margin).sigmoid())[:, None]
    whole = (policy[:, 0] - target[:, 0]) - kappa * (policy[:, 0] - reference[:, 0])
    equal(objective("dspo", made, beta=5.0, weight=0.3), whole.square().mean(1))


@pytest.mark.parametrize("step", [0.1, 0.5, 1.0])
def test_nft_is_the_distances_of_the_mirrored_policies(step: float) -> None:
    made, policy, reference, target = vectors(pictures=1)
    made = replace(made, preference=torch.linspace(0, 1, 6, dtype=torch.float64))
    good = (1 - step) * reference + step * policy
    bad = (1 + step) * reference - step * policy
    r = made.preference
    expected = r * (good - target).square().mean((1, 2)) + (1 - r) * (bad - target).square().mean((1, 2))
    equal(objective("nft", made, step=step), expected)


def test_half_the_drift_is_the_divergence_that_tdpo_wants() -> None:
    """Of unit Gaussians around both predictions, in the units in which h is their log-ratio, averaged over elements."""
    made, policy, reference, _ = vectors()
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(normal(reference, 1.0), normal(policy, 1.0)).mean(2)
    assert made.drift is not None
    equal(0.5 * made.drift, divergence)


def test_sppo_draws_each_log_ratio_to_its_own_target() -> None:
    for preference, target in ((1.0, 0.5), (0.5, 0.0), (0.2, -0.3)):
        h = torch.tensor([[target / BETA]])
        assert float(objective("sppo", relabelled(log_ratios(h, -h), preference), beta=BETA)) == pytest.approx(0.0, abs=1e-12)


def test_lair_is_at_its_minimum_where_beta_h_is_the_advantage() -> None:
    made = pairs("lists")
    assert made.grades is not None
    advantage = (made.grades / 0.5).softmax(1) - 0.25
    there = replace(made, policy_error=-2 * advantage / BETA, reference_error=torch.zeros_like(advantage))
    here = objective("lair", there, beta=BETA, tau=0.5)
    equal(here, -0.5 * advantage.square().sum(1))
    for way in (0.01, -0.01):
        moved = replace(there, policy_error=there.policy_error + way * torch.randn(advantage.shape, dtype=torch.float64))
        assert (objective("lair", moved, beta=BETA, tau=0.5) > here).all()


def test_rankdpo_of_two_pictures_is_weighted_dpo() -> None:
    made = relabelled(pairs(), 1.0)
    assert made.grades is not None
    cost = (2 ** made.grades[:, 0] - 2 ** made.grades[:, 1]) * (1 / math.log(2) - 1 / math.log(3))
    equal(objective("rankdpo", made, beta=BETA), cost * objective("dpo", made, beta=BETA))


def test_pictures_of_one_grade_are_not_compared() -> None:
    made = pairs("lists", grades=torch.ones(8, 4, dtype=torch.float64))
    assert float(objective("rankdpo", made).abs().max()) == 0
    assert float(objective("opo", replace(made, grades=torch.zeros(8, 4, dtype=torch.float64))).abs().max()) == 0


def test_opo_at_small_temperature_is_scikit_learns_ndcg() -> None:
    made = pairs("lists")
    assert made.grades is not None
    grades = made.grades[:, torch.tensor([2, 0, 3, 1])]
    found = objective("opo", replace(made, grades=grades), beta=BETA, temperature=1e-4)
    expected = [-ndcg_score((2**g - 1)[None].numpy(), h[None].numpy()) for g, h in zip(grades, made.log_ratio, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_plackett_luce_with_sharp_choices_is_the_likelihood_of_the_order() -> None:
    made = pairs("lists")
    s = BETA * made.log_ratio
    likelihood = torch.stack([s[:, i:].softmax(1)[:, 0].log() for i in range(4)], 1).sum(1)
    equal(objective("plackett_luce", made, beta=BETA, tau=1e-3, nll=0.0), -likelihood)


def test_the_odds_of_mapo_go_on_smoothly_to_no_error_at_all() -> None:
    error = torch.tensor([[0.0, 0.5], [1e-9, 0.5], [0.0019, 0.5], [0.0021, 0.5]], dtype=torch.float64, requires_grad=True)
    made = Terms(error, None, None, torch.ones(4, dtype=torch.float64))
    loss = objective("mapo", made, steps=10.0)
    (slope,) = torch.autograd.grad(loss.sum(), error)
    phi = lambda z: z / math.expm1(z) if z else 1.0  # noqa: E731
    for at, e in enumerate(error[:, 0].tolist()):
        x = 10 * (phi(0.5 * e) - phi(0.25))
        assert float(loss[at].detach()) == pytest.approx(e + 0.1 * math.log1p(math.exp(-x)), rel=1e-9)
    assert float(slope[0, 0]) == pytest.approx(float(slope[1, 0]), rel=1e-6)
    assert float(slope[2, 0]) == pytest.approx(float(slope[3, 0]), rel=1e-3)


def test_scores_below_the_mean_and_equal_scores_teach_nothing_in_weighted_sft() -> None:
    row = replace(pairs("groups"), scores=torch.tensor([[3.0, 1.0, 2.0, 1.0]] * 8, dtype=torch.float64))
    policy = row.policy_error.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective("weighted_sft", replace(row, policy_error=policy)).sum(), policy)
    assert (slope[:, 0] > 0).all()
    assert (slope[:, 1:] == 0).all()
    equal_scores = replace(row, scores=torch.ones(8, 4, dtype=torch.float64))
    assert float(objective("weighted_sft", equal_scores).abs().max()) == 0


def test_an_offset_that_contradicts_the_scores_teaches_nothing() -> None:
    made = relabelled(pairs(), 0.0)
    assert float(objective("odpo", made, beta=1.0).max()) < 1e-5


def test_a_margin_beyond_the_bound_of_chi_po_has_no_gradient() -> None:
    (row,) = ROWS["chi_po"]
    h = torch.tensor([[0.4]], dtype=torch.float64)
    far = slopes(plugins.load("objectives", "chi_po"), row, log_ratios(h, -h))
    assert far.abs().max() == 0
