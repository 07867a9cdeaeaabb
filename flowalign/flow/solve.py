"""From s = 0 to s = strength along the field: torchdiffeq, with fixed steps unless asked otherwise.

Learned fields are stiff in places, where adaptive solvers take steps without end; theirs are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchdiffeq import odeint

from flowalign.errors import RunError
from flowalign.flow.path import wide
from flowalign.flow.settings import Solve

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(s `[B]`, y `[B, ...]`) -> dy/ds `[B, ...]`."""
ADAPTIVE = ("dopri5",)


@dataclass(frozen=True)
class Solution:
    """Where the flow leads."""

    end: Tensor
    """`[B, ...]`"""
    evaluations: int
    """Evaluations of the field for each row."""


class _TooMany(Exception):
    """The field was evaluated more often than allowed."""


def guided(field: nn.Module, context: Tensor | None, guidance: float = 1.0) -> Velocity:
    """The field in its context: v(∅) + guidance · (v(c) − v(∅)), ∅ being no context. Of scale 1, v(c) alone."""

    def plain(s: Tensor, y: Tensor) -> Tensor:
        return field(s, y, context).to(y.dtype)

    def both(s: Tensor, y: Tensor) -> Tensor:
        dropped = torch.arange(2 * len(y), device=y.device) >= len(y)
        told = None if context is None else torch.cat([context, context])
        with_, without = field(torch.cat([s, s]), torch.cat([y, y]), told, dropped).to(y.dtype).chunk(2)
        return without + guidance * (with_ - without)

    return plain if guidance == 1 or context is None else both


@torch.no_grad()
def solve(velocity: Velocity, start: Tensor, settings: Solve, strength: Tensor | None = None) -> Solution:
    """Move `start` `[B, ...]` from s = 0 to its strength, `settings.iterations` times.

    strength: `[B]` in [0, 1], each row's own; None takes `settings.strength`. Rows do not depend on each other, but for dopri5,
    which takes the same steps for all rows of a batch. Raises RunError where dopri5 gives up and where a place is not finite.
    """
    return _passes(velocity, start, settings, strength, (0.0, 1.0))


@torch.no_grad()
def back(velocity: Velocity, end: Tensor, settings: Solve, strength: Tensor | None = None) -> Solution:
    """The way back, from s = strength to s = 0: what `solve` started from, but for the error of the steps."""
    return _passes(velocity, end, settings, strength, (1.0, 0.0))


@torch.no_grad()
def there_and_back(velocity: Velocity, start: Tensor, settings: Solve, strength: Tensor | None = None) -> Tensor:
    """‖back(solve(y)) − y‖ / ‖solve(y) − y‖ `[B]`: how much of the way is an error of the steps; 0 where nothing moves."""
    end = solve(velocity, start, settings, strength).end
    again = back(velocity, end, settings, strength).end
    lost, moved = ((each - start).flatten(1).norm(dim=1) for each in (again, end))
    return torch.where(moved > 0, lost / moved, torch.zeros_like(lost))


def _passes(velocity: Velocity, y: Tensor, settings: Solve, strength: Tensor | None, span: tuple[float, float]) -> Solution:
    """`settings.iterations` passes, one after the other."""
    if strength is None:
        strength = torch.full((len(y),), settings.strength, dtype=torch.float64)
    evaluations = 0
    for _ in range(settings.iterations):
        y, count = _integrate(velocity, y, settings, strength, span)
        evaluations += count
    return Solution(y, evaluations)


def _integrate(
    velocity: Velocity, y: Tensor, settings: Solve, strength: Tensor, span: tuple[float, float]
) -> tuple[Tensor, int]:
    """One pass over τ in `span`, s being strength · τ, so that rows of all strengths take the same steps."""
    reach = strength.to(y)
    adaptive = settings.solver in ADAPTIVE
    evaluations, latest = 0, span[0]

    def slope(tau: Tensor, y: Tensor) -> Tensor:
        nonlocal evaluations, latest
        if adaptive:
            latest = float(tau)
            if evaluations == settings.max_evaluations:
                raise _TooMany
        evaluations += 1
        return wide(reach, y) * velocity(reach * tau, y)

    steps = 1 if adaptive else settings.steps
    times = torch.linspace(*span, steps + 1, dtype=y.dtype, device=y.device)
    try:
        found = odeint(slope, y, times, rtol=settings.tolerance, atol=settings.tolerance, method=settings.solver)[-1]
    except (_TooMany, AssertionError) as error:  # torchdiffeq asserts that steps and states stay numbers
        if not adaptive:
            raise
        why = f"it needs more than {settings.max_evaluations} evaluations" if isinstance(error, _TooMany) else _words(error)
        raise RunError(
            f"{settings.solver} gave up at {latest:.3g} of the way: {why}; the field is stiff there, so use fixed steps, such "
            "as solver midpoint with 8 steps, or a larger tolerance."
        ) from error
    if not bool(torch.isfinite(found).all()):
        raise RunError(
            f"the flow led to values that are not finite after {evaluations} evaluations; use more steps, a smaller strength "
            "or less guidance, or train the field again at a lower train.learning_rate."
        )
    return found, evaluations


def _words(error: BaseException) -> str:
    return "its steps became too small" if "underflow" in str(error) else f"its state is not finite ({error})"
