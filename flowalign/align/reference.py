"""The policy that learns and the reference it is held against, made from one pretrained denoiser."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from flowalign.errors import ConfigError
from flowalign.settings import Reference

MOVING = ("ema", "refresh")
"""Kinds of reference that follow the policy."""
BEGINNING = (*MOVING, "start")
"""Kinds of reference that are, before the first step, what the policy is then."""


def second(module: nn.Module, shared: Iterable[Tensor] | None = None) -> nn.Module:
    """A copy of a module over the same `shared` tensors, by default all of its parameters and buffers."""
    kept = (*module.parameters(), *module.buffers()) if shared is None else shared
    return copy.deepcopy(module, {id(tensor): tensor for tensor in kept})


def with_reference(denoiser: nn.Module, kind: str, *, lora: bool, banked: bool = False) -> tuple[nn.Module, nn.Module | None]:
    """Return (policy, reference), both equal to `denoiser` at this moment.

    `adapters_off`: the policy is a second module over the *same* parameter tensors. LoRA layers are then added to it
    alone, so the reference is the policy with its adapters off, costs no memory, and nothing is switched at each step.
    `copy`: the policy has parameters of its own. `auto`, `start` and the moving kinds: `adapters_off` for LoRA, `copy` for a
    full fine-tune; see `standing` and `following` for what else those need.
    `banked`: the reference's errors are stored, so a full fine-tune takes `denoiser` itself and has no second one, and `merged`
    references, which `merged.open_merged` makes, are not held.

    Raises ConfigError for `adapters_off` without LoRA, where the reference would move with the policy, and for a bank of a
    reference that moves or is not the model itself.
    """
    if kind == "adapters_off" and not lora:
        raise ConfigError(
            "reference.kind is 'adapters_off', but trainable.kind 'full' has no adapters; allowed: auto, copy, ema, refresh; "
            "set reference.kind=auto or trainable.kind=lora."
        )
    if kind in MOVING and banked:
        raise ConfigError(
            f"reference.bank stores what a reference says once and for all, but reference.kind {kind!r} moves; set "
            "reference.bank=null, or reference.kind=auto."
        )
    if kind == "start" and banked:
        raise ConfigError(
            "reference.bank stores what the model itself says, but reference.kind 'start' is the model as trainable.start left "
            "it; set reference.bank=null, or reference.kind=auto."
        )
    denoiser.requires_grad_(False)
    if banked and not lora:
        return denoiser, None
    share = lora and kind != "copy"
    policy = second(denoiser) if share else copy.deepcopy(denoiser)
    return policy, None if banked and kind == "merged" else denoiser


class Following:
    """A reference that follows the policy: everything that learns has a second value, which is moved towards the first.

    `ema` moves it at every step, by 1 − τ (Zhang et al. 2026, 2605.21123); `refresh` every so many steps, by `mix` or all the
    way (TR-DPO, Gorbatovski et al. 2024, 2404.09656).
    """

    def __init__(self, policy: Mapping[str, Tensor], reference: Mapping[str, Tensor], settings: Reference) -> None:
        """policy: what learns, by name; reference: tensors of the same names and more."""
        self._policy = list(policy.values())
        self._reference = {name: reference[name] for name in policy}
        self._settings = settings

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Called with the number of finished steps after each."""
        how = self._settings
        if how.kind == "ema" or step % how.every == 0:
            share = 1 - how.decay if how.kind == "ema" else how.mix
            torch._foreach_lerp_(list(self._reference.values()), self._policy, share)

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed run needs, to be restored in place."""
        return {f"reference/{name}": tensor for name, tensor in self._reference.items()}


def standing(policy: nn.Module, frozen: nn.Module, *, lora: bool) -> nn.Module:
    """A reference that stays where a policy stands that is ready to train: `frozen` itself for a full fine-tune, which must
    hold the same weights, and with LoRA a third module over the same pretrained tensors, with adapters of its own."""
    if not lora:
        return frozen
    reference = second(policy, [each for each in (*policy.parameters(), *policy.buffers()) if not each.requires_grad])
    return reference.requires_grad_(False)


def following(policy: nn.Module, frozen: nn.Module, settings: Reference, *, lora: bool) -> tuple[nn.Module, Following]:
    """(reference, what moves it) for a policy that is ready to train and the pretrained denoiser `frozen`, see `standing`."""
    reference = standing(policy, frozen, lora=lora)
    learned = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    return reference, Following(learned, dict(reference.named_parameters()), settings)
