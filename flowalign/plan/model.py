"""The outline of a run: family, policy, reference and step on the meta device, made by the code that makes the real ones."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flowalign.align.adaptive import adaptive
from flowalign.align.bank import ReferenceBank
from flowalign.align.carried import Carried
from flowalign.align.merged import open_merged
from flowalign.align.mixture import by_type, of_types
from flowalign.align.personal import expected_names, personal_policy
from flowalign.align.reference import MOVING, following, standing, with_reference
from flowalign.align.steer import Steered, contrast_of, steered_policy
from flowalign.align.step import PreferenceStep
from flowalign.chosen import choose_chunk, choose_timesteps, choose_trainable
from flowalign.data.batch import Batch
from flowalign.families.base import CONTEXT, Family
from flowalign.families.outline import META
from flowalign.settings import Config
from flowalign.setup import load_family, load_objective
from flowalign.train.start import read_start


@dataclass(frozen=True)
class Outline:
    """What a configuration trains, all shapes and no values."""

    family: Family
    policy: nn.Module
    step: PreferenceStep
    """With a reference, where there is a bank too: only the trainer is without."""
    banked: PreferenceStep
    """The same with a bank of its errors."""
    live: bool
    """A reference is held while the run trains, if only as the policy without its adapters."""
    resolution: int
    latents: tuple[int, ...]
    """`(C, h, w)` of a picture"""
    pictures: int
    """of a comparison, N"""
    objectives: int = 0
    """that the policy is told the weights of, or users"""

    def batch(self, count: int) -> Batch:
        """`count` comparisons of prompts as long as they can be, once for each policy."""
        zeros, switches = torch.zeros(count, self.pictures, *self.latents, device=META), self.step.switches
        batch = Batch(
            mean=zeros,
            std=zeros,
            geometry=torch.zeros(count, self.pictures, 6, device=META),
            conditioning=self.family.outline_prompts(count),
            preference=torch.ones(count, device=META),
            weight=torch.ones(count, device=META),
            ids=tuple(range(count)),
            draws=(0,) * count,
            positions=(0,) * count,
            scores=torch.zeros(count, self.pictures, device=META),
            grades=torch.zeros(count, self.pictures, device=META),
            mask=zeros[:, :, 0] if switches.mask == "given" else None,
            noise=zeros if switches.noise == "stored" else None,
            objective_weights=torch.zeros(count, self.objectives, device=META) if self.objectives else None,
        )
        return batch if self.step.types == 1 else batch.tiled(self.step.types)

    def pixels(self) -> Tensor:
        """The pictures of one comparison, `[N, 3, H, W]`."""
        return torch.zeros(self.pictures, 3, self.resolution, self.resolution, device=META)


def outline(config: Config, pictures: int = 2, num_chosen: int = 1) -> Outline:
    """Build what `setup.prepare` would, without weights or data. Raises CheckpointError and ConfigError."""
    objective, knobs = load_objective(config)
    family = load_family(config, META)
    lora, drawn = config.trainable.kind != "full", config.reference.bank
    frozen = family.denoiser
    policy, reference = with_reference(frozen, config.reference.kind, lora=lora, banked=drawn is not None)
    learns = policy
    if policy is frozen:  # all weights learn against a bank: count the reference that filled it on a module of its own
        learns, _ = with_reference(frozen, "copy", lora=False)
    learns = of_types(learns, config.switches.annotator_types)
    choose_trainable(config, family, learns)
    if config.trainable.start is not None:
        read_start(config.trainable, config.model, family, config.steer, config.users, weights=False).into(learns)
    width, users = family.outline_prompts(1).tensors[CONTEXT].shape[-1], config.users
    learns = steered_policy(learns, config.steer, width, config.train.seed)
    names = expected_names(users)
    learns = personal_policy(learns, users, names, family, width, config.train.seed)
    anchor = following(learns, frozen, config.reference, lora=lora)[0] if config.reference.kind in MOVING else frozen
    if config.reference.kind == "start":
        anchor = standing(learns, frozen, lora=lora)
    if config.reference.kind == "merged":
        anchor = open_merged(config.reference, config.model, family, outline=True)
    learns.train()
    resolution = config.data.resolution or family.resolution
    step = PreferenceStep(
        family=family,
        policy=learns,
        reference=anchor,
        objective=objective,
        knobs=knobs,
        timesteps=choose_timesteps(config, family),
        device=META,
        autocast=nullcontext,
        num_chosen=num_chosen,
        switches=config.switches,
        types=len(by_type(learns)),
        steered=isinstance(learns, Steered),
        contrast=contrast_of(config.steer),
        carried=Carried.of(objective, knobs, META),
        adaptive=adaptive(config.switches, knobs, META, steps=config.train.steps),
        chunk=choose_chunk(config),
    )
    latents = family.encode_images(torch.zeros(1, 3, resolution, resolution, device=META)).mean.shape[1:]
    draw = (torch.zeros(1, pictures, *latents, device=META),)
    bank = ReferenceBank(torch.zeros(1, pictures), (draw,), (draw,))
    return Outline(
        family=family,
        policy=learns,
        step=step,
        banked=replace(step, reference=None, bank=bank),
        live=reference is not None,
        resolution=resolution,
        latents=tuple(latents),
        pictures=pictures,
        objectives=len(config.steer.objectives if config.steer else names),
    )
