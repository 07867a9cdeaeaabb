"""Annotators of several kinds: a policy for each kind, and who belongs to which is learned along the way.

EM-DPO, Chidambaram et al. 2024, arXiv 2405.15065, see docs/methods/em_dpo.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from flowalign.align.bank import ReferenceBank
from flowalign.align.reference import second
from flowalign.align.step import PreferenceStep
from flowalign.data.batch import Batch, Conditioning
from flowalign.data.cached import Cached
from flowalign.data.records import key63
from flowalign.families.base import Family
from flowalign.rng import Keyed, key
from flowalign.settings import Config

TINY = 1e-12


class Types(nn.Module):
    """K policies, adapters over one pretrained denoiser. Each is asked about its own part of a batch."""

    def __init__(self, policies: Sequence[nn.Module]) -> None:
        super().__init__()
        self.policies = nn.ModuleList(policies)

    def forward(self, family: Family, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Predictions `[K·R, C, h, w]`; the k-th R rows are the k-th policy's. One call, so that ranks meet once."""
        rows = len(x_t) // len(self.policies)
        parts = [slice(start, start + rows) for start in range(0, len(x_t), rows)]
        predicted = [
            family.predict(policy, x_t[part], t[part], conditioning[part])
            for policy, part in zip(self.policies, parts, strict=True)
        ]
        return torch.cat(predicted)


def posterior(log_likelihood: Tensor, share: Tensor) -> Tensor:
    """`[A, K]` γ_ak ∝ η_k exp(log-likelihood `[A, K]` of all that annotator a said under type k), with η `[K]`: the E-step."""
    return torch.softmax(share.clamp_min(TINY).log() + log_likelihood, dim=1)


