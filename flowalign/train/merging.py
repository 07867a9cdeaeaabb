"""Several fine-tunes of one base as one: weighted sums of what they changed, pure functions of tensors.

A LoRA changes a weight by ΔW = s·B·A with A `[r, in, ...]`, B `[out, r, ...]` and s = alpha / r. Any sum Σ c_k ΔW_k is one as
well, of the ranks' sum: A = [A_1; A_2; …], B = [c_1 s_1 B_1, c_2 s_2 B_2, …]. That is exact; the mean of the factors is not, as
its product has the cross terms B_1 A_2. Every way to merge here is such a sum with coefficients of its own for each weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flowalign.errors import CheckpointError, ConfigError, allowed

WAYS = ("linear", "slerp", "warp")
BACK = 0.5
"""Of warp, unless it is said."""
STRAIGHT = 1e-6
"""Below this sine of their angle two changes count as parallel."""

Factors = dict[str, tuple[Tensor, Tensor]]
"""Layer -> (A `[r, in, ...]`, B `[out, r, ...]`) with ΔW = B·A, the scale being in B."""


def shares(weights: Sequence[float] | None, count: int, how: str) -> list[float]:
    """The weight of each of `count` runs, by default 1/count. Raises ConfigError.

    linear takes any finite ones: it adds changes up, and a negative weight takes one away. slerp and warp go along arcs: theirs
    are above 0 and sum to 1.
    """
    if how not in WAYS:
        raise ConfigError(f"runs are merged by {how!r}; {allowed(how, WAYS)}.")
    if count < 2:
        raise ConfigError(f"number of runs to merge is {count}; give two or more of one base.")
    if weights is None:
        return [1 / count] * count
    if len(weights) != count or not all(map(math.isfinite, weights)):
        raise ConfigError(f"weights {list(weights)} are given for {count} runs; give one finite number for each.")
    if how != "linear" and (min(weights) <= 0 or abs(sum(weights) - 1) > 1e-6):
        raise ConfigError(
            f"weights {list(weights)} sum to {sum(weights):g}; {how} takes weights above 0 that sum to 1; linear takes any."
        )
    return list(weights)


def coefficients(gram: Tensor, weights: Sequence[float], how: str, back: float) -> Tensor:
    """c `[M]` of the merged change Σ c_k ΔW_k of one weight, from the inner products ⟨ΔW_i, ΔW_j⟩ `[M, M]`, float64.

    linear: c = w (rewarded soups, Ramé et al. 2023, 2306.04488). slerp: two changes are joined along the arc between them,
    sin((1−λ)Ω)/sin Ω · δ_1 + sin(λΩ)/sin Ω · δ_2 with Ω their angle, which keeps the length that a mean of changes in different
    directions loses; a third is then joined to these with its share of the weights so far, and so on, in the order given (WARP,
    Ramé et al. 2024, 2406.16768). Parallel changes, opposite ones and ones of length 0 are joined in a straight line. warp: the
    same. Then everything goes `back` of the way to the base: times 1 − back, which is WARP's η.
    """
    count = len(weights)
    out = torch.zeros(count, dtype=torch.float64)
    if how == "linear":
        out = torch.tensor(list(weights), dtype=torch.float64)
    else:
        total = 0.0
        for place, weight in enumerate(weights):
            total += weight
            one = torch.zeros(count, dtype=torch.float64)
            one[place] = 1.0
            out = one if place == 0 else _arc(gram.double(), out, one, weight / total)
    return (1 - back) * out


def _arc(gram: Tensor, first: Tensor, second: Tensor, share: float) -> Tensor:
    """Coefficients of the point `share` of the way from one change to another, each given by its own coefficients."""
    lengths = [float((c @ gram @ c).clamp_min(0).sqrt()) for c in (first, second)]
    if min(lengths) > 0:
        cosine = max(-1.0, min(1.0, float(first @ gram @ second) / (lengths[0] * lengths[1])))
        angle = math.acos(cosine)
        if math.sin(angle) > STRAIGHT:
            parts = (math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle))
            return parts[0] * first + parts[1] * second
    return (1 - share) * first + share * second


def gram_of_factors(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """⟨B_i A_i, B_j A_j⟩ `[M, M]`, float64, without making the products: tr((B_iᵀB_j)(A_jA_iᵀ))."""
    downs = [a.double().flatten(1) for a, _ in parts]
    ups = [b.double().flatten(1) for _, b in parts]
    count = len(parts)
    return torch.stack(
        [torch.stack([((ups[i].T @ ups[j]) * (downs[i] @ downs[j].T)).sum() for j in range(count)]) for i in range(count)]
    )


def merge_factors(
    runs: Sequence[Factors], weights: Sequence[float], how: str, back: float
) -> tuple[Factors, dict[str, list[float]]]:
    """LoRAs of one base -> (their merge, the coefficients of every layer), exact: each layer's rank is the sum of theirs.

    A layer that a run does not adapt was changed by 0 there; it gets zeros, so that every layer has the same rank. Raises
    CheckpointError where a layer has other shapes in one run than in another.
    """
    ranks = [max(len(a) for a, _ in run.values()) for run in runs]
    merged: Factors = {}
    used: dict[str, list[float]] = {}
    for layer in sorted({layer for run in runs for layer in run}):
        known = next(run[layer] for run in runs if layer in run)
        parts = []
        for run, rank in zip(runs, ranks, strict=True):
            a, b = run.get(layer, (known[0][:0], known[1][:, :0]))
            if a.shape[1:] != known[0].shape[1:] or len(b) != len(known[1]):
                raise CheckpointError(
                    f"the layer {layer} is {len(known[1])} x {tuple(known[0].shape[1:])} in one run and {len(b)} x "
                    f"{tuple(a.shape[1:])} in another, so they are not of one base; merge runs of the same base."
                )
            parts.append((_padded(a.float(), rank, 0), _padded(b.float(), rank, 1)))
        c = coefficients(gram_of_factors(parts), weights, how, back)
        used[layer] = c.tolist()
        merged[layer] = (
            torch.cat([a for a, _ in parts]),
            torch.cat([float(share) * b for share, (_, b) in zip(c, parts, strict=True)], dim=1),
        )
    return merged, used


def _padded(tensor: Tensor, size: int, dim: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


def compressed(factors: Factors, rank: int) -> tuple[Factors, float]:
    """(the nearest LoRA of at most this rank, ‖ΔW − ΔW'‖ / ‖ΔW‖ over all layers), by the SVD of each layer's ΔW.

    Eckart and Young 1936: no other of that rank is nearer. ΔW = (Q_B R_B)(Q_A R_A)ᵀ, so only R_B R_Aᵀ, of the size of the rank,
    is decomposed.
    """
    out: Factors = {}
    lost = kept = 0.0
    for layer, (a, b) in factors.items():
        q_a, r_a = torch.linalg.qr(a.double().flatten(1).T)
        q_b, r_b = torch.linalg.qr(b.double().flatten(1))
        u, values, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        lost += float(values[rank:].square().sum())
        kept += float(values.square().sum())
        root = values[:rank].sqrt()
        down, up = (root[:, None] * (v[:rank] @ q_a.T)).float(), ((q_b @ u[:, :rank]) * root).float()
        down, up = _padded(down, max(rank, len(down)), 0), _padded(up, max(rank, up.shape[1]), 1)
        out[layer] = (down.reshape(-1, *a.shape[1:]), up.reshape(len(b), -1, *b.shape[2:]))
    return out, math.sqrt(lost / kept) if kept else 0.0


@torch.no_grad()
def merge_weights(
    base: Mapping[str, Tensor], runs: Sequence[Mapping[str, Tensor]], weights: Sequence[float], how: str, back: float
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """All weights of fine-tunes and of their base -> (those of the merge, the coefficients of every tensor).

    θ = θ_0 + Σ c_k (θ_k − θ_0), with c of each tensor its own. Raises CheckpointError where names or shapes differ.
    """
    merged: dict[str, Tensor] = {}
    used: dict[str, list[float]] = {}
    for name, start in base.items():
        if any(name not in run or run[name].shape != start.shape for run in runs):
            raise CheckpointError(f"the tensor {name} of the base is not in every run; merge runs of the same base.")
        if not start.is_floating_point():
            merged[name] = start.clone()
            continue
        changes = torch.stack([run[name].double().flatten() - start.double().flatten() for run in runs])
        c = coefficients(changes @ changes.T, weights, how, back)
        used[name] = c.tolist()
        merged[name] = (start.double() + (c @ changes).reshape(start.shape)).to(start.dtype)
    return merged, used
