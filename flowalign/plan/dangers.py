"""Settings that are known to end badly, each as one sentence with the value and what to do.

Where a limit comes from two runs, one that held and one that did not, it is their geometric mean.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf, sqrt

import torch

from flowalign import plugins
from flowalign.align.carried import loss_at_start
from flowalign.align.terms import Terms
from flowalign.plan.data import Counted
from flowalign.settings import Config

RATIO = {"full": sqrt(4.1e-9 * 6.7e-8), "lora": sqrt(7.5e-7 * 2e-6)}
"""Largest learning rate / β. All weights: 2.048e-5 / 5000 is Diffusion-DPO's, 2e-5 / 300 collapsed on an emoji U-Net.
LoRA: 4.5e-4 / 600 held, 6e-4 / 300 raised the error of chosen pictures (docs/LOG.md)."""
PUBLISHED = 2.048e-5 * 5000
"""Learning rate times β of Diffusion-DPO's code (Wallace et al. 2023, 2311.12908), 2048 pairs a step, all weights."""
FAR_BELOW = 500
"""Times below `PUBLISHED` where the paper's rate, printed 1000 times too small, is the likely source."""
SMALLEST_LORA = 1e-6
SUMS = 40
"""Times below an objective's default β where a β for sums over elements is the likely source."""
FEWEST, MOST_EPOCHS = 8, 20
LOST, BLIND = 0.01, 1e-12
"""A slope of the loss below which gradients are lost in an Adam's ε above the second. At their defaults ipo, mipo and sppo have
1e-4 to 3e-4, all other objectives 0.5 or more, dpo 500."""


@dataclass(frozen=True)
class Facts:
    """What the rules look at."""

    config: Config
    knobs: dict[str, float]
    """The objective's, defaults included; without a β that is yet to be found."""
    needs: frozenset[str]
    counted: Counted
    elements: int
    """of a picture's latent, d"""
    processes: int = 1
    """that share a step, each with comparisons of its own"""

    @property
    def pairs_per_micro_step(self) -> int:
        return self.config.train.batch_size * self.processes

    @property
    def pairs_per_step(self) -> int:
        return self.pairs_per_micro_step * self.config.train.accumulation

    @property
    def epochs(self) -> float | None:
        """E, how often the run sees each comparison."""
        return self.config.train.steps * self.pairs_per_step / self.counted.train if self.counted.train else None

    @property
    def sums(self) -> bool:
        """β is so far below its default that it is meant for sums over elements."""
        default = inspect.signature(plugins.load("objectives", self.config.objective.name)).parameters.get("beta")
        return default is not None and self.knobs.get("beta", default.default) * SUMS < default.default

    @property
    def slope(self) -> float:
        """Largest |∂loss/∂e| of a comparison on which policy and reference agree; infinite where it cannot be compared so."""
        objective, count = plugins.load("objectives", self.config.objective.name), self.counted.per_comparison
        error, ones, falling = torch.ones(1, count, requires_grad=True), torch.ones(1, count), torch.linspace(1, 0, count)[None]
        terms = Terms(error, ones, 0 * ones, ones[:, 0], self.counted.num_chosen, 0 * ones[:, 0], falling, falling)
        try:
            loss = loss_at_start(objective, self.knobs, terms)
        except ValueError:
            return inf
        return float(torch.autograd.grad(loss.sum(), error)[0].abs().max())


def _beta_of_sums(facts: Facts) -> Iterator[str]:
    if facts.sums:
        beta, d = facts.knobs["beta"], facts.elements
        yield (
            f"objective.beta {beta:g} looks like a β for sums over elements, but errors here are means: for the same strength "
            f"set objective.beta={beta * d:g}, times the {d:,} elements of a latent."
        )


def _collapse(facts: Facts) -> Iterator[str]:
    rate, beta, kind = facts.config.train.learning_rate, facts.knobs.get("beta"), facts.config.trainable.kind
    if beta and not facts.sums and kind in RATIO and rate / beta > RATIO[kind]:
        yield (
            f"train.learning_rate {rate:g} with objective.beta {beta:g} and trainable.kind {kind} is a ratio of "
            f"{rate / beta:.1e}, and beyond {RATIO[kind]:.1e} the error of chosen pictures rises and they turn to mush: set "
            f"train.learning_rate={RATIO[kind] * beta:.1e} or less, or objective.beta={rate / RATIO[kind]:.0f} or more."
        )


def _printed_rate(facts: Facts) -> Iterator[str]:
    rate, beta = facts.config.train.learning_rate, facts.knobs.get("beta")
    if facts.config.trainable.kind == "full" and beta and not facts.sums and rate * beta * FAR_BELOW < PUBLISHED:
        yield (
            f"train.learning_rate {rate:g} is {PUBLISHED / rate / beta:,.0f} times below that of Diffusion-DPO's code at "
            f"objective.beta {beta:g} (the rate goes with 1/β, and the paper prints it 1000 times too small): set "
            f"train.learning_rate={PUBLISHED / beta:.3g} for 2048 pairs a step, less for fewer."
        )


def _rate_of_all_weights(facts: Facts) -> Iterator[str]:
    rate = facts.config.train.learning_rate
    if facts.config.trainable.kind == "lora" and rate < SMALLEST_LORA:
        yield (
            f"train.learning_rate {rate:g} is a rate for all weights, and a LoRA would hardly move: set it from 1e-5 to 5e-4."
        )


def _few_pairs(facts: Facts) -> Iterator[str]:
    if facts.pairs_per_step < FEWEST:
        yield (
            f"a step sees {facts.pairs_per_step} comparisons, fewer than any recipe that is known to hold (16 to 2048): set "
            f"train.accumulation={-(-16 // facts.pairs_per_micro_step)} or more."
        )


def _by_heart(facts: Facts) -> Iterator[str]:
    if facts.epochs and facts.epochs > MOST_EPOCHS:
        steps = round(facts.config.train.steps * MOST_EPOCHS / facts.epochs)
        yield (
            f"train.steps {facts.config.train.steps} sees each of the {facts.counted.train:,} comparisons {facts.epochs:.0f} "
            f"times, which learns them by heart: set train.steps={steps} or fewer, or add comparisons."
        )


def _idle_bank(facts: Facts) -> Iterator[str]:
    draws = facts.config.reference.bank
    if draws and not facts.needs & {"reference", "drift"}:
        yield (
            f"reference.bank {draws} stores what the reference says, but objective.name {facts.config.objective.name} needs no "
            "reference, and flowalign align refuses it: set reference.bank=null."
        )
    elif draws and facts.epochs and draws >= facts.epochs:
        yield (
            f"reference.bank {draws} costs {draws} reference forwards a comparison and the run has {facts.epochs:.2g} epochs: "
            f"nothing is won unless other runs read the bank too, so set reference.bank=null or fewer draws than epochs."
        )


def _blind_adam(facts: Facts) -> Iterator[str]:
    if facts.slope < LOST and facts.config.train.adam_eps > BLIND:
        yield (
            f"train.adam_eps {facts.config.train.adam_eps:g} is larger than the gradients of objective.name "
            f"{facts.config.objective.name}, so nothing would be learned: set train.adam_eps=1e-15."
        )


RULES: tuple[Callable[[Facts], Iterator[str]], ...] = (
    _beta_of_sums,
    _collapse,
    _printed_rate,
    _rate_of_all_weights,
    _few_pairs,
    _by_heart,
    _idle_bank,
    _blind_adam,
)


def dangers(facts: Facts) -> list[str]:
    """All that applies."""
    return [sentence for rule in RULES for sentence in rule(facts)]
