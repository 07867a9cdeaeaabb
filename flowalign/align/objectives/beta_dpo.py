"""β-DPO: a β for each step by how far the pairs are apart, without the unlikely ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import NormalDist

from torch import Tensor
from torch.nn.functional import logsigmoid

from flowalign.align.terms import Terms, carries, needs, running_moments


def start(*, beta: float, gain: float, keep: float, decay: float) -> dict[str, float]:
    """β, and mean and deviation of the rewards' margin, before the first step."""
    return {"beta": beta, "mean": 0.0, "deviation": 1.0}


def kept(reward: Tensor, carried: Mapping[str, Tensor], keep: float) -> Tensor:
    """`[B]` 1 where a reward margin βΔ lies in the central share `keep` of the running normal law, 0 elsewhere."""
    reach = NormalDist().inv_cdf((1 + keep) / 2) if keep < 1 else float("inf")
    return ((reward - carried["mean"]).abs() <= reach * carried["deviation"]).to(reward.dtype)


def observe(
    terms: Terms, carried: Mapping[str, Tensor], *, beta: float, gain: float, keep: float, decay: float
) -> dict[str, Tensor]:
    """Moments of βΔ, of all pairs and of those that are kept, in expectation over a soft label."""
    of: dict[str, Callable[[Tensor], Tensor]] = {
        "reward": lambda reward: reward,
        "square": lambda reward: reward.square(),
        "kept": lambda reward: kept(reward, carried, keep),
        "kept_reward": lambda reward: kept(reward, carried, keep) * reward,
    }
    return {name: terms.expected(value, margin=beta * terms.margin.detach()) for name, value in of.items()}


def advance(
    carried: Mapping[str, Tensor], means: Mapping[str, Tensor], *, beta: float, gain: float, keep: float, decay: float
) -> dict[str, Tensor]:
    """Running mean and deviation, and β(1 + a(mean of the kept − running mean)), not below a hundredth of β."""
    moments = running_moments(carried, means, decay)
    lead = means["kept_reward"] / means["kept"].clamp_min(1e-6) - moments["mean"]
    return {"beta": beta * (1 + gain * lead).clamp_min(0.01), **moments}


@carries(start=start, observe=observe, advance=advance)
@needs("reference")
def beta_dpo(
    terms: Terms,
    carried: Mapping[str, Tensor],
    *,
    beta: float = 2000.0,
    gain: float = 0.6,
    keep: float = 0.8,
    decay: float = 0.9,
) -> Tensor:
    """−log σ(β_t Δ)/ρ for pairs that are kept, else 0; β_t = β(1 + a(mean βΔ of the kept − running mean)); returns `[B]`.

    a = `gain`, ρ = `keep`. In expectation over a soft label. The paper takes all from the batch itself and draws the kept
    pairs; here they come from the steps before, and a pair is kept if it lies in the central ρ of the running normal law, so
    that a pair's loss does not depend on its neighbours. β as in `dpo`.

    Source: Wu et al. 2024, arXiv 2407.08639 (β-DPO); defaults and floor from the authors' code.
    """

    def loss(margin: Tensor) -> Tensor:
        return -logsigmoid(carried["beta"] * margin) * kept(beta * margin.detach(), carried, keep) / keep

    return terms.expected(loss)
