"""Pairs of scored pictures under weights: of one pool, labelled anew for each draw of them, which is the offline form of
MO-ODPO (2503.00295), or of pictures that were drawn under weights and are judged by the same, which is the paper's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from flowalign.data.weights import in_order
from flowalign.errors import ConfigError, DataError, allowed
from flowalign.rng import key
from flowalign.scoring.comparisons import Picked
from flowalign.scoring.table import CALIBRATED, ScoreTable

STEERED = "steered"
LABELS = ("votes", "mixture")


def drawn_weights(count: int, alpha: float, prompt: str, draw: int, seed: int = 0) -> NDArray[np.float64]:
    """`[K]` w ~ Dirichlet(α·1), the one of this seed, prompt and draw. Raises ConfigError for an α that is not above 0."""
    if not 0 < alpha < np.inf:
        raise ConfigError(f"alpha is {alpha}; it is above 0: small ones draw corners of the simplex, large ones its middle.")
    return np.random.default_rng(key(seed, "objective weights", prompt, draw)).dirichlet(np.full(count, alpha))


def steered(
    table: ScoreTable,
    objectives: Sequence[str] = (),
    *,
    alpha: float = 1.0,
    draws: int = 4,
    under: Sequence[Mapping[str, float]] | None = None,
    least: float | None = None,
    labels: str = "votes",
    seed: int = 0,
) -> list[Picked]:
    """For each prompt and its weights w, the best picture against the worst by Σ_k w_k R_k, with R calibrated `[n, K]`.

    objectives: rewards of the table; none takes all. draws: weights of a prompt, each for all of its pictures. under: instead
    of drawn ones, those of each row `[n]`; pictures of one prompt and the same weights are held against each other. least:
    smallest gap of w·R; pairs without any are dropped. labels: votes, or mixture: the summed weight of the objectives by which
    the best is the better one, half of it where they are equal, so that dpo on that label is Σ_k w_k L_dpo^(k), each objective
    voting for itself (MI-EPO, Xie et al. 2026, 2607.01392). Pictures that lack one of the scores take no part. Raises
    ConfigError for an α or labels, DataError for objectives that are fewer than two, not in the table, or not calibrated, and
    for weights of others.
    """
    if labels not in LABELS:
        raise ConfigError(f"labels are {labels!r}; of pairs under weights {allowed(labels, LABELS)}.")
    names = tuple(objectives) or table.rewards
    for name in names:
        if name not in table.rewards:
            raise DataError(f"objectives names {name!r}, which the table has not scored; {allowed(name, table.rewards)}.")
        if CALIBRATED + name not in table.data.column_names:
            raise DataError(f"{name} is not calibrated, so it cannot be weighed against others; run flowalign calibrate first.")
    if len(set(names)) < max(len(names), 2):
        raise DataError(f"objectives are {', '.join(names) or 'none'}; weights need two different rewards or more.")
    scores = np.stack([table.numbers(CALIBRATED + name) for name in names], axis=1)
    known = ~np.isnan(scores).any(1)
    own = None if under is None else [in_order(each, names) for each in under]

    def groups() -> Iterator[tuple[NDArray[np.float64], NDArray[np.int64]]]:
        """(weights `[K]`, rows that are judged by them)"""
        for prompt, every in table.groups().items():
            rows = every[known[every]]
            if own is None:
                yield from ((drawn_weights(len(names), alpha, prompt, draw, seed), rows) for draw in range(draws))
                continue
            for weights in dict.fromkeys(own[row] for row in rows):
                yield np.array(weights), rows[[own[row] == weights for row in rows]]

    picked = []
    for weights, rows in groups():
        if len(rows) < 2:
            continue
        weighed = scores[rows] @ weights
        best, worst = int(weighed.argmax()), int(weighed.argmin())
        gap = float(weighed[best] - weighed[worst])
        if gap > 0 and gap >= (least or 0.0):
            told = dict(zip(names, weights.tolist(), strict=True))
            sides = scores[rows[best]] - scores[rows[worst]]
            label = float(weights @ (0.5 + 0.5 * np.sign(sides))) if labels == "mixture" else None
            picked.append(Picked(int(rows[best]), int(rows[worst]), gap, False, told, label))
    return picked
