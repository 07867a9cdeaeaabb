"""`Terms`: the few scalars per picture that every preference objective is made of, and what an objective declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar

from torch import Tensor, cat

NEEDS = ("reference", "drift", "residual_dot", "scores", "grades")
"""What an objective may read beside `policy_error` and the label."""
Takes = Literal["pairs", "groups", "lists", "unpaired"]
"""What a comparison holds: one chosen and one rejected picture, several of each, graded pictures, or each for itself."""


@dataclass(frozen=True)
class Terms:
    """Errors of B comparisons of N pictures, best first, at one shared (t, noise) each; float32.

    Errors are means over all elements of a picture's latent, in the family's own prediction type (ε, v, x0 or velocity).
    A comparison of one picture (N = 1) has only that to say: `preference` is 1 where it is wanted and 0 where it is not.
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
    """`[B]` of pairs: mean of residual_chosen · residual_rejected, where a residual is prediction − target."""
    scores: Tensor | None = None
    """`[B, N]` a reward per picture; of several rewards their weighted sum."""
    grades: Tensor | None = None
    """`[B, N]` relevance of the pictures of a ranked list, larger is better."""
    other_error: Tensor | None = None
    """`[B, num_chosen]` the policy's errors of the chosen under other objective weights, without a gradient; infinite where it
    is told none."""

    def given(self, name: str) -> Tensor:
        """One of `NEEDS`, `[B, N]` or `[B]`. Raises ValueError where it is missing."""
        value: Tensor | None = getattr(self, "reference_error" if name == "reference" else name)
        if value is None:
            raise ValueError(f"the terms hold no {name}: the objective declares @needs({name!r}) and the data must have it")
        return value

    @property
    def log_ratio(self) -> Tensor:
        """`[B, N]` h = ½(e_ref − e): above zero where the policy denoises a picture better than the reference."""
        return 0.5 * (self.given("reference") - self.policy_error)

    @property
    def log_likelihood(self) -> Tensor:
        """`[B, N]` l = −½e: the policy's own log-likelihood of the target under unit variance, up to a constant."""
        return -0.5 * self.policy_error

    @property
    def margin(self) -> Tensor:
        """`[B]` Δ = mean h of the chosen − mean h of the rejected; for a pair h_chosen − h_rejected."""
        return self.gap(self.log_ratio)

    @property
    def policy_margin(self) -> Tensor:
        """`[B]` mean l of the chosen − mean l of the rejected: the margin without a reference."""
        return self.gap(self.log_likelihood)

    @property
    def score_margin(self) -> Tensor:
        """`[B]` mean score of the chosen − mean score of the rejected."""
        return self.gap(self.given("scores"))

    @property
    def wanted(self) -> Tensor:
        """`[B, N]` the probability that each picture is a good one: p for the chosen, 1 − p for the rejected."""
        p = self.preference[:, None].expand_as(self.policy_error)
        return cat([p[:, : self.num_chosen], 1 - p[:, self.num_chosen :]], 1)

    def sides(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Means `[B]` of `values` `[B, N]` over the chosen and over the rejected.

        Raises ValueError where there is nothing on one side.
        """
        chosen, count = self.num_chosen, values.shape[1]
        if not 0 < chosen < count:
            raise ValueError(f"the objective compares chosen with rejected pictures, and of {count} here {chosen} are chosen")
        return values[:, :chosen].mean(1), values[:, chosen:].mean(1)

    def gap(self, values: Tensor) -> Tensor:
        """`[B]` mean of `values` `[B, N]` over the chosen − mean over the rejected."""
        chosen, rejected = self.sides(values)
        return chosen - rejected

    def swapped(self) -> Terms:
        """The same pictures after the opposite vote: chosen and rejected have changed places."""
        k = self.num_chosen
        names = ("policy_error", "reference_error", "drift", "scores", "grades")
        held = {name: value for name in names if (value := getattr(self, name)) is not None}
        moved = {name: cat([value[:, k:], value[:, :k]], 1) for name, value in held.items()}
        count = self.policy_error.shape[1] - k
        return replace(self, **moved, preference=1 - self.preference, num_chosen=count)

    def expected(
        self, loss: Callable[[Tensor], Tensor], preference: Tensor | None = None, margin: Tensor | None = None
    ) -> Tensor:
        """`[B]` p·loss(Δ) + (1−p)·loss(−Δ): a soft label is the expectation over which picture is preferred."""
        p = self.preference if preference is None else preference
        m = self.margin if margin is None else margin
        return p * loss(m) + (1 - p) * loss(-m)

    def over_votes(self, loss: Callable[[Terms], Tensor]) -> Tensor:
        """`[B]` the same expectation for a loss of the terms that is no function of Δ alone."""
        return self.preference * loss(self) + (1 - self.preference) * loss(self.swapped())


def tangent_exp(x: Tensor, most: float = 20.0) -> Tensor:
    """eˣ up to `most` and its tangent from there on: large arguments stay finite and keep their direction."""
    low = x.clamp_max(most)
    return low.exp() * (1 + (x - low))


def running_moments(carried: Mapping[str, Tensor], means: Mapping[str, Tensor], decay: float) -> dict[str, Tensor]:
    """`mean` and `deviation` carried on with what was observed of an optimizer step as `reward` and its `square`."""
    spread = (means["square"] - means["reward"].square()).clamp_min(0).sqrt()
    return {
        "mean": decay * carried["mean"] + (1 - decay) * means["reward"],
        "deviation": decay * carried["deviation"] + (1 - decay) * spread,
    }


@dataclass(frozen=True)
class Carry:
    """Scalars that an objective carries from one optimizer step to the next, because a pure function sees no batch statistics.

    All three take the objective's knobs as keywords.
    """

    start: Callable[..., dict[str, float]]
    """(**knobs): the scalars before the first step."""
    observe: Callable[..., dict[str, Tensor]]
    """(terms, carried, **knobs): what to average `[B]`, detached; the mean is over all comparisons of an optimizer step."""
    advance: Callable[..., dict[str, Tensor]]
    """(carried, means, **knobs): the scalars of the next step, 0-dim tensors on the device, without reading any back."""


class Objective(Protocol):
    """Terms in, unreduced loss `[B]` out; knobs are keyword-only.

    An objective with a carry takes the carried scalars, 0-dim tensors by name, as its second argument.
    """

    needs: frozenset[str]
    """Which of `NEEDS` the step must compute."""
    takes: Takes
    carry: Carry | None

    def __call__(self, terms: Terms, *carried: Mapping[str, Tensor], **knobs: float) -> Tensor: ...


Function = TypeVar("Function", bound=Callable[..., Tensor])


def needs(*names: str, takes: Takes = "pairs") -> Callable[[Function], Function]:
    """Declare what an objective reads beside `policy_error`, any of `NEEDS`, and what its comparisons hold.

    Raises ValueError for a name that is none of them.
    """
    unknown = sorted(set(names) - set(NEEDS))
    if unknown:
        raise ValueError(f"an objective cannot need {', '.join(unknown)}; allowed: {', '.join(NEEDS)}")

    def declare(objective: Function) -> Function:
        objective.needs = frozenset(names)  # type: ignore[attr-defined]
        objective.takes = takes  # type: ignore[attr-defined]
        objective.carry = getattr(objective, "carry", None)  # type: ignore[attr-defined]
        return objective

    return declare


def carries(
    *,
    start: Callable[..., dict[str, float]],
    observe: Callable[..., dict[str, Tensor]],
    advance: Callable[..., dict[str, Tensor]],
) -> Callable[[Function], Function]:
    """Declare what an objective carries between steps; it is then called as `objective(terms, carried, **knobs)`."""

    def declare(objective: Function) -> Function:
        objective.carry = Carry(start, observe, advance)  # type: ignore[attr-defined]
        return objective

    return declare
