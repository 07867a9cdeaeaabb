"""FLOP of one comparison, counted while the trainer's own step runs on the meta device.

A multiplication with an addition is 2 FLOP. Only matrix products and convolutions count, as torch's FlopCounterMode has it;
attention is its two products, and four more in the backward pass: fused kernels that compute the scores once more there do
more than is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowalign.plan.model import Outline
from flowalign.rng import Keyed


@dataclass(frozen=True)
class Flops:
    """FLOP per comparison of N pictures and one prompt."""

    policy_forward: int
    policy_backward: int
    """With the forward that gradient checkpointing repeats."""
    reference: int
    """A forward without gradients, 0 where the objective needs none, and those of an inversion."""
    images: int
    """The pictures through the picture encoder."""
    prompts: int
    """The prompt through the text encoders."""

    @property
    def bank(self) -> int:
        """A step with cached latents and prompts and stored reference errors."""
        return self.policy_forward + self.policy_backward

    @property
    def cached(self) -> int:
        """A step with cached latents and prompts."""
        return self.bank + self.reference

    @property
    def re_encoded(self) -> int:
        """A step that encodes its pictures and prompts."""
        return self.cached + self.images + self.prompts


def counted(work: Callable[[], object]) -> int:
    """FLOP of what `work` does."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return int(counter.get_total_flops())


def count(outline: Outline) -> Flops:
    """Run each part of a step of one comparison and count."""
    batch, rng = outline.batch(1), Keyed(0)
    losses: list[Tensor] = []

    def ask() -> None:
        known = outline.step.with_noise(batch, rng)
        if outline.step.objective.needs:
            outline.step.for_bank(known, rng)

    return Flops(
        policy_forward=counted(lambda: losses.append(outline.banked(batch, rng)[0])),
        policy_backward=counted(lambda: losses[0].mean().backward()),
        reference=counted(ask),
        images=counted(lambda: outline.family.encode_images(outline.pixels())),
        prompts=counted(lambda: outline.family.outline_prompts(1)),
    )
