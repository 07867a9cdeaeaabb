"""What several denoisers say together while pictures are drawn: means of predictions, and a negative branch of its own.

Both hang on the denoiser that a plain pipeline holds, as hooks on its forward; the pipeline itself stays what it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowalign.errors import ConfigError


def weighted(weights: Sequence[float] | Tensor, predictions: Sequence[Tensor]) -> Tensor:
    """Σ_k w_k of predictions of one shape."""
    return torch.stack([weight * each for weight, each in zip(weights, predictions, strict=True)]).sum(0)


def mix(denoiser: nn.Module, others: Sequence[nn.Module], weights: Sequence[float]) -> None:
    """Have `denoiser` give the weighted sum of its own prediction, which has the first weight, and those of `others`.

    With weights of 1 in sum and Gaussian steps it is the normalised geometric mean Π π_k^{w_k} of the policies' steps. Policies
    that are each the best for a reward, held to one reference by one β, have in that mean the best for the weighted reward (Shi
    et al. 2024, 2406.18853); here the mean is taken step by step, which is an approximation of it.
    """

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        told = [output[0], *(other(*args, **kwargs)[0] for other in others)]
        if isinstance(told[0], Tensor):
            return (weighted(weights, told), *output[1:])
        return ([weighted(weights, rows) for rows in zip(*told, strict=True)], *output[1:])

    denoiser.register_forward_hook(hook, with_kwargs=True)


def oppose(denoiser: nn.Module, negative: nn.Module, strength: float, half: str | None) -> None:
    """Have `denoiser` speak for the negative prompts of guidance as `negative` does: (1 − s) ε(∅) + s ε⁻(∅).

    A guided picture then moves away from what a policy of the opposite preferences draws: ε⁻ + g(ε(c) − ε⁻) at s = 1 (Wang et
    al. 2025, 2505.11245, Diffusion-NPO); s = 0 is what was. half: the rows of a call that are the negative prompts', first or
    last, see `Family.negative`. Raises ConfigError for None, a pipeline that asks for them in a call of its own, or never.
    """
    if half is None:
        raise ConfigError(
            "a negative run is for pipelines that put prompt and negative prompt through the denoiser together, and this one "
            "does not; leave the negative run out."
        )

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        own = output[0]
        count = len(own)
        rows = slice(0, count // 2) if half == "first" else slice(count // 2, count)
        said = negative(*_rows(args, count, rows), **_rows(kwargs, count, rows))[0]
        moved = [(1 - strength) * mine + strength * other for mine, other in zip(own[rows], said, strict=True)]
        if isinstance(own, Tensor):
            kept = own[count // 2 :] if half == "first" else own[: count // 2]
            parts = [torch.stack(moved), kept]
            return (torch.cat(parts if half == "first" else parts[::-1]), *output[1:])
        return ([*own[: rows.start], *moved, *own[rows.stop :]], *output[1:])

    denoiser.register_forward_hook(hook, with_kwargs=True)


def _rows(value: Any, count: int, rows: slice) -> Any:
    """Arguments of a call for `count` pictures -> those for some of them; what has no row for each stays."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() and len(value) == count else value
    if isinstance(value, Mapping):
        return {name: _rows(each, count, rows) for name, each in value.items()}
    if isinstance(value, list):
        return value[rows] if len(value) == count else value
    if isinstance(value, tuple):
        return tuple(_rows(each, count, rows) for each in value)
    return value