class Annotators:
    """How likely each of A annotators is of each of K types, γ, and how common the types are, η.

    In the M-step γ weighs the losses. What each comparison says of each type, p log σ(βΔ_k) + (1−p) log σ(−βΔ_k), is summed
    when the comparison is trained on, and every so many steps becomes the next γ: by default when each was trained on once. A
    sum over some of an annotator's comparisons counts as many times as makes it one over all. Nothing is read back from the
    device, and every process holds the same numbers.
    """

    def __init__(
        self,
        cached: Cached,
        types: int,
        seed: int,
        every: int,
        first: int,
        device: torch.device,
        total: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        """cached: the comparisons of the run. every: optimizer steps from one E-step to the next. first: none before this step.
        total: the sum of a tensor over all processes.

        γ starts as drawn evenly from all distributions over types, keyed by the seed and the annotator: from equal ones, equal
        policies would never part. Policies that have hardly moved say the same of everybody, and an E-step would then make γ
        equal again: hence `first`.
        """
        self.types, self._every, self._first, self._device, self._total = types, every, first, device, total
        self._places = cached.annotator
        self.names, keys = cached.annotators, [key63(name) for name in cached.annotators]
        self._rows = {each: row for row, each in enumerate(keys)}
        self._weights = torch.bincount(torch.from_numpy(cached.annotator), torch.from_numpy(cached.weight)).float().to(device)
        even = [Keyed(seed).uniform(f"annotator type {k}", keys, [0] * len(keys)) for k in range(types)]
        drawn = -torch.log1p(-torch.stack(even, 1))
        gamma = drawn / drawn.sum(1, keepdim=True)
        self.gamma = torch.cat([gamma, gamma.mean(0, keepdim=True)]).float().to(device)
        """`[A+1, K]`; the last row is η, for annotators that the run has not seen."""
        self._sums = torch.zeros(len(keys) + 1, types + 1, device=device)  # the last column counts
        self._fresh = torch.zeros_like(self._sums)

    @property
    def fingerprint(self) -> str:
        """Of who judged what."""
        return f"{key(*self.names, *self._places.tolist()):016x}"

    @property
    def share(self) -> Tensor:
        """η `[K]`, the mean γ."""
        return self.gamma[-1]

    def rows(self, batch: Batch) -> Tensor:
        """`[B]` the place of each comparison's annotator in the tables, on the device."""
        places = torch.tensor([self._rows.get(each, len(self._rows)) for each in batch.annotators])
        if self._device.type == "cuda":
            places = places.pin_memory()
        return places.to(self._device, non_blocking=True)

    @torch.no_grad()
    def observe(self, rows: Tensor, log_likelihood: Tensor, weight: Tensor) -> None:
        """Take note of what comparisons say, `[B, K]`, each `weight` `[B]` times."""
        self._fresh.index_add_(0, rows, torch.cat([log_likelihood, torch.ones_like(weight)[:, None]], 1) * weight[:, None])

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Called after each optimizer step; where it is due, the E-step."""
        self._sums += self._total(self._fresh)
        self._fresh.zero_()
        if step % self._every:
            return
        if step >= self._first:
            said, seen = self._sums[:-1, :-1], self._sums[:-1, -1:]
            whole = said / seen.clamp_min(TINY) * self._weights[:, None]
            gamma = torch.where(seen > 0, posterior(whole, self.share), self.gamma[:-1])
            self.gamma.copy_(torch.cat([gamma, gamma.mean(0, keepdim=True)]))
        self._sums.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed run needs, to be restored in place."""
        return {"annotators/gamma": self.gamma, "annotators/sums": self._sums}

    def table(self) -> dict[str, list[float]]:
        """γ of each annotator by name; waits for the device."""
        return dict(zip(self.names, self.gamma[:-1].tolist(), strict=True))


@dataclass(frozen=True)
class MixtureStep:
    """A preference step of K policies: the loss of each, weighed by how likely the annotator is of its type."""

    step: PreferenceStep
    """With `Types` as its policy."""
    annotators: Annotators

    def __call__(self, batch: Batch, rng: Keyed) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss `[B]` Σ_k γ_k loss_k, and metrics `[B]` averaged over types in the same way, detached."""
        types, device = self.annotators.types, self.step.device
        losses, metrics = self.step(batch.tiled(types), rng)
        rows = self.annotators.rows(batch)
        gamma = self.annotators.gamma[rows]

        def mixed(values: Tensor) -> Tensor:
            return (values.view(types, len(batch)).T * gamma).sum(1)

        if torch.is_grad_enabled():
            margin = metrics["rewards/margins"].view(types, len(batch)).T
            p, weight = (each.to(device, non_blocking=True) for each in (batch.preference, batch.weight))
            said = p[:, None] * logsigmoid(margin) + (1 - p)[:, None] * logsigmoid(-margin)
            self.annotators.observe(rows, said, weight)
        shares = {f"types/share_{k}": share.expand(len(batch)) for k, share in enumerate(self.annotators.share)}
        known = {"types/certainty": gamma.amax(1)}
        return mixed(losses), {name: mixed(value) for name, value in metrics.items()} | shares | known

    def times(self, batch: Batch, rng: Keyed) -> Tensor:
        """See PreferenceStep.times."""
        return self.step.times(batch, rng)

    def on_held_out(self, bank: ReferenceBank | None = None, num_chosen: int | None = None) -> MixtureStep:
        """See PreferenceStep.on_held_out; annotators that were trained on keep their γ."""
        return replace(self, step=self.step.on_held_out(bank, num_chosen))

    def self_test(self, batch: Batch, rng: Keyed) -> float:
        """See PreferenceStep.self_test, of all policies."""
        return self.step.self_test(batch.tiled(self.annotators.types), rng)


def of_types(policy: nn.Module, count: int) -> nn.Module:
    """The policy, or so many over the same tensors; none of them has adapters yet."""
    if count == 1:
        return policy
    return Types([policy, *(second(policy) for _ in range(count - 1))])


def by_type(policy: nn.Module) -> list[nn.Module]:
    """The policies that `of_types` made one."""
    return list(policy.policies) if isinstance(policy, Types) else [policy]


def make_annotators(
    config: Config, cached: Cached, processes: int, device: torch.device, total: Callable[[Tensor], Tensor]
) -> Annotators:
    """Of a run as it is configured; `total` sums over its processes."""
    per_step = config.train.batch_size * config.train.accumulation * processes
    switches = config.switches
    every = switches.annotator_every or -(-len(cached) // per_step)
    first = switches.annotator_first if switches.annotator_first is not None else 3 * every
    return Annotators(cached, switches.annotator_types, config.train.seed, every, first, device, total)


def type_seed(seed: int, place: int) -> int:
    """Seed of the adapter of a type; that of the first is the run's own."""
    return seed if place == 0 else key(seed, "annotator type", place)
