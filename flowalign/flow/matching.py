"""One step of preference flow matching: a batch of comparisons in, the unreduced loss and its measurements out.

Kim et al. 2024, arXiv 2405.19806: ‖v_θ(s, y_s, c) − (y⁺ − y⁻)‖², here the mean over elements.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flowalign.data.batch import Batch, Conditioning
from flowalign.data.records import key63
from flowalign.errors import DataError
from flowalign.flow.path import couple, point, target, wide
from flowalign.rng import Keyed

CONTEXT = "context"
"""Name in a Conditioning of what the field is told; a batch without it has a field that is told nothing."""


@dataclass(frozen=True)
class Pairs:
    """P pairs of a batch, and what is drawn for them, all keyed by comparison and draw."""

    rejected: Tensor
    """y⁻ `[P, ...]`"""
    chosen: Tensor
    """y⁺ `[P, ...]`"""
    context: Tensor | None
    """`[P, ...]`"""
    keys: tuple[int, ...]
    draws: tuple[int, ...]


@dataclass(frozen=True)
class MatchingStep:
    """Regresses the field on the velocity of straight paths, with one forward over all pairs."""

    field: nn.Module
    """(s `[P]`, y `[P, ...]`, context, dropped) -> v `[P, ...]`; see `flow.field.Field`."""
    device: torch.device
    autocast: Callable[[], AbstractContextManager[None]]
    coupling: str = "paired"
    sigma: float = 0.1
    context_dropout: float = 0.0
    num_chosen: int = 1

    def on_held_out(self) -> MatchingStep:
        """The step on the given pairs and all contexts."""
        return replace(self, coupling="paired", context_dropout=0.0)

    def __call__(self, batch: Batch, rng: Keyed) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss `[B]`, weighted as the data say; metrics `[B]`: the error, the power of the target, their cosine."""
        pairs = self.pairs(batch, rng)
        rejected, chosen = self._ship(pairs.rejected), self._ship(pairs.chosen)
        if self.coupling != "paired":
            order = rng.uniform("coupling", pairs.keys, pairs.draws)
            contexts = same_context(pairs.context if self.coupling == "ot_per_context" else None, len(chosen))
            rejected = rejected[self._ship(couple(self.coupling, rejected, chosen, contexts, order))]
        noise = self._ship(rng.normal("flow-noise", pairs.keys, pairs.draws, chosen.shape[1:]))
        s = self._ship(rng.uniform("s", pairs.keys, pairs.draws).float())
        y, u = point(rejected, chosen, s, noise, self.sigma), target(rejected, chosen)
        dropped = None
        if self.context_dropout:
            dropped = self._ship(rng.uniform("context-dropout", pairs.keys, pairs.draws) < self.context_dropout)
        context = None if pairs.context is None else self._ship(pairs.context)
        with self.autocast():
            v = self.field(s, y, context, dropped)
        v, u = v.float().flatten(1), u.flatten(1)
        error, power = (v - u).square().mean(1), u.square().mean(1)
        cosine = nn.functional.cosine_similarity(v.detach(), u, dim=1)
        count = len(batch)
        loss = error.view(count, -1).mean(1) * self._ship(batch.weight)
        metrics = {"loss": loss, "flow/error": error, "flow/power": power, "flow/cosine": cosine}
        return loss, {name: value.detach().view(count, -1).mean(1) for name, value in metrics.items()}

    def pairs(self, batch: Batch, rng: Keyed) -> Pairs:
        """The pairs of each comparison, on the CPU, in order.

        k chosen pictures go with the last k of the others: groups pair up, and of a ranked list the best goes with the worst.
        A comparison that is right with probability p is turned around with 1 − p, afresh at each draw, so that the field
        learns the mean of both directions, and of a tie that there is no direction. Raises DataError for pictures that are
        compared with none.
        """
        k, pictures = self.num_chosen, batch.mean.shape[1]
        if pictures < 2 * k:
            raise DataError(
                f"comparisons have {pictures} pictures of which {k} are chosen; a flow leads from a rejected picture to each "
                "chosen one, so give at least as many rejected ones."
            )
        turned = rng.uniform("direction", batch.ids, batch.draws) >= batch.preference
        chosen, rejected = batch.mean[:, :k], batch.mean[:, pictures - k :]
        flip = wide(turned, chosen).bool()
        chosen, rejected = torch.where(flip, rejected, chosen), torch.where(flip, chosen, rejected)
        told = batch.conditioning.tensors.get(CONTEXT)
        return Pairs(
            rejected.flatten(0, 1),
            chosen.flatten(0, 1),
            None if told is None else told.repeat_interleave(k, dim=0),
            batch.ids if k == 1 else tuple(key63(each, place) for each in batch.ids for place in range(k)),
            tuple(draw for draw in batch.draws for _ in range(k)),
        )

    def _ship(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


def same_context(context: Tensor | None, count: int) -> Tensor:
    """`[P]` int64, equal where contexts are equal; all are where there is none."""
    if context is None:
        return torch.zeros(count, dtype=torch.int64)
    return context.flatten(1).unique(dim=0, return_inverse=True)[1] if context.dim() > 1 else context.long()


def told(tensor: Tensor | None) -> Conditioning:
    """What a batch holds for contexts `[B, ...]`, or for none."""
    return Conditioning({} if tensor is None else {CONTEXT: tensor})
