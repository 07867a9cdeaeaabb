"""One row per objective: knobs, and its formula written out again in plain Python; what it is excused from, and why."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from flowalign.align.terms import Terms
from tests.align.objective_plain import (
    Comparison,
    Floats,
    alpha_dpo,
    beta_dpo,
    both,
    dspo,
    exo,
    kto,
    lair,
    linear_dpo,
    nft,
    nls,
    opo,
    phi,
    plackett_luce,
    power_of,
    rankdpo,
    sigmoid,
    slack,
    softmax,
    step,
    variance,
    votes,
    weighted_sft,
)


@dataclass(frozen=True)
class Row:
    """What is known of one objective under given knobs."""

    formula: Callable[[Comparison, Comparison], float]
    """Of a comparison, and of the same one as far as the gradient does not see it."""
    knobs: dict[str, Any]
    takes: str = "pairs"
    needs: frozenset[str] = frozenset({"reference"})
    carried: dict[str, float] | None = None
    label: str = "expectation"
    """`expectation` over votes, in its `gradient` only, or `unread`."""
    signs: tuple[int, int] = (1, -1)
    """Of the gradient in the first and the last picture's error where policy and reference agree."""
    opposite: tuple[int, int] | None = None
    """The same after the opposite label; None is `signs` the other way round."""
    shift: str = "value"
    """What a constant in the errors of both models leaves alone: the `value`, the `gradient`, or the value if the constant is
    `common` to all pictures."""
    stops: bool = False
    """Whether parts of it carry no gradient, so that finite differences of the value are not its gradient."""
    why: str = ""
    """The reason of each exception."""


R, RD, RS, RG = (frozenset({"reference", *more}) for more in ((), ("drift",), ("scores",), ("grades",)))
FREE: frozenset[str] = frozenset()
UNREAD = "the scores or grades are the label"
MIRRORED = "it is made of squared distances to a target"

