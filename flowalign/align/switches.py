"""What any objective can be combined with: pure functions of errors, dots and noise levels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowalign.align.carried import Carried
from flowalign.align.reference import MOVING
from flowalign.align.terms import Objective, Terms
from flowalign.data.cached import Cached
from flowalign.errors import ConfigError
from flowalign.families.base import Family, Level
from flowalign.settings import Config, Switches

TINY = 1e-12


def safeguarded(error: Tensor, residual_dot: Tensor, mu: float) -> Tensor:
    """Errors `[B, 2]` of the same values, through which the rejected picture's gradient is scaled by λ, per pair.

    λ = clip((1−μ) ‖g_w‖² / (g_w·g_l), 0, 1) where g_w·g_l > 0, else 1, with g the gradients of the errors in the predictions,
    so that a step along −g_w + λ g_l does not raise e_w to first order. Up to a factor that cancels, g is the residual: ‖g_w‖²
    is e_w itself, and g_w·g_l is `residual_dot` `[B]`.

    Source: SDPO, 2025, arXiv 2511.03317, whose code takes one λ for a micro-batch; here every pair has its own, so that a
    pair's gradient does not depend on its neighbours.
    """
    chosen, rejected = error.unbind(1)
    with torch.no_grad():
        limit = ((1 - mu) * chosen / residual_dot.clamp_min(TINY)).clamp(0, 1)
        scale = torch.where(residual_dot > 0, limit, 1.0)
    held = rejected.detach()
    return torch.stack([chosen, held + scale * (rejected - held)], dim=1)


def time_weight(level: Level, switches: Switches) -> Tensor:
    """`[B]` factors on the losses of comparisons at these noise levels, float32.

    min_snr: min(SNR, γ) on the error of x0, that is min(SNR, γ) times `level.to_x0` on the error of the prediction (Hang et al.
    2023, 2303.09556, §3.4). sigmoid: σ(b − log SNR) (Kingma & Gao 2023, 2303.00848; Hoogeboom et al. 2024, 2410.19324).
    """
    if switches.time_weight == "min_snr":
        return level.log_snr.exp().clamp_max(switches.min_snr_gamma) * level.to_x0
    if switches.time_weight == "sigmoid":
        return torch.sigmoid(switches.sigmoid_bias - level.log_snr)
    return torch.ones_like(level.log_snr)


def check(config: Config, family: Family, objective: Objective, knobs: dict[str, Any], *comparisons: Cached) -> None:
    """Raise ConfigError for what does not go together with a family, with an objective, and with these comparisons."""
    name, kind, needs = config.objective.name, config.reference.kind, objective.needs
    pictures, num_chosen = comparisons[0].pictures.shape[1], comparisons[0].num_chosen
    if config.switches.safeguard is not None and pictures != 2:
        raise ConfigError(
            f"switches.safeguard weighs one rejected picture against one chosen, but these comparisons have {pictures} "
            "pictures; set switches.safeguard=null."
        )
    if config.switches.mask == "given" and "mask" not in comparisons[0].attached:
        raise ConfigError(
            "switches.mask is 'given', but no comparison of data.train has a mask; fill in the column mask, or set "
            "switches.mask=none."
        )
    if config.switches.noise == "stored" and config.data.flip:
        raise ConfigError(
            "switches.noise 'stored' trains pictures on the noise they were drawn from, and a mirrored picture was drawn from "
            "none; set data.flip=false."
        )
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    if config.switches.noise == "inverted" and not family.implied(one, one, one, zero).isfinite().all():
        raise ConfigError(
            f"switches.noise 'inverted' starts at the picture itself, and {config.model.checkpoint} predicts just that, which "
            "says nothing about noise there; set switches.noise=shared, or take a checkpoint that predicts ε, v or a velocity."
        )
    for need in sorted(needs & {"scores", "grades"}):
        bare = sum(int(np.isnan(getattr(each, need)).any(1).sum()) for each in comparisons)
        if bare:
            several = ", or several rewards: name those that count in data.rewards" if need == "scores" else ""
            raise ConfigError(
                f"objective.name {name!r} reads {need}, and {bare} comparisons have none{several}; give every row {need}, or "
                "choose another objective."
            )
    if kind in MOVING and not needs & {"reference", "drift"}:
        raise ConfigError(
            f"reference.kind {kind!r} moves a reference, but objective.name {name!r} needs none; set reference.kind=auto."
        )
    _check_merged(config, needs)
    if config.switches.annotator_types > 1:
        _check_types(config, objective, knobs, comparisons[0])
    _check_beta(config.switches.beta, config.objective.name, objective, knobs, alone=pictures == 1)
    if pictures == 1 and objective.takes != "unpaired":
        raise ConfigError(
            f"objective.name {name!r} compares pictures, and in these data each was judged alone; take an objective for "
            "unpaired pictures (flowalign objectives lists them), or data of pairs."
        )
    if config.switches.label_noise and (config.switches.safeguard is not None or config.switches.winner_nll):
        raise ConfigError(
            f"switches.label_noise {config.switches.label_noise:g} turns votes around, and switches.safeguard and "
            "switches.winner_nll hold the first picture for the chosen one whatever the vote; set them to null and 0, or "
            "switches.label_noise=0."
        )
    ones = torch.ones(1, pictures)
    given = {each: ones[:, 0] if each == "residual_dot" else ones for each in needs - {"reference", "drift"}}
    try:
        carried = Carried.of(objective, knobs, torch.device("cpu"))
        scalars = () if carried is None else (carried.scalars,)
        objective(Terms(ones, ones, ones, ones[:, 0], num_chosen, **given), *scalars, **knobs)
    except ValueError as error:
        raise ConfigError(f"objective.name {name!r} cannot be used with these data: {error}.") from error
    if config.switches.label_noise and not reads_votes(objective, knobs, pictures, num_chosen):
        raise ConfigError(
            f"switches.label_noise {config.switches.label_noise:g} turns votes around, but objective.name {name!r} reads none; "
            "set switches.label_noise=0, or choose another objective."
        )


def reads_votes(objective: Objective, knobs: dict[str, Any], pictures: int, num_chosen: int) -> bool:
    """Whether the loss of a comparison of so many pictures depends on its label."""
    falling = torch.linspace(1, 0, pictures, dtype=torch.float64)[None]
    error = 1 - 1e-4 * falling  # so near the reference's that no loss is saturated
    given = {"scores": falling, "grades": falling, "residual_dot": error[:, 0]}
    carried = Carried.of(objective, knobs, torch.device("cpu"))
    scalars = () if carried is None else (carried.scalars,)
    losses = [
        objective(Terms(error, torch.ones_like(error), 1 - error, label, num_chosen, **given), *scalars, **knobs)
        for label in falling.new_tensor([[0.0], [1.0]])
    ]
    return not torch.equal(*losses)


def _check_merged(config: Config, needs: frozenset[str]) -> None:
    settings, name = config.reference, config.objective.name
    if settings.kind != "merged":
        if settings.checkpoints:
            raise ConfigError(
                f"reference.checkpoints names {len(settings.checkpoints)} models, and reference.kind {settings.kind!r} reads "
                "none of them; set reference.kind=merged."
            )
        return
    if not needs & {"reference", "drift"}:
        raise ConfigError(
            f"reference.kind 'merged' holds several references, but objective.name {name!r} needs none; set "
            "reference.kind=auto."
        )
    if settings.merge == "harmonic" and "drift" in needs:
        raise ConfigError(
            f"reference.merge 'harmonic' merges errors, and objective.name {name!r} reads the predictions of one reference; "
            "set reference.merge=predictions."
        )


def _check_types(config: Config, objective: Objective, knobs: dict[str, Any], train: Cached) -> None:
    name, types = config.objective.name, f"switches.annotator_types {config.switches.annotator_types}"
    reference, trainable = config.reference.kind, config.trainable.kind
    refused = (
        (objective.carry is not None, f"objective.name {name!r} carries averages over all policies at once"),
        (trainable != "lora", f"trainable.kind {trainable!r} has no adapters to be a policy of each type"),
        (reference in MOVING, f"reference.kind {reference!r} follows one policy"),
        (config.train.timesteps == "importance", "train.timesteps 'importance' learns from the gradients of one policy"),
        (config.train.compile, "train.compile compiles one policy"),
        (config.train.backward == "chunked", "train.backward 'chunked' divides the pictures of one policy"),
        (config.switches.beta != "fixed", f"switches.beta {config.switches.beta!r} moves β by the margins of all at once"),
    )
    for wrong, why in refused:
        if wrong:
            raise ConfigError(
                f"{types} trains a policy for each type, but {why}; change it, or set switches.annotator_types=1."
            )
    if "reference" not in objective.needs or "beta" not in knobs or train.pictures.shape[1] == 1:
        raise ConfigError(
            f"{types} reads from βΔ what an annotator is like, but with objective.name {name!r} and these data there is no β, "
            "no reference or no pair; take an objective such as dpo, and comparisons."
        )
    bare = int((np.array(train.annotators)[train.annotator] == "").sum())
    if bare:
        raise ConfigError(
            f"{types} must know who judged, and {bare} of the {len(train)} comparisons do not say; give every row an "
            "annotator, or name its column, such as data.columns={annotator: user_id}."
        )


def _check_beta(how: str, name: str, objective: Objective, knobs: dict[str, Any], *, alone: bool) -> None:
    """Raise ConfigError where β cannot be moved `how`. alone: each picture was judged by itself."""
    if how == "fixed":
        return
    own = Carried.of(objective, knobs, torch.device("cpu"))
    reasons = {
        "has no beta": "beta" not in knobs,
        "needs no reference, so that there is no margin to move it by": "reference" not in objective.needs,
        "moves it already": own is not None and "beta" in own.scalars,
        "has pictures here that were each judged alone": alone,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(
                f"switches.beta {how!r} moves objective.beta, but objective.name {name!r} {reason}; set switches.beta=fixed."
            )
