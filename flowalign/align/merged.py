"""Several frozen references that count as one (MRPO, Le et al. 2024, arXiv 2405.16388), see docs/methods/mrpo.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from flowalign import plugins
from flowalign.align.reference import second
from flowalign.errors import CheckpointError, ConfigError
from flowalign.families.base import Family
from flowalign.families.latent import compute_dtype
from flowalign.families.loading import add_lora, detect_family, digest, find_lora
from flowalign.families.mixing import weighted
from flowalign.sections import Model
from flowalign.settings import Reference

SHAPES = ("in_channels", "out_channels", "cross_attention_dim", "joint_attention_dim", "pooled_projection_dim", "cap_feat_dim")
"""Settings of a denoiser that say which latents and which conditioning it takes."""


class Merged(nn.Module):
    """M frozen denoisers with shares α of 1, and how what they say becomes one reference."""

    weights: Tensor

    def __init__(self, denoisers: Sequence[nn.Module], settings: Reference, fingerprints: Sequence[str] = ()) -> None:
        """fingerprints: of each denoiser's weights, for the names of banks and saved states."""
        super().__init__()
        self.denoisers = nn.ModuleList(denoisers)
        self.settings, self.fingerprints = settings, tuple(fingerprints)
        device = next(self.denoisers[0].parameters()).device
        self.register_buffer("weights", torch.tensor(shares(settings), device=device), persistent=False)

    @property
    def about(self) -> dict[str, object]:
        """All that its errors and predictions depend on."""
        named = self.settings.model_dump(mode="json", include={"weights", "merge", "sharpness", "clip"})
        return {"denoisers": self.fingerprints, **named}

    def compiled(self, compile: Callable[[nn.Module], nn.Module]) -> Merged:
        """The same with each denoiser compiled."""
        return Merged([compile(each) for each in self.denoisers], self.settings, self.fingerprints)

    def forward(self, predict: Callable[[nn.Module], Tensor], error: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """(errors `[R]`, predictions `[R, C, h, w]`) of the one reference for R pictures.

        predict: a denoiser -> its predictions; error: predictions -> their errors. The predictions are the weighted mean of
        theirs; the errors are its own, or those of the harmonic mean, which is no denoiser.
        """
        predictions = [predict(denoiser) for denoiser in self.denoisers]
        mean = weighted(self.weights, predictions)
        if self.settings.merge == "predictions":
            return error(mean), mean
        found = torch.stack([error(each) for each in predictions])
        if self.settings.clip is not None:
            found = clipped(found, self.settings.clip)
        return harmonic(found, self.weights, self.settings.sharpness), mean


def clipped(errors: Tensor, clip: float) -> Tensor:
    """Errors `[M, R]` within [1 − η, 1 + η] times those of the first reference.

    The authors clip log-likelihoods so, relative to the model that the policy starts from; −½κe is one, whatever κ.
    """
    return errors.clamp((1 - clip) * errors[:1], (1 + clip) * errors[:1])


def harmonic(errors: Tensor, weights: Tensor, sharpness: float) -> Tensor:
    """`[R]` (2/κ) log Σ_k α_k exp(½κ e_k): the error of 1/Σ_k(α_k/r_k) for log r_k = −½κ e_k, with errors `[M, R]`, α `[M]`."""
    return torch.logsumexp(weights.log()[:, None] + 0.5 * sharpness * errors, 0) * (2 / sharpness)


def shares(settings: Reference) -> list[float]:
    """α of each checkpoint. Raises ConfigError unless there are two or more, and shares that sum to 1 where they are given."""
    count = len(settings.checkpoints)
    if count < 2:
        raise ConfigError(
            f"reference.kind 'merged' takes two models or more, and reference.checkpoints names {count}; name them, or set "
            "reference.kind=auto."
        )
    if not settings.weights:
        return [1 / count] * count
    if len(settings.weights) != count or abs(sum(settings.weights) - 1) > 1e-6:
        raise ConfigError(
            f"reference.weights {list(settings.weights)} are {len(settings.weights)} and sum to {sum(settings.weights):g}; "
            f"allowed: one above 0 for each of the {count} checkpoints, summing to 1, or none for equal shares."
        )
    return list(settings.weights)


def open_merged(settings: Reference, model: Model, family: Family, *, outline: bool = False) -> Merged:
    """Open all references of a run, see `open_beside`. Raises ConfigError for settings that do not go together."""
    shares(settings)
    denoisers = open_beside(settings.checkpoints, model, family, outline=outline)
    fingerprints = [] if outline else [digest(each) for each in denoisers]
    return Merged(denoisers, settings, fingerprints)


def open_beside(
    checkpoints: Sequence[str], model: Model, family: Family, *, outline: bool = False, said: str = "reference.checkpoints"
) -> list[nn.Module]:
    """Denoisers, frozen, beside `family`, which was loaded as `model` says and is not trained yet.

    The model itself and LoRA runs on top of it share its tensors; every other checkpoint is held whole. outline: only shapes,
    on the meta device, as `family` is then. said: what names the checkpoints, for sentences about them. Raises CheckpointError
    for a checkpoint that cannot be opened, or whose predictions mean something else than the model's.
    """
    own = (str(Path(model.checkpoint).expanduser()), model.revision, model.variant)
    denoisers = []
    for checkpoint in checkpoints:
        run = find_lora(checkpoint)
        based = own if checkpoint == model.checkpoint else (str(Path(checkpoint).expanduser()), None, None)
        if run is not None:
            based = (str(Path(run.base).expanduser()), run.revision, run.variant)
        shared = based == own
        denoiser = family.denoiser if shared else _open(checkpoint, based, family, outline, said)
        if run is not None:
            denoiser = second(denoiser)
            add_lora(denoiser, run, family.component)
        denoisers.append(denoiser)
    return [each.requires_grad_(False).eval() for each in denoisers]


def _open(checkpoint: str, based: tuple[str, str | None, str | None], family: Family, outline: bool, said: str) -> nn.Module:
    """The denoiser of another whole checkpoint, if it can stand beside the family's own."""
    base, revision, variant = based
    name = detect_family(base, revision=revision, variant=variant, weights=not outline)
    if name != family.name:
        raise CheckpointError(
            f"{said} names {checkpoint}, which is of the family {name!r}, and the model is of {family.name!r}; "
            "predictions of different families cannot be merged: name checkpoints of one family."
        )
    kind = plugins.load("families", name)
    make = kind.outline if outline else kind.load
    other: Family = make(base, dtype=compute_dtype(family.denoiser), revision=revision, variant=variant)
    ours, theirs = family.denoiser.config, other.denoiser.config
    for setting in SHAPES:
        if ours.get(setting) != theirs.get(setting):
            raise CheckpointError(
                f"{said} names {checkpoint}, whose denoiser has {setting} {theirs.get(setting)}, and the "
                f"model's has {ours.get(setting)}; name checkpoints that take the same latents and prompts."
            )
    if not _same_noise(family, other):
        raise CheckpointError(
            f"{said} names {checkpoint}, which predicts another target or was trained with another noise "
            "schedule than the model, so their predictions cannot be merged; name checkpoints of one kind."
        )
    return other.denoiser.to(next(family.denoiser.parameters()).device)


def _same_noise(one: Family, other: Family) -> bool:
    """Whether both make the same noisy picture and the same target of one picture and one noise, at several times."""
    times = torch.linspace(0.05, 0.95, 7)
    picture, noise = torch.full((7, 1, 1, 1), 2.0), torch.full((7, 1, 1, 1), -3.0)
    both = zip(one.noisy(picture, noise, times), other.noisy(picture, noise, times), strict=True)
    return all(torch.allclose(first, second, atol=1e-4) for first, second in both)
