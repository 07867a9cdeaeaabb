"""One preference step: a batch of comparisons in, the unreduced loss and its measurements out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowalign.align.bank import ReferenceBank
from flowalign.align.carried import Carried
from flowalign.align.inversion import inverted
from flowalign.align.measured import measured
from flowalign.align.merged import Merged
from flowalign.align.steer import asked, contrast, elsewhere
from flowalign.align.switches import by_gap, reads, safeguarded, time_weight
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
    types: int = 1
    """Policies in `policy`, see `mixture.Types`; a batch then holds the same comparisons once for each of them."""
    adaptive: Carried | None = None
    """What moves β; None where it stays what the knobs say."""
    steered: bool = False
    """`policy` is a `steer.Steered`."""
    contrast: float = 0.0
    """β_w of the contrast between what it makes of a comparison under its own weights and under others; 0 has none."""
    chunk: int | None = None
    """Pictures that go through a denoiser together; None sends all of them."""
    importance: Importance | None = None
    """What has been learned about which times matter; None draws them as `timesteps` says and no more."""

    def on_held_out(self, bank: ReferenceBank | None = None, num_chosen: int | None = None) -> PreferenceStep:
        """The step with times spread evenly over the whole schedule and true labels, however those of training are drawn.

        num_chosen: of the comparisons held out, where it may be another than that of training.
        """
        honest = self.switches.model_copy(update={"label_noise": 0.0})
        even = dict(timesteps="stratified", between=(0.0, 1.0), importance=None)
        return replace(self, **even, bank=bank, switches=honest, num_chosen=num_chosen or self.num_chosen)

    def noised(self, batch: Batch, rng: Keyed) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, target, t) with x_t and target `[B·N, C, h, w]`, t `[B·N]`; the pictures of a comparison share all draws.

        Where `switches.noise` is not shared, each has noise of its own: what the batch holds, or drawn.
        """
        x0, t = self._drawn(batch, rng)
        own = (batch.mean.shape[1] if self.switches.noise == "independent" else 1, *batch.mean.shape[2:])
        noise = rng.normal("noise", batch.ids, batch.draws, own) if batch.noise is None else batch.noise
        x_t, target = self.family.noisy(x0, self._ship(noise).expand(batch.mean.shape).flatten(0, 1), t)
        return x_t.contiguous(memory_format=self.memory_format), target, t

    def with_noise(self, batch: Batch, rng: Keyed) -> Batch:
        """The batch with the noise that the reference takes each of its pictures to, stored or found now, if that is wanted."""
        if self.switches.noise != "inverted" or batch.noise is not None:
            return batch
        if self.bank is not None:
            return replace(batch, noise=self.bank.inverted(batch))
        (x0, t), conditioning = self._drawn(batch, rng), self.told(batch)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return self._anchor(x.contiguous(memory_format=self.memory_format), t, conditioning, _mean_square)[1]

        noise = inverted(self.family, predict, x0, t, self.switches.inversion_steps)
        return replace(batch, noise=noise.view(batch.mean.shape))

    def _drawn(self, batch: Batch, rng: Keyed) -> tuple[Tensor, Tensor]:
        """(x0 `[B·N, C, h, w]`, t `[B·N]`) on the device."""
        posterior = rng.normal("posterior", batch.ids, batch.draws, batch.mean.shape[2:])
        mean, std, posterior, t = (self._ship(each) for each in (batch.mean, batch.std, posterior, self.times(batch, rng)))
        return (mean + std * posterior[:, None]).flatten(0, 1), t.repeat_interleave(batch.mean.shape[1])

    def told(self, batch: Batch) -> Conditioning:
        """What the denoiser is told about each of the B·N pictures."""
        return self._of_pictures(batch, batch.conditioning)

    def _of_pictures(self, batch: Batch, conditioning: Conditioning) -> Conditioning:
        conditioning = conditioning.to(self.device).repeat(batch.mean.shape[1])
        return conditioning.joined(GEOMETRY, self._ship(batch.geometry).flatten(0, 1))

    def terms(self, batch: Batch, rng: Keyed) -> Terms:
        """Policy and reference errors of the batch; gradients flow into the policy's."""
        count, pictures = batch.mean.shape[:2]
        batch, root = self.with_noise(batch, rng), self._root(batch)
        x_t, target, t = self.noised(batch, rng)
        conditioning = self.told(batch)
        told = self._asked(batch, conditioning)
        prediction = self._predict(self.policy, x_t, t, told)
        residual = _weighed(prediction - target, root)
        error = _mean_square(residual).view(count, pictures)
        dot = None
        if "residual_dot" in self.objective.needs | reads(self.switches):
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
            found, anchor = self._anchor(x_t, t, conditioning, self._held_to(target, root))
            reference_error = found.view(count, pictures)
        with_drift = anchor is not None and "drift" in self.objective.needs
        return Terms(
            policy_error=error,
            reference_error=reference_error,
            drift=_mean_square(_weighed(prediction - anchor, root)).view(count, pictures) if with_drift else None,
            preference=self._labels(batch, rng),
            num_chosen=self.num_chosen,
            residual_dot=dot,
            scores=self._given(batch.scores, "scores"),
            grades=self._given(batch.grades, "grades"),
            other_error=self._elsewhere(batch, rng, (x_t, target, t), conditioning, root) if self.contrast else None,
        )

    def _asked(self, batch: Batch, conditioning: Conditioning) -> Conditioning:
        return asked(batch, conditioning, partial(self._of_pictures, batch))

    @torch.no_grad()
    def _elsewhere(
        self, batch: Batch, rng: Keyed, drawn: tuple[Tensor, Tensor, Tensor], conditioning: Conditioning, root: Tensor | None
    ) -> Tensor:
        """Errors of the chosen pictures under other weights, `[B, num_chosen]`; infinite where the policy is told none."""
        weights, told = elsewhere(batch, rng)
        rows = torch.arange(batch.mean.shape[:2].numel(), device=self.device).view(batch.mean.shape[:2])
        rows = rows[:, : self.num_chosen].flatten()
        x_t, target, t = (each[rows] for each in drawn)
        prediction = self._predict(
            self.policy, x_t, t, self._asked(replace(batch, objective_weights=weights), conditioning)[rows]
        )
        error = _mean_square(_weighed(prediction - target, None if root is None else root[rows])).view(len(batch), -1)
        return torch.where(self._ship(told)[:, None], error, torch.inf)

    def for_bank(self, batch: Batch, rng: Keyed) -> tuple[Tensor, Tensor]:
        """What a bank stores: the reference's errors `[B, N]` and its predictions `[B, N, C, h, w]`, float32."""
        x_t, target, t = self.noised(batch, rng)
        errors, anchor = self._anchor(x_t, t, self.told(batch), self._held_to(target, self._root(batch)))
        return errors.view(batch.mean.shape[:2]), anchor.view(batch.mean.shape)

    def _root(self, batch: Batch) -> Tensor | None:
        """√m of each picture's mask, `[B·N, 1, h, w]`: with residuals times it, means of products are those weighted by m."""
        return None if batch.mask is None else self._ship(batch.mask).sqrt().flatten(0, 1)[:, None]

    def _held_to(self, target: Tensor, root: Tensor | None) -> Callable[[Tensor], Tensor]:
        """What gives the errors of predictions, of each comparison once however many policies there are."""
        once = slice(len(target) // self.types)
        weight = None if root is None else root[once]
        return lambda prediction: _mean_square(_weighed(prediction - target[once], weight))

    @torch.no_grad()
    def _anchor(
        self, x_t: Tensor, t: Tensor, conditioning: Conditioning, error: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Errors `[B·N]`, as `error` measures them, and predictions `[B·N, C, h, w]` of the reference, float32."""
        if self.reference is None:
            raise ValueError("the step has neither a bank nor a reference")
        once = slice(len(x_t) // self.types)

        def predict(denoiser: nn.Module) -> Tensor:
            return self._predict(denoiser, x_t[once], t[once], conditioning[once])

        if isinstance(self.reference, Merged):
            errors, anchor = self.reference(predict, error)
        else:
            anchor = predict(self.reference)
            errors = error(anchor)
        return (errors, anchor) if self.types == 1 else (errors.repeat(self.types), torch.cat([anchor] * self.types))

    def _predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """`[B·N, C, h, w]` float32, of a denoiser or of a policy that asks its own.

        In chunks no activations are kept: the backward pass runs each chunk again, one at a time.

        An objective of several pictures is thus differentiated with respect to all their errors first, and its gradient then
        goes into the weights chunk by chunk.
        """

        asks = denoiser is self.policy and (self.types > 1 or self.steered)

        def forward(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            with self.autocast():
                given = (x_t, t, conditioning)
                return (denoiser(self.family, *given) if asks else self.family.predict(denoiser, *given)).float()

        if self.chunk is None:
            return forward(x_t, t, conditioning)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            # The forward that is run again must not announce another backward pass to what synchronises the gradients.
            return nullcontext(), getattr(denoiser, "no_sync", nullcontext)()

        parts = (slice(start, start + self.chunk) for start in range(0, len(x_t), self.chunk))
        given = ((x_t[part], t[part], conditioning[part]) for part in parts)
        options = dict(use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        return torch.cat([checkpoint(forward, *each, **options) for each in given])

    def __call__(self, batch: Batch, rng: Keyed) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss `[B]`, weighted, and per-comparison metrics `[B]`, detached; nothing is read back from the device."""
        terms = self.terms(batch, rng)
        loss = self.loss(terms) * self._ship(batch.weight)
        if self.switches.time_weight != "constant":
            loss = loss * self._ship(time_weight(self.family.level(self.times(batch, rng)), self.switches))
        metrics = measured(terms, self.knobs.get("beta", 1.0))
        carried = [part for part in (self.carried, self.adaptive) if part is not None]
        if torch.is_grad_enabled():
            for part in carried:
                metrics |= {f"observed/{name}": value.detach() for name, value in part.observe(terms).items()}
        if self.importance is not None:
            _, bins, weight = self.importance.place(TIMESTEPS[self.timesteps].spread(rng, batch))
            if torch.is_grad_enabled():
                self.importance.observe(self._ship(bins), squared_gradient(loss, terms))
            weight = self._ship(weight)
            loss = loss * weight
            metrics = {name: value * weight for name, value in metrics.items()}  # means as other samplers have them
        for part in carried:  # one value each, however often its times are drawn
            metrics |= {f"{part.name}/{name}": value.expand(len(batch)) for name, value in part.scalars.items()}
        return loss, {"loss": loss.detach(), **metrics}

    def loss(self, terms: Terms) -> Tensor:
        """`[B]`, of the objective and what is mixed into it."""
        carried = () if self.carried is None else (self.carried.scalars,)
        moved = {} if self.adaptive is None else {"beta": self.adaptive.scalars["beta"]}
        scaled = by_gap(terms) if self.switches.pair_scale == "gap" else terms
        loss = self.objective(scaled, *carried, **self.knobs | moved)
        if self.switches.winner_nll:
            loss = loss + self.switches.winner_nll * terms.policy_error[:, : terms.num_chosen].mean(1)
        return loss if terms.other_error is None else loss + contrast(terms, self.contrast)

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
            # Where the policy is told something in words that the reference is not, they differ from the start.
            terms = self.terms(replace(batch, policy_conditioning=None), rng)
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

    def _labels(self, batch: Batch, rng: Keyed) -> Tensor:
        """`[B]` preferences; those of some comparisons, the same ones in every epoch, are turned around by label noise."""
        true, rate = self._ship(batch.preference), self.switches.label_noise
        if not rate:
            return true
        turned = rng.uniform("label-noise", batch.ids, (0,) * len(batch)) < rate
        return torch.where(self._ship(turned), 1 - true, true)

    def _given(self, values: Tensor | None, need: str) -> Tensor | None:
        return self._ship(values) if values is not None and need in self.objective.needs | reads(self.switches) else None

    def _ship(self, tensor: Tensor) -> Tensor:
        """To the device without waiting for it."""
        if self.device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        dtype = torch.float32 if tensor.is_floating_point() else None
        return tensor.to(self.device, dtype, non_blocking=True)


def _weighed(residual: Tensor, root: Tensor | None) -> Tensor:
    return residual if root is None else root * residual


def _mean_square(residual: Tensor) -> Tensor:
    return residual.square().flatten(1).mean(1)