ROWS: dict[str, list[Row]] = {
    "dpo": [
        Row(lambda c, _: votes(c, lambda v: nls(40 * v.margin)), {"beta": 40.0}),
        Row(
            lambda c, _: votes(c, lambda v: 0.9 * nls(40 * v.margin) + 0.1 * nls(-40 * v.margin)),
            {"beta": 40.0, "label_smoothing": 0.1},
        ),
    ],
    "hinge": [Row(lambda c, _: votes(c, lambda v: slack(1 - 40 * v.margin)), {"beta": 40.0})],
    "ipo": [Row(lambda c, _: votes(c, lambda v: (v.margin - 1 / 50) ** 2), {"tau": 25.0})],
    "rdpo": [
        Row(
            lambda c, _: votes(c, lambda v: (0.8 * nls(40 * v.margin) - 0.2 * nls(-40 * v.margin)) / 0.6),
            {"beta": 40.0, "flips": 0.2},
        )
    ],
    "slic": [
        Row(
            lambda c, _: votes(c, lambda v: slack(0.3 - v.gap(v.l)) + 0.2 * v.chosen(v.e) / 2),
            {"delta": 0.3, "weight": 0.2},
            needs=FREE,
        )
    ],
    "odpo": [
        Row(
            lambda c, _: votes(c, lambda v: nls(40 * v.margin - 0.7 * math.log(max(v.gap(v.s), 1e-6)))),
            {"beta": 40.0, "alpha": 0.7},
            needs=RS,
        )
    ],
    "mmpo": [
        Row(
            lambda c, _: sigmoid(2 * c.gap(c.s)) * nls(40 * c.margin) + (1 - sigmoid(2 * c.gap(c.s))) * nls(-40 * c.margin),
            {"beta": 40.0, "gain": 2.0},
            needs=RS,
            label="unread",
            why=UNREAD,
        )
    ],
    "smpo": [
        Row(
            lambda c, _: nls(5 * (2 * softmax(tuple((s - 0.1) / 0.8 for s in c.s))[0] - 1) * 40 * c.margin),
            {"beta": 40.0, "gain": 5.0, "lowest": 0.1, "highest": 0.9},
            needs=RS,
            label="unread",
            why=UNREAD,
        )
    ],
    "exo": [Row(lambda c, _: votes(c, lambda v: exo(40 * v.margin, 0.05)), {"beta": 40.0, "label_smoothing": 0.05})],
    "dmpo": [Row(lambda c, _: votes(c, lambda v: exo(40 * v.margin, 0.02)), {"beta": 40.0, "alpha": 0.02})],
    "mapo": [
        Row(
            lambda c, _: votes(c, lambda v: v.e[0] + 0.2 * nls(30 * (phi(v.e[0], 0.5) - phi(v.e[1], 0.5)))),
            {"weight": 0.2, "scale": 0.5, "steps": 30.0},
            needs=FREE,
        )
    ],
    "simpo": [Row(lambda c, _: votes(c, lambda v: nls(9 * v.gap(v.l) - 0.5)), {"beta": 9.0, "gamma": 0.5}, needs=FREE)],
    "repo": [Row(lambda c, _: votes(c, lambda v: slack(0.3 - v.gap(v.l))), {"gamma": 0.3}, needs=FREE)],
    "chi_po": [
        Row(
            lambda c, _: votes(
                c,
                lambda v: nls(
                    max(min(v.gap(tuple(40 * h + 0.5 * math.exp(40 * h / 0.5) for h in v.h)), 6.0), -6.0),
                ),
            ),
            {"beta": 40.0, "kl": 0.5, "bound": 3.0},
        )
    ],
    "h_dpo": [
        Row(
            lambda c, _: votes(c, lambda v: nls(40 * (0.9 * v.gap(v.l) - v.gap(tuple(-r / 2 for r in v.r))))),
            {"beta": 40.0, "alpha": 0.9},
            shift="common",
            why="with α ≠ 1 the errors of two different pictures do not cancel",
        )
    ],
    "tdpo": [
        Row(
            lambda c, still: both(
                c, still, lambda v, f: nls(40 * (v.margin - 0.3 * (v.rejected(v.q) / 2 - f.chosen(f.q) / 2)))
            ),
            {"beta": 40.0, "alpha": 0.3},
            needs=RD,
            stops=True,
            why="the chosen picture's drift stands still",
        )
    ],
    "bpo": [
        Row(lambda c, _: votes(c, lambda v: nls(40 * v.margin)), {"beta": 40.0, "generator": "logistic"}),
        *(
            Row(
                lambda c, _, a=a: votes(
                    c,
                    lambda v: (power_of(math.exp(-40 * v.margin), a + 1) + power_of(math.exp(-40 * v.margin), -a)) / 4,
                ),
                {"beta": 40.0, "power": a},
            )
            for a in (-0.5, 0.3)
        ),
    ],
    "sppo": [
        Row(
            lambda c, _: (c.chosen(c.h) - (c.p - 0.5) / 40) ** 2 + (c.rejected(c.h) + (c.p - 0.5) / 40) ** 2,
            {"beta": 40.0},
            label="gradient",
            why="the label is the target, and a squared distance to a mean is the mean squared distance less a variance",
        )
    ],
    "nca": [
        Row(
            lambda c, _: votes(
                c,
                lambda v: nls(40 * v.chosen(v.h)) + 0.5 * nls(-40 * v.chosen(v.h)) + 0.5 * nls(-40 * v.rejected(v.h)),
            ),
            {"beta": 40.0},
        )
    ],
    "apo_zero": [
        Row(lambda c, _: votes(c, lambda v: 1 - sigmoid(40 * v.chosen(v.h)) + sigmoid(40 * v.rejected(v.h))), {"beta": 40.0})
    ],
    "apo_down": [
        Row(
            lambda c, _: votes(c, lambda v: sigmoid(40 * v.chosen(v.h)) + 1 - sigmoid(40 * v.margin)),
            {"beta": 40.0},
            signs=(0, -1),
            why="it lowers the chosen picture's likelihood too: at the reference its two pulls on it cancel",
        )
    ],
    "linear_dpo": [
        Row(
            lambda c, still, beta=beta: both(c, still, lambda v, f: linear_dpo(v, f, beta, 0.1)),
            {"beta": beta, "eta": 0.1},
            shift="gradient",
            stops=True,
            why="errors, not log-ratios, under a weight that stands still",
        )
        for beta in (9.0, 90.0)
    ],
    "dspo": [
        Row(
            lambda c, still: both(c, still, lambda v, f: dspo(v, f, 40.0, 0.3)),
            {"beta": 40.0, "weight": 0.3},
            needs=RD,
            signs=(1, 0),
            shift="gradient",
            stops=True,
            why="a distance to the chosen picture's target, under a weight that stands still",
        )
    ],
    "capo": [Row(lambda c, _: (c.gap(c.s) - 40 * 2 * c.margin) ** 2, {"beta": 40.0}, needs=RS, label="unread", why=UNREAD)],
    "reward_distillation": [
        Row(lambda c, _: (c.gap(c.s) - 40 * c.margin) ** 2, {"beta": 40.0}, needs=RS, label="unread", why=UNREAD)
    ],
    "modpo": [
        Row(lambda c, _: votes(c, lambda v: nls((40 * v.margin - v.gap(v.s)) / 0.4)), {"beta": 40.0, "weight": 0.4}, needs=RS)
    ],
    "epsilon_dpo": [
        Row(
            lambda c, _: votes(c, lambda v: nls(v.carried["beta"] / (1 + 0.7 * step(v, 0.7)) * v.margin)),
            {"beta": 40.0, "epsilon": 0.7},
            needs=RD,
            carried={"beta": 35.0},
        )
    ],
    "beta_dpo": [
        Row(
            lambda c, still: beta_dpo(c, still, 40.0, 0.6),
            {"beta": 40.0, "keep": 0.6},
            carried={"beta": 35.0, "mean": 0.1, "deviation": 0.5},
        )
    ],
    "alpha_dpo": [
        Row(
            lambda c, still: (
                c.p * alpha_dpo(c, still, 9.0, 0.5, 0.3, 1) + (1 - c.p) * alpha_dpo(c.other, still.other, 9.0, 0.5, 0.3, -1)
            ),
            {"beta": 9.0, "gamma": 0.5, "alpha": 0.3},
            carried={"mean": 0.1, "deviation": 0.5},
            shift="common",
            stops=True,
            why="its logit has no reference, and what it is held against stands still",
        )
    ],
    "mdpo": [
        Row(
            lambda c, _: votes(c, lambda v: nls(40 * v.margin) + 0.3 * v.chosen(v.e) / 2),
            {"beta": 40.0, "nll": 0.3},
            takes="groups",
            shift="gradient",
            why="the chosen pictures' own errors are added",
        )
    ],
    "mipo": [
        Row(
            lambda c, _: votes(
                c, lambda v: (v.margin - 1 / 50) ** 2 - variance(v.h[: v.k]) / v.k - variance(v.h[v.k :]) / (len(v.h) - v.k)
            ),
            {"tau": 25.0},
            takes="groups",
        ),
        Row(lambda c, _: votes(c, lambda v: (v.margin - 1 / 50) ** 2), {"tau": 25.0, "estimator": "plug_in"}, takes="groups"),
    ],
    "all_pairs": [
        Row(
            lambda c, _: votes(
                c,
                lambda v: sum(nls(40 * (w - x)) for w in v.h[: v.k] for x in v.h[v.k :]) / (v.k * (len(v.h) - v.k)),
            ),
            {"beta": 40.0},
            takes="groups",
        )
    ],
    "rankdpo": [
        Row(lambda c, still: rankdpo(c, still, 40.0), {"beta": 40.0}, takes="lists", needs=RG, label="unread", why=UNREAD)
    ],
    "opo": [
        Row(
            lambda c, _: opo(c, 40.0, 0.7),
            {"beta": 40.0, "temperature": 0.7},
            takes="lists",
            needs=RG,
            label="unread",
            why=UNREAD,
        )
    ],
    "plackett_luce": [
        Row(
            lambda c, _: plackett_luce(c, 40.0, 0.5, 0.2),
            {"beta": 40.0, "tau": 0.5, "nll": 0.2},
            takes="lists",
            needs=RG,
            label="unread",
            shift="gradient",
            why=f"{UNREAD}; the best picture's own error is added",
        )
    ],
    "lair": [
        Row(
            lambda c, _: lair(c, 40.0, 0.5),
            {"beta": 40.0, "tau": 0.5},
            takes="lists",
            needs=RG,
            label="unread",
            why=UNREAD,
        )
    ],
    "kto": [
        Row(
            lambda c, _: kto(c, 40.0, 1.2, 0.7),
            {"beta": 40.0, "desirable": 1.2, "undesirable": 0.7},
            takes=takes,
            carried={"z0": 0.02},
        )
        for takes in ("unpaired", "pairs")
    ],
    "weighted_sft": [
        Row(
            lambda c, _: weighted_sft(c),
            {},
            takes="groups",
            needs=frozenset({"scores"}),
            label="unread",
            signs=(1, 0),
            opposite=(0, 0),
            why=f"{UNREAD}; only the chosen pictures are learned",
        )
    ],
    "sft": [
        Row(
            lambda c, _: sum(c.e) / len(c.e),
            {},
            takes="groups",
            needs=frozenset(),
            label="unread",
            signs=(1, 1),
            opposite=(1, 1),
            why=f"{UNREAD}; all pictures are learned",
        )
    ],
    "dro": [
        Row(
            lambda c, _: slack(c.gap(c.e) - c.gap(c.r) + 0.3),
            {"slack": 0.3},
            label="unread",
            opposite=(1, -1),
            why="the rejected picture is a sample of the policy whatever the label says",
        )
    ],
    "nft": [
        Row(lambda c, _: nft(c, 0.4), {"step": 0.4}, takes="unpaired", needs=RD, shift="gradient", why=MIRRORED),
        Row(lambda c, _: nft(c, 1.0), {"step": 1.0}, takes="pairs", needs=RD, shift="gradient", why=MIRRORED),
    ],
}

