"""`Terms`: the few scalars per picture that every preference objective is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor

FIELDS = {
    "reference": "reference_error",
    "drift": "drift",
    "residual_dot": "residual_dot",
    "scores": "scores",
    "grades": "grades",
}
"""What an objective may need -> the field of `Terms` that holds it."""
NEEDS = tuple(FIELDS)


@dataclass(frozen=True)
class Terms:
    """Errors of B comparisons of N pictures, best first, at one shared (t, noise) each; float32.

    Errors are means over all elements of a picture's latent, in the family's own prediction type (ε, v, x0 or velocity).
    A comparison of N = 1 is a picture that was judged alone: its `preference` is 1 if it is wanted and 0 if it is not.
    """

    policy_error: Tensor
    """`[B, N]` e = mean (prediction − target)²."""
    reference_error: Tensor | None
    """`[B, N]` the same for the reference; None where the objective declares no need of it."""
    drift: Tensor | None
    """`[B, N]` q = mean (policy prediction − reference prediction)²."""
    preference: Tensor
    """`[B]` the probability that the chosen picture is preferred: 1 for a vote, 0.5 for a tie."""
    num_chosen: int = 1
    """How many of the N pictures are chosen."""
    residual_dot: Tensor | None = None
    """`[B]` mean of residual_chosen · residual_rejected of a pair, with residual = prediction − target."""
    scores: Tensor | None = None
    """`[B, N]` a reward per picture, the weighted sum where there are several."""
    grades: Tensor | None = None
    """`[B, N]` the worth of each picture of a ranked list; rewards may stand here where nobody gave grades."""

    def given(self, name: str) -> Tensor:
        """The term of that name of `NEEDS`. Raises ValueError where the step did not compute it."""
        value: Tensor | None = getattr(self, FIELDS[name])
        if value is None:
            raise ValueError(f"these terms hold no {FIELDS[name]}: declare @needs({name!r}) on the objective")
        return value

    @property
    def log_ratio(self) -> Tensor:
        """`[B, N]` h = ½(e_ref − e): above zero where the policy denoises a picture better than the reference."""
        return 0.5 * (self.given("reference") - self.policy_error)

    @property
    def surrogate(self) -> Tensor:
        """`[B, N]` l = −½e: stands for a log-likelihood where there is no reference; up to a constant, not a density."""
        return -0.5 * self.policy_error

    def chosen(self, values: Tensor) -> Tensor:
        """`[B, N]` -> `[B, k]`, those of the k chosen pictures."""
        return values[:, : self.num_chosen]

    def rejected(self, values: Tensor) -> Tensor:
        """`[B, N]` -> `[B, N−k]`, those of the rejected pictures. Raises ValueError where there are none."""
        if self.num_chosen >= values.shape[1]:
            raise ValueError(f"all {values.shape[1]} pictures are chosen: an objective that compares needs rejected ones")
        return values[:, self.num_chosen :]

    def means(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, N]` -> `[B]`, `[B]`: the mean over the chosen pictures and over the rejected ones."""
        return self.chosen(values).mean(1), self.rejected(values).mean(1)

    def gap(self, values: Tensor) -> Tensor:
        """`[B, N]` -> `[B]`: mean over the chosen pictures − mean over the rejected ones."""
        chosen, rejected = self.means(values)
        return chosen - rejected

    @property
    def margin(self) -> Tensor:
        """`[B]` Δ = mean h of the chosen − mean h of the rejected; for a pair h_chosen − h_rejected."""
        return self.gap(self.log_ratio)

    @property
    def policy_margin(self) -> Tensor:
        """`[B]` l_chosen − l_rejected: the margin of objectives without a reference."""
        return self.gap(self.surrogate)

    @property
    def wanted(self) -> Tensor:
        """`[B, N]` the probability that a picture is wanted: p of the chosen, 1 − p of the rejected ones."""
        p = self.preference[:, None].expand_as(self.policy_error)
        return torch.where(torch.arange(p.shape[1], device=p.device) < self.num_chosen, p, 1 - p)

    @property
    def swapped(self) -> Terms:
        """The comparison as if the rejected pictures had been preferred; `preference` stays."""
        moved = {
            field.name: torch.cat([self.rejected(value), self.chosen(value)], 1)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor) and value.dim() == 2
        }
        return replace(self, num_chosen=self.policy_error.shape[1] - self.num_chosen, **moved)

    def expected(self, loss: Callable[[Tensor], Tensor], preference: Tensor | None = None) -> Tensor:
        """`[B]` p·loss(Δ) + (1−p)·loss(−Δ): a soft label is the expectation over which picture is preferred."""
        p = self.preference if preference is None else preference
        return p * loss(self.margin) + (1 - p) * loss(-self.margin)

    def over_votes(self, loss: Callable[[Terms], Tensor]) -> Tensor:
        """`[B]` the same expectation for losses of more than the margin: p·loss(self) + (1−p)·loss(swapped)."""
        return self.preference * loss(self) + (1 - self.preference) * loss(self.swapped)


@dataclass(frozen=True)
class Carry:
    """Scalars that go from one optimizer step to the next, for objectives that look at more than their own comparison.

    The objective is then `f(terms, carried, *, …knobs)` and stays pure: whoever trains it holds the scalars, takes the
    mean of what is observed over all comparisons of an optimizer step (accumulation and processes), and advances once.
    """

    start: Callable[..., dict[str, float]]
    """`(*, …knobs)` -> the scalars before the first step."""
    observe: Callable[..., dict[str, Tensor]]
    """`(terms, carried, *, …knobs)` -> values `[B]`, detached; their means go to `advance`."""
    advance: Callable[..., dict[str, Tensor]]
    """`(carried, means, *, …knobs)` -> the scalars of the next step, of 0 dimensions; nothing is read back."""


class Objective(Protocol):
    """Terms in, unreduced loss `[B]` out; knobs are keyword-only. `needs` says which terms the step must compute.

    Where `carry` is not None the second argument is the carried scalars, by name.
    """

    needs: frozenset[str]
    carry: Carry | None

    def __call__(self, terms: Terms, *carried: Mapping[str, Tensor], **knobs: float | str) -> Tensor: ...


def needs(*names: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Declare what an objective reads beside `policy_error`: any of `NEEDS`. Raises ValueError for another name."""
    unknown = sorted(set(names) - set(NEEDS))
    if unknown:
        raise ValueError(f"{unknown[0]!r} cannot be needed; allowed: {', '.join(NEEDS)}")

    def declare(objective: Callable[..., Tensor]) -> Callable[..., Tensor]:
        objective.needs = frozenset(names)  # type: ignore[attr-defined]
        objective.carry = getattr(objective, "carry", None)  # type: ignore[attr-defined]
        return objective

    return declare


def carries(
    *,
    start: Callable[..., dict[str, float]],
    observe: Callable[..., dict[str, Tensor]],
    advance: Callable[..., dict[str, Tensor]],
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Declare that an objective carries scalars between optimizer steps, see `Carry`; goes with `needs`."""

    def declare(objective: Callable[..., Tensor]) -> Callable[..., Tensor]:
        objective.carry = Carry(start, observe, advance)  # type: ignore[attr-defined]
        return objective

    return declare
