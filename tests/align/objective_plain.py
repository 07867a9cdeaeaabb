"""Comparisons and formulas of objectives in plain Python numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import NormalDist

Floats = tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """One comparison in plain numbers: errors of policy and reference, drift, label, scores, grades, what is carried."""

    e: Floats
    r: Floats
    q: Floats
    p: float
    k: int
    s: Floats
    g: Floats
    carried: dict[str, float] = field(default_factory=dict)

    @property
    def h(self) -> Floats:
        return tuple(0.5 * (r - e) for e, r in zip(self.e, self.r, strict=True))

    @property
    def l(self) -> Floats:  # noqa: E743
        return tuple(-e / 2 for e in self.e)

    def chosen(self, values: Floats) -> float:
        return sum(values[: self.k]) / self.k

    def rejected(self, values: Floats) -> float:
        return sum(values[self.k :]) / (len(values) - self.k)

    def gap(self, values: Floats) -> float:
        return self.chosen(values) - self.rejected(values)

    @property
    def margin(self) -> float:
        return self.gap(self.h)

    @property
    def other(self) -> Comparison:
        """After the opposite vote."""
        turn = {name: getattr(self, name)[self.k :] + getattr(self, name)[: self.k] for name in ("e", "r", "q", "s", "g")}
        return replace(self, **turn, p=1 - self.p, k=len(self.e) - self.k)

    @property
    def wanted(self) -> Floats:
        return tuple(self.p if i < self.k else 1 - self.p for i in range(len(self.e)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def nls(x: float) -> float:
    """−log σ(x)."""
    return math.log1p(math.exp(-x))


def votes(c: Comparison, loss: Callable[[Comparison], float]) -> float:
    return c.p * loss(c) + (1 - c.p) * loss(c.other)


def both(c: Comparison, still: Comparison, loss: Callable[[Comparison, Comparison], float]) -> float:
    """As `votes`, for a loss of which some parts stand still."""
    return c.p * loss(c, still) + (1 - c.p) * loss(c.other, still.other)


def variance(values: Floats) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def phi(x: float, s: float) -> float:
    return s * x / (math.exp(s * x) - 1)


def power_of(ratio: float, a: float) -> float:
    return (ratio**a - 1) / a


def slack(x: float) -> float:
    return max(0.0, x)


def ranks(values: Floats) -> list[int]:
    order = sorted(range(len(values)), key=lambda i: -values[i])
    return [order.index(i) + 1 for i in range(len(values))]


def softmax(values: Floats) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def rankdpo(c: Comparison, still: Comparison, beta: float) -> float:
    rank, n = ranks(still.h), range(len(c.e))
    return sum(
        abs(2 ** c.g[i] - 2 ** c.g[j])
        * abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
        * nls(beta * (c.h[i] - c.h[j]))
        for i in n
        for j in n
        if c.g[i] > c.g[j]
    )


def opo(c: Comparison, beta: float, temperature: float) -> float:
    n = range(len(c.e))
    place = [1 + sum(sigmoid(beta * (c.h[j] - c.h[i]) / temperature) for j in n if j != i) for i in n]
    gain = [2**g - 1 for g in c.g]
    ideal = sum(g / math.log2(2 + i) for i, g in enumerate(sorted(gain, reverse=True)))
    return -sum(gain[i] / math.log2(1 + place[i]) for i in n) / ideal


def plackett_luce(c: Comparison, beta: float, tau: float, nll: float) -> float:
    s, total = [beta * h for h in c.h], nll * c.e[0]
    for i in range(len(s)):
        q = softmax(tuple(g / tau for g in c.g[i:]))
        total += math.log(sum(math.exp(x) for x in s[i:])) - sum(a * b for a, b in zip(q, s[i:], strict=True))
    return total


def exo(x: float, epsilon: float) -> float:
    q = sigmoid(x)
    return q * math.log(q / (1 - epsilon)) + (1 - q) * math.log((1 - q) / epsilon)


def step(c: Comparison, epsilon: float) -> int:
    d = c.gap(c.q)
    lead = 2 * c.margin - d
    return int(lead > epsilon * abs(d)) - int(lead < -epsilon * abs(d))


def dspo(c: Comparison, still: Comparison, beta: float, weight: float) -> float:
    kappa = weight * (1 - sigmoid(beta * still.margin))
    e, r, q = c.chosen(c.e), c.chosen(c.r), c.chosen(c.q)
    return e - 2 * kappa * (e + q - r) / 2 + kappa**2 * q


def linear_dpo(c: Comparison, still: Comparison, beta: float, eta: float) -> float:
    d = still.gap(still.e) - still.gap(still.r)
    return min(max(0.5 + 0.2 * beta * d, eta), 1 - eta) * c.gap(c.e)


def alpha_dpo(c: Comparison, still: Comparison, beta: float, gamma: float, alpha: float, sign: float) -> float:
    z = (beta * still.margin - sign * c.carried["mean"]) / c.carried["deviation"]
    return nls(beta * c.gap(c.l) - gamma - alpha * z)


def beta_dpo(c: Comparison, still: Comparison, beta: float, keep: float) -> float:
    reach = NormalDist().inv_cdf((1 + keep) / 2) * c.carried["deviation"]

    def loss(sign: int) -> float:
        kept = abs(sign * beta * still.margin - c.carried["mean"]) <= reach
        return kept / keep * nls(sign * c.carried["beta"] * c.margin)

    return c.p * loss(1) + (1 - c.p) * loss(-1)


def weighted_sft(c: Comparison) -> float:
    mean = sum(c.s) / len(c.s)
    deviation = math.sqrt(sum((s - mean) ** 2 for s in c.s) / len(c.s))
    return sum(max(0.0, (c.s[i] - mean) / deviation) * c.e[i] for i in range(c.k)) / c.k


def lair(c: Comparison, beta: float, tau: float) -> float:
    a = [q - 1 / len(c.g) for q in softmax(tuple(g / tau for g in c.g))]
    return sum((beta * h) ** 2 / 2 - x * beta * h for x, h in zip(a, c.h, strict=True))


def nft(c: Comparison, b: float) -> float:
    total = 0.0
    for e, r, q, p in zip(c.e, c.r, c.q, c.wanted, strict=True):
        total += p * ((1 - b) * r + b * e - b * (1 - b) * q) + (1 - p) * ((1 + b) * r - b * e + b * (1 + b) * q)
    return total / len(c.e)


def kto(c: Comparison, beta: float, desirable: float, undesirable: float) -> float:
    total = 0.0
    for h, p in zip(c.h, c.wanted, strict=True):
        x = beta * (h - c.carried["z0"])
        total += p * desirable * (1 - sigmoid(x)) + (1 - p) * undesirable * (1 - sigmoid(-x))
    return total / len(c.e)
