"""Solvers against closed forms and torchdiffeq, and what happens where they give up."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

from flowalign.errors import RunError
from flowalign.flow.settings import Solve
from flowalign.flow.solve import back, guided, solve, there_and_back

pytestmark = pytest.mark.usefixtures("one_thread")
ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "rk4": 4}
EVALUATIONS = {"euler": 1, "midpoint": 2, "heun2": 2, "rk4": 4}


def growing(s: Tensor, y: Tensor) -> Tensor:
    """dy/ds = y (1 + s), whose solution is y₀ exp(s + s² / 2)."""
    return y * (1 + s).view(-1, *[1] * (y.dim() - 1))


def start(count: int = 3) -> Tensor:
    return torch.linspace(0.5, 2, count, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("solver", ORDERS)
def test_errors_fall_with_the_order_of_the_solver(solver: str) -> None:
    exact = start() * math.exp(1.5)
    errors = [
        float((solve(growing, start(), Solve(solver=solver, steps=steps)).end - exact).abs().max()) for steps in (16, 32, 64)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(ORDERS[solver], abs=0.15)


@pytest.mark.parametrize("solver", [*ORDERS, "dopri5"])
def test_agrees_with_torchdiffeq(solver: str) -> None:
    found = solve(growing, start(), Solve(solver=solver, steps=5, tolerance=1e-8)).end
    times = torch.linspace(0, 1, 2 if solver == "dopri5" else 6, dtype=torch.float64)
    options = dict(method=solver, rtol=1e-8, atol=1e-8)
    known = torchdiffeq.odeint(lambda s, y: growing(s.expand(len(y)), y), start(), times, **options)[-1]
    torch.testing.assert_close(found, known, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", EVALUATIONS)
@pytest.mark.parametrize("iterations", [1, 3])
def test_evaluations_are_those_that_happen(solver: str, iterations: int) -> None:
    calls = 0

    def counting(s: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return growing(s, y)

    found = solve(counting, start(), Solve(solver=solver, steps=7, iterations=iterations))
    assert found.evaluations == calls == EVALUATIONS[solver] * 7 * iterations


def test_strength_stops_on_the_way_and_is_each_rows_own() -> None:
    settings, strength = Solve(solver="rk4", steps=32), torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    found = solve(growing, start(), settings, strength).end
    exact = start() * torch.exp(strength + strength**2 / 2)[:, None]
    torch.testing.assert_close(found, exact, atol=1e-6, rtol=0)
    assert torch.equal(found[0], start()[0])
    whole = solve(growing, start(), settings.model_copy(update={"strength": 0.3})).end
    torch.testing.assert_close(whole[1], found[1], atol=1e-12, rtol=0)


def test_iterations_apply_the_flow_again() -> None:
    settings = Solve(solver="rk4", steps=8)
    once = solve(growing, start(), settings).end
    twice = solve(growing, once, settings).end
    assert torch.equal(solve(growing, start(), settings.model_copy(update={"iterations": 2})).end, twice)


@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("iterations", [1, 2])
def test_the_way_back_returns(strength: float, iterations: int) -> None:
    fine = Solve(solver="rk4", steps=32, strength=strength, iterations=iterations)
    end = solve(growing, start(), fine).end
    assert float((end - start()).abs().min()) > 0.05
    torch.testing.assert_close(back(growing, end, fine).end, start(), atol=1e-6, rtol=0)
    exact = there_and_back(growing, start(), fine)
    rough = there_and_back(growing, start(), fine.model_copy(update={"solver": "euler", "steps": 4}))
    assert exact.shape == (3,)
    assert float(exact.max()) < 1e-5 < 0.02 < float(rough.min())
    assert there_and_back(growing, start(), fine, torch.zeros(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("solver", ORDERS)
def test_rows_do_not_depend_on_each_other(solver: str) -> None:
    settings, rows = Solve(solver=solver, steps=4), torch.randn(4, 2, 3, dtype=torch.float64)
    together = solve(growing, rows, settings).end
    alone = torch.cat([solve(growing, row[None], settings).end for row in rows])
    assert torch.equal(together, alone)


def test_dopri5_gives_up_with_words_where_it_needs_too_many_evaluations() -> None:
    def stiff(s: Tensor, y: Tensor) -> Tensor:
        return -1e6 * (y - torch.cos(100 * s)[:, None])

    with pytest.raises(RunError, match=r"dopri5 gave up at .* more than 200 evaluations.*solver midpoint"):
        solve(stiff, start(), Solve(solver="dopri5", max_evaluations=200))
    calm = solve(growing, start(), Solve(solver="dopri5", max_evaluations=200))
    assert 7 < calm.evaluations < 200


def test_dopri5_gives_up_with_words_where_its_steps_vanish() -> None:
    def wall(s: Tensor, y: Tensor) -> Tensor:
        """Blows up at s = ½, which no step may pass."""
        return y.abs() ** 3 * 1e3 + 1

    with pytest.raises(RunError, match=r"dopri5 gave up at .*(too small|not finite)"):
        solve(wall, start(), Solve(solver="dopri5", max_evaluations=100_000))


def test_what_is_not_finite_is_reported() -> None:
    with pytest.raises(RunError, match=r"not finite after 4 evaluations"):
        solve(lambda s, y: y / 0, start(), Solve(solver="euler", steps=4))


class Told(nn.Module):
    """3 where the first of what is told is 1, 1 where the context is dropped, and 0 else."""

    def forward(self, s: Tensor, y: Tensor, context: Tensor | None, dropped: Tensor | None = None) -> Tensor:
        value = torch.zeros(len(y)) if context is None else 3.0 * context
        if dropped is not None:
            value = torch.where(dropped, 1.0, value)
        return value[:, None].expand_as(y)


def test_guidance_goes_on_from_nothing_through_what_is_told() -> None:
    s, y, context = torch.zeros(2), torch.zeros(2, 1), torch.tensor([1.0, 0.0])
    for guidance in (0.0, 0.5, 1.0, 2.0):
        found = guided(Told(), context, guidance)(s, y)[:, 0].tolist()
        assert found == [1 + guidance * 2, 1 + guidance * -1]
    assert guided(Told(), None, 2.0)(s, y)[:, 0].tolist() == [0, 0]
