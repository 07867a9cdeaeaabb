"""The scalars that an objective carries from step to step, held while a run trains: see `terms.Carry`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from flowalign.align.terms import Carry, Objective, Terms


def loss_at_start(objective: Objective, knobs: Mapping[str, Any], terms: Terms) -> Tensor:
    """The objective `[B]` as it is before the first step."""
    carried = Carried.of(objective, knobs, torch.device("cpu"))
    return objective(terms, *(() if carried is None else (carried.scalars,)), **knobs)


class Carried:
    """What is observed of every comparison is averaged over an optimizer step, accumulation and processes included.

    All of it happens on the device; nothing is read back.
    """

    def __init__(
        self,
        carry: Carry,
        knobs: Mapping[str, Any],
        device: torch.device,
        mean: Callable[[Tensor], Tensor] = lambda values: values,
        *,
        name: str = "carried",
    ) -> None:
        """mean: of a tensor over all processes. name: what the scalars are called in metrics and saved states."""
        self._carry, self._knobs, self._mean, self.name = carry, knobs, mean, name
        self.scalars = {name: torch.tensor(float(value), device=device) for name, value in carry.start(**knobs).items()}
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    @classmethod
    def of(
        cls,
        objective: Objective,
        knobs: Mapping[str, Any],
        device: torch.device,
        mean: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> Carried | None:
        """What `objective` carries; None where it carries nothing."""
        return None if objective.carry is None else cls(objective.carry, knobs, device, mean)

    @torch.no_grad()
    def observe(self, terms: Terms) -> dict[str, Tensor]:
        """Take note of a micro-batch; returns what was seen of each of its comparisons, `[B]`."""
        seen = self._carry.observe(terms, self.scalars, **self._knobs)
        for name, values in seen.items():
            self._sums[name] = self._sums[name] + values.mean() if name in self._sums else values.mean()
        self._count += 1
        return seen

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Called after each optimizer step: from what was observed to the scalars of the next."""
        names = list(self._sums)
        means = self._mean(torch.stack([self._sums[name] for name in names]) / self._count)
        following = self._carry.advance(self.scalars, dict(zip(names, means, strict=True)), **self._knobs)
        for name, value in following.items():
            self.scalars[name].copy_(value)
        self._sums, self._count = {}, 0

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed run needs, to be restored in place."""
        return {f"{self.name}/{name}": value for name, value in self.scalars.items()}
