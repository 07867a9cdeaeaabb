"""One preference step: a batch of comparisons in, the unreduced loss and its measurements out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flowalign.align.bank import ReferenceBank
from flowalign.align.carried import Carried
from flowalign.align.switches import safeguarded, time_weight
from flowalign.align.terms import Objective, Terms
from flowalign.align.timesteps import BINS, TIMESTEPS, Importance, squared_gradient
from flowalign.data.batch import GEOMETRY, Batch, Conditioning
from flowalign.errors import SelfTestError
from flowalign.families.base import Family
from flowalign.rng import Keyed
from flowalign.settings import Switches

PLAIN = Switches()


@dataclass(frozen=True)
class PreferenceStep:
    """Computes Terms with one forward of the policy and at most one of the reference over all B·N pictures."""

    family: Family
    policy: nn.Module
    reference: nn.Module | None
    """Not needed where a bank holds its errors."""
    objective: Objective
    knobs: dict[str, float]
    timesteps: str
    """One of `TIMESTEPS`."""
    device: torch.device
    autocast: Callable[[], AbstractContextManager[None]]
    memory_format: torch.memory_format = torch.contiguous_format
    between: tuple[float, float] = (0.0, 1.0)
    """The times that are drawn, 0 clean and 1 noise: what the sampler gives is scaled into them."""
    num_chosen: int = 1
    """How many of a comparison's N pictures are chosen."""
    bank: ReferenceBank | None = None
    """The reference's errors, and predictions where they are needed, where draws are repeated."""
    switches: Switches = PLAIN
    carried: Carried | None = None
    """What the objective carries from step to step; None where it carries nothing."""
    importance: Importance | None = None
    """What has been learned about which times matter; None draws them as `timesteps` says and no more."""

    def on_held_out(self, bank: ReferenceBank | None = None) -> PreferenceStep:
        """The step whose times are spread evenly over the whole schedule, however those of training are drawn."""
        return replace(self, timesteps="stratified", between=(0.0, 1.0), importance=None, bank=bank)

    def noised(self, batch: Batch, rng: Keyed) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, target, t) with x_t and target `[B·N, C, h, w]`, t `[B·N]`; the pictures of a comparison share all draws.

        Where `switches.noise` is independent, each has noise of its own.
        """
        pictures, shape = batch.mean.shape[1], batch.mean.shape[2:]
        own = (pictures if self.switches.noise == "independent" else 1, *shape)
        draws = [rng.normal("posterior", batch.ids, batch.draws, shape), rng.normal("noise", batch.ids, batch.draws, own)]
        t = self.times(batch, rng)
        mean, std, posterior, noise, t = (self._ship(tensor) for tensor in (batch.mean, batch.std, *draws, t))
        x0 = (mean + std * posterior[:, None]).flatten(0, 1)
        t = t.repeat_interleave(pictures)
        x_t, target = self.family.noisy(x0, noise.expand_as(mean).flatten(0, 1), t)
        return x_t.contiguous(memory_format=self.memory_format), target, t

    def told(self, batch: Batch) -> Conditioning:
        """What the denoiser is told about each of the B·N pictures."""
        conditioning = batch.conditioning.to(self.device).repeat(batch.mean.shape[1])
        return conditioning.joined(GEOMETRY, self._ship(batch.geometry).flatten(0, 1))

    def terms(self, batch: Batch, rng: Keyed) -> Terms:
        """Policy and reference errors of the batch; gradients flow into the policy's."""
        count, pictures = batch.mean.shape[:2]
        x_t, target, t = self.noised(batch, rng)
        conditioning = self.told(batch)
        with self.autocast():
            prediction = self.family.predict(self.policy, x_t, t, conditioning)
        prediction = prediction.float()
        residual = prediction - target
        error = _mean_square(residual).view(count, pictures)
        dot = None
        if self.switches.safeguard is not None or "residual_dot" in self.objective.needs:
            chosen, rejected = residual.detach().view(count, pictures, -1).unbind(1)
            dot = (chosen * rejected).mean(1)
            if self.switches.safeguard is not None:
                error = safeguarded(error, dot, self.switches.safeguard)
        reference_error = anchor = None
        held_against = self.objective.needs & {"reference", "drift"}
        if held_against and self.bank is not None:
            reference_error = self._ship(self.bank(batch))
            anchor = self._ship(self.bank.predicted(batch)).flatten(0, 1) if "drift" in self.objective.needs else None
        elif held_against:
            anchor = self._anchor(x_t, t, conditioning)
            reference_error = _mean_square(anchor - target).view(count, pictures)
        with_drift = anchor is not None and "drift" in self.objective.needs
        return Terms(
            policy_error=error,
            reference_error=reference_error,
            drift=_mean_square(prediction - anchor).view(count, pictures) if with_drift else None,
            preference=self._ship(batch.preference),
            num_chosen=self.num_chosen,
            residual_dot=dot,
            scores=self._given(batch.scores, "scores"),
            grades=self._given(batch.grades, "grades"),
        )

    def for_bank(self, batch: Batch, rng: Keyed) -> tuple[Tensor, Tensor]:
        """What a bank stores: the reference's errors `[B, N]` and its predictions `[B, N, C, h, w]`, float32."""
        x_t, target, t = self.noised(batch, rng)
        anchor = self._anchor(x_t, t, self.told(batch))
        return _mean_square(anchor - target).view(batch.mean.shape[:2]), anchor.view(batch.mean.shape)

    @torch.no_grad()
    def _anchor(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        if self.reference is None:
            raise ValueError("the step has neither a bank nor a reference")
        with self.autocast():
            return self.family.predict(self.reference, x_t, t, conditioning).float()

    def __call__(self, batch: Batch, rng: Keyed) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss `[B]`, weighted, and per-comparison metrics `[B]`, detached; nothing is read back from the device."""
        terms = self.terms(batch, rng)
        loss = self.loss(terms) * self._ship(batch.weight)
        if self.switches.time_weight != "constant":
            loss = loss * self._ship(time_weight(self.family.level(self.times(batch, rng)), self.switches))
        metrics = self.measure(terms)
        if self.carried is not None:
            seen = self.carried.observe(terms) if torch.is_grad_enabled() else {}
            metrics |= {f"carried/{name}": value.expand(len(batch)) for name, value in self.carried.scalars.items()}
            metrics |= {f"observed/{name}": value.detach() for name, value in seen.items()}
        if self.importance is not None:
            _, bins, weight = self.importance.place(TIMESTEPS[self.timesteps].spread(rng, batch))
            if torch.is_grad_enabled():
                self.importance.observe(self._ship(bins), squared_gradient(loss, terms))
            weight = self._ship(weight)
            loss = loss * weight
            metrics = {name: value * weight for name, value in metrics.items()}  # means as other samplers have them
        return loss, {"loss": loss.detach(), **metrics}

    def loss(self, terms: Terms) -> Tensor:
        """`[B]`, of the objective and what is mixed into it."""
        carried = () if self.carried is None else (self.carried.scalars,)
        loss = self.objective(terms, *carried, **self.knobs)
        if self.switches.winner_nll:
            loss = loss + self.switches.winner_nll * terms.policy_error[:, : terms.num_chosen].mean(1)
        return loss

    @torch.no_grad()
    def measure(self, terms: Terms) -> dict[str, Tensor]:
        """Rewards βh as TRL names them, and errors relative to the reference, each a mean over the chosen or the rejected.

        A tied margin is half a win, half a loss. The margin of a picture that was judged alone is its h where it is wanted, and
        −h where it is not. `winner/…` are the errors themselves, of the chosen; of pictures judged alone times the probability
        that they are wanted, so that ratios of their means are those of the wanted ones.
        """
        alone = terms.policy_error.shape[1] == 1
        parts = (
            {"all": slice(None)} if alone else {"chosen": slice(terms.num_chosen), "rejected": slice(terms.num_chosen, None)}
        )
        rise = terms.policy_error if terms.reference_error is None else terms.policy_error - terms.reference_error
        errors = {f"error/{name}": rise[:, part].mean(1) for name, part in parts.items()}
        share = terms.preference if alone else torch.ones_like(terms.preference)
        winners = {"winner/error": terms.policy_error, "winner/reference_error": terms.reference_error}
        errors |= {name: share * e[:, : terms.num_chosen].mean(1) for name, e in winners.items() if e is not None}
        if terms.reference_error is None:
            return errors
        beta = self.knobs.get("beta", 1.0)
        reward = beta * terms.log_ratio
        margin = (2 * terms.preference - 1) * terms.log_ratio[:, 0] if alone else terms.margin
        return {
            **{f"rewards/{name}": reward[:, part].mean(1) for name, part in parts.items()},
            "rewards/margins": beta * margin,
            "rewards/accuracies": (margin > 0).float() + 0.5 * (margin == 0).float(),
            **errors,
        }

    def gains(self, batches: Iterable[Batch], parameters: Sequence[Tensor], rng: Keyed) -> None:
        """Measure, for `importance`, how gradients in the weights depend on time where those in the predictions do not.

        batches: single comparisons, a few. Each is differentiated once in every bin.
        """
        if self.importance is None:
            return
        squares = torch.zeros(2, BINS, device=self.device)
        for batch in batches:
            for part in range(BINS):
                terms = replace(self, importance=self.importance.only(part)).terms(batch, rng)
                loss = self.loss(terms)
                squares[1, part] += squared_gradient(loss, terms).sum()
                found = torch.autograd.grad(loss.sum(), parameters, allow_unused=True)
                squares[0, part] += sum(gradient.square().sum() for gradient in found if gradient is not None)
        self.importance.learn_gain(squares)

    def self_test(self, batch: Batch, rng: Keyed, tolerance: float = 1e-3) -> float:
        """Check that at policy = reference every margin is 0 and the loss is the formula's value there (log 2 for dpo).

        Returns the largest |βΔ|. Raises SelfTestError: training from a wrong start would look like learning.
        """
        with torch.no_grad():
            terms = self.terms(batch, rng)
        if terms.reference_error is None:
            return 0.0
        margin = (self.knobs.get("beta", 1.0) * terms.log_ratio).abs().max().item()
        loss = self.loss(terms).mean().item()
        still = replace(terms, policy_error=terms.reference_error)
        expected = self.loss(still).mean().item()
        if not math.isfinite(loss) or margin > tolerance or abs(loss - expected) > tolerance:
            raise SelfTestError(
                f"the self-test found loss {loss:.6f} and margin {margin:.6f} before any step, but policy and reference are "
                f"the same model, so the loss must be {expected:.6f} and the margin 0 within {tolerance}; check that the "
                "checkpoint is whole (non-finite weights?) or train with train.precision=fp32."
            )
        return margin

    def times(self, batch: Batch, rng: Keyed) -> Tensor:
        """`[B]` in [0, 1], float64, on the CPU."""
        sampler = TIMESTEPS[self.timesteps]
        even = sampler.spread(rng, batch)
        if self.importance is not None:
            even, _, _ = self.importance.place(even)
        low, high = self.between
        return low + (high - low) * sampler.bend(even, batch, self.family)

    def _given(self, values: Tensor | None, need: str) -> Tensor | None:
        return self._ship(values) if values is not None and need in self.objective.needs else None

    def _ship(self, tensor: Tensor) -> Tensor:
        """To the device without waiting for it."""
        if self.device.type == "cuda" and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        dtype = torch.float32 if tensor.is_floating_point() else None
        return tensor.to(self.device, dtype, non_blocking=True)


def _mean_square(residual: Tensor) -> Tensor:
    return residual.square().flatten(1).mean(1)
