"""What a denoiser reads of a user beside the prompt: embeddings of users through decoupled cross-attention.

PPD, Dang et al. 2025, arXiv 2501.06655; the attention is that of IP-Adapter, Ye et al. 2023, arXiv 2308.06721. See
docs/personal.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils.hooks import RemovableHandle

from flowalign.errors import CheckpointError


class Reading(nn.Module):
    """What one attention reads of a user: softmax(Q K_uᵀ/√d) V_u, added to what it read before its output projection.

    Q are the attention's own queries. V_u starts at zero, and neither projection has a bias: a user of zeros adds nothing.
    """

    def __init__(self, width: int, inner: int) -> None:
        """width: D of a user's tokens. inner: channels of the attention's queries."""
        super().__init__()
        self.to_k, self.to_v = (nn.Linear(width, inner, bias=False) for _ in range(2))
        nn.init.zeros_(self.to_v.weight)
        self.tokens: Tensor | None = None
        """`[B, T, D]` of the users of the pictures that are denoised now; None is nobody."""
        self._query: list[Tensor] = []
        self._attention: tuple[Any, ...] = ()  # in a tuple: no part of this module

    def attach(self, attention: Any) -> list[RemovableHandle]:
        """Read beside an attention from now on, until the handles are removed. Raises CheckpointError where it does not fit."""
        if attention.to_q.out_features != self.to_k.out_features:
            raise CheckpointError(
                f"the users were trained on attentions of {self.to_k.out_features} channels, and this denoiser's have "
                f"{attention.to_q.out_features}; take the checkpoint that the run was trained on."
            )
        self._attention = (attention,)
        return [
            attention.to_q.register_forward_hook(self._see),
            attention.to_out[0].register_forward_pre_hook(self._add),
        ]

    def forward(self, query: Tensor) -> Tensor:
        """Queries `[B, S, inner]` -> what is added for the tokens that are told, in the queries' dtype."""
        (attention,), tokens = self._attention, self.tokens
        if tokens is None:
            return torch.zeros_like(query)
        tokens = tokens.to(query.dtype)
        key, value = (linear(tokens, layer.weight.to(query.dtype)) for layer in (self.to_k, self.to_v))
        query, key, value = (each.unflatten(-1, (attention.heads, -1)) for each in (query, key, value))
        if getattr(attention, "norm_q", None) is not None:  # of each head
            query = attention.norm_q(query)
        read = scaled_dot_product_attention(*(each.transpose(1, 2) for each in (query, key, value)))
        return read.transpose(1, 2).flatten(2)

    def _see(self, module: nn.Module, given: tuple[Tensor, ...], query: Tensor) -> None:
        self._query[:] = [query]

    def _add(self, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        query = self._query.pop()
        return given if self.tokens is None else (given[0] + self(query).to(given[0].dtype), *given[1:])


class Users(nn.Module):
    """Embeddings of U users, T tokens of D numbers each, and what every attention of a denoiser reads of them."""

    def __init__(self, count: int, tokens: int, width: int, inner: Sequence[int], seed: int = 0) -> None:
        """width: D. inner: channels of the queries of each attention."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embeddings = nn.Parameter(torch.randn(count, tokens, width))
            self.readings = nn.ModuleList(Reading(width, each) for each in inner)
        self.attached = False
        self.new: nn.Parameter | None = None
        """`[1, T, D]` the embedding of one more user, where that alone learns."""

    def adopt(self) -> None:
        """Take in one more user, who starts as the mean of those there are, and whose embedding alone learns from now on."""
        self.requires_grad_(False)
        self.new = nn.Parameter(self.embeddings.detach().mean(0, keepdim=True).clone())

    @property
    def table(self) -> Tensor:
        """`[U, T, D]` of all users, a new one last."""
        return self.embeddings if self.new is None else torch.cat([self.embeddings, self.new])

    def of(self, shares: Tensor) -> Tensor:
        """Shares of users `[B, U]` -> tokens `[B, T, D]`, float32; a row of zeros is nobody."""
        with nullcontext() if shares.is_meta else torch.autocast(shares.device.type, enabled=False):
            return torch.einsum("bu,utd->btd", shares.float(), self.table.float())

    def tell(self, tokens: Tensor | None) -> None:
        """What all attentions read from now on, `[B, T, D]`.

        It stays until the next call: a block that is computed again for its gradient reads it again.
        """
        for reading in self.readings:
            reading.tokens = tokens  # type: ignore[assignment]

    def attach(self, attentions: Sequence[Any]) -> list[RemovableHandle]:
        """Read beside these attentions, unless it does already, until the handles are removed.

        Raises CheckpointError where they are others than those of training.
        """
        if self.attached:
            return []
        if len(attentions) != len(self.readings):
            raise CheckpointError(
                f"the users were trained on {len(self.readings)} attentions, and this denoiser has {len(attentions)}; take the "
                "checkpoint that the run was trained on."
            )
        self.attached = True
        pairs = zip(self.readings, attentions, strict=True)
        return [handle for reading, attention in pairs for handle in reading.attach(attention)]  # type: ignore[operator]


def attentions_of(denoiser: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The attentions of a denoiser whose names end so, which have queries and an output projection; in its order."""
    found = [module for name, module in denoiser.named_modules() if name.rpartition(".")[2] in names]
    return [each for each in found if hasattr(each, "to_q") and getattr(each, "to_out", None) is not None]