SHAPES = {"pairs": (2, 1), "groups": (4, 2), "lists": (4, 1), "unpaired": (1, 1)}
"""Pictures of a comparison, and how many of them are chosen."""


def example(takes: str, count: int = 6, seed: int = 0) -> Terms:
    """Comparisons with all there is in them, best first; labels 1, 0.5, 0.8, 0 in turn."""
    pictures, chosen = SHAPES[takes]
    generator = torch.Generator().manual_seed(seed)
    policy, reference, drift = (
        torch.rand(count, pictures, generator=generator) * scale + least
        for scale, least in ((0.1, 0.4), (0.1, 0.4), (0.05, 0.02))
    )
    falling = torch.rand(count, pictures, generator=generator).sort(dim=1, descending=True).values
    grades = torch.arange(pictures, 0, -1.0).expand(count, -1) / 2 + 0.3 * falling
    labels = torch.tensor([1.0, 0.5, 0.8, 0.0])[torch.arange(count) % 4]
    return Terms(policy, reference, drift, labels, chosen, scores=falling, grades=grades)


def comparisons(terms: Terms, carried: dict[str, float] | None = None) -> list[Comparison]:
    """Every comparison in plain numbers."""

    def row(values: torch.Tensor | None, at: int) -> Floats:
        return () if values is None else tuple(values.double()[at].tolist())

    return [
        Comparison(
            row(terms.policy_error, at),
            row(terms.reference_error, at),
            row(terms.drift, at),
            float(terms.preference[at]),
            terms.num_chosen,
            row(terms.scores, at),
            row(terms.grades, at),
            dict(carried or {}),
        )
        for at in range(len(terms.preference))
    ]
