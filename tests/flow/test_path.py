"""The path from rejected to chosen, and couplings, against the formula, scipy and brute force; torchcfm is in tests/oracle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from flowalign.errors import ConfigError
from flowalign.flow.path import COUPLINGS, assignment, couple, point, squared_distances, target


def pairs(count: int = 6, shape: tuple[int, ...] = (3, 2), seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    rejected, chosen = torch.randn(2, count, *shape, generator=made, dtype=torch.float64)
    return rejected, chosen + 1


def cost(rejected: torch.Tensor, chosen: torch.Tensor, partner: torch.Tensor) -> float:
    return float((chosen - rejected[partner]).square().sum())


def test_the_path_is_the_formula() -> None:
    rejected, chosen = pairs()
    s, noise = torch.linspace(0, 1, 6, dtype=torch.float64), torch.randn_like(chosen)
    y, u = point(rejected, chosen, s, noise, 0.3), target(rejected, chosen)
    for row in range(6):
        for place in itertools.product(range(3), range(2)):
            here = (row, *place)
            expected = (1 - float(s[row])) * rejected[here] + float(s[row]) * chosen[here] + 0.3 * noise[here]
            assert float(y[here]) == pytest.approx(float(expected), abs=1e-12)
            assert float(u[here]) == float(chosen[here] - rejected[here])


def test_the_ends_are_rejected_and_chosen_and_the_target_joins_them() -> None:
    rejected, chosen = pairs()
    still = torch.zeros_like(chosen)
    assert torch.equal(point(rejected, chosen, torch.zeros(6), still, 0.1), rejected)
    assert torch.equal(point(rejected, chosen, torch.ones(6), still, 0.1), chosen)
    early, late = (point(rejected, chosen, torch.full((6,), s), still, 0.0) for s in (0.25, 0.75))
    torch.testing.assert_close(early + 0.5 * target(rejected, chosen), late)


def test_assignment_is_the_best_of_all_permutations() -> None:
    costs = torch.rand(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    best = min(sum(float(costs[i, j]) for i, j in enumerate(p)) for p in itertools.permutations(range(6)))
    assert float(costs[torch.arange(6), assignment(costs)].sum()) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(5))
def test_ot_is_never_dearer_than_the_given_pairs(seed: int) -> None:
    rejected, chosen = pairs(24, seed=seed)
    contexts, order = torch.arange(24) % 5, torch.rand(24, generator=torch.Generator().manual_seed(seed))
    as_paired, free, within = (
        cost(rejected, chosen, couple(name, rejected, chosen, contexts, order)) for name in ("paired", "ot", "ot_per_context")
    )
    assert free <= within <= as_paired
    assert free < as_paired


def test_ot_per_context_stays_inside_and_is_the_best_there() -> None:
    rejected, chosen = pairs(24)
    contexts = torch.tensor([7, -1, 3] * 8)
    partner = couple("ot_per_context", rejected, chosen, contexts, torch.zeros(24))
    assert torch.equal(contexts[partner], contexts)
    for context in (7, -1, 3):
        rows = (contexts == context).nonzero()[:, 0]
        costs = squared_distances(chosen[rows], rejected[rows]).numpy()
        found = cost(rejected, chosen[rows], partner[rows])
        assert found == pytest.approx(costs[linear_sum_assignment(costs)].sum())
    crossing = couple("ot", rejected, chosen, contexts, torch.zeros(24))
    assert not torch.equal(contexts[crossing], contexts)  # what was asked for with the other name


@pytest.mark.parametrize("name", COUPLINGS)
def test_every_coupling_uses_each_output_once_and_no_global_randomness(name: str) -> None:
    rejected, chosen = pairs(16)
    contexts, order = torch.arange(16) // 4, torch.rand(16, generator=torch.Generator().manual_seed(3))
    before, legacy = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first, again = (couple(name, rejected, chosen, contexts, order) for _ in range(2))
    assert sorted(first.tolist()) == list(range(16))
    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (np.random.get_state()[1] == legacy).all()


def test_paired_keeps_the_pairs_and_independent_mixes_them() -> None:
    rejected, chosen = pairs(16)
    contexts = torch.arange(16)
    mixed = [couple("independent", rejected, chosen, contexts, torch.rand(16)) for _ in range(200)]
    assert couple("paired", rejected, chosen, contexts, torch.rand(16)).tolist() == list(range(16))
    kept = float(torch.stack([(each == contexts).float().mean() for each in mixed]).mean())
    assert kept == pytest.approx(1 / 16, abs=0.03)  # a uniform permutation has one fixed point in expectation
    assert couple("ot_per_context", rejected, chosen, contexts, torch.rand(16)).tolist() == list(range(16))


def test_an_unknown_coupling_is_named() -> None:
    with pytest.raises(ConfigError, match="'ot_per_contxt' is unknown; did you mean 'ot_per_context'"):
        couple("ot_per_contxt", *pairs(), torch.zeros(6), torch.zeros(6))
