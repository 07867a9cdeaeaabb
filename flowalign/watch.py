"""What a run shows: metrics on held-out comparisons and sample pictures along the way, weights at the end."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowalign.align.bank import ReferenceBank
from flowalign.align.mixture import MixtureStep, by_type
from flowalign.align.step import PreferenceStep
from flowalign.config import dump
from flowalign.data.pairs import PairDataset, fixed_draws
from flowalign.families.sampling import SamplerSettings, write_images
from flowalign.files import write_text
from flowalign.rng import Keyed
from flowalign.settings import Config
from flowalign.setup import Prepared
from flowalign.train.rundir import RunDir
from flowalign.train.trainable import export


@torch.no_grad()
def validation(
    step: PreferenceStep | MixtureStep,
    held_out: PairDataset,
    config: Config,
    accelerator: Any,
    bank: ReferenceBank | None = None,
) -> dict[str, float]:
    """Metrics on held-out comparisons at fixed (t, noise) draws: the same numbers at each call for the same weights.

    Ties take no part in the accuracy: whichever picture wins, there is nothing to be right about. What is held out may be
    of another kind than what is trained on: pairs where groups are.
    """
    draws, rng = config.train.validation_draws, Keyed(config.train.seed + 1)
    fixed = step.on_held_out(bank, held_out.cached.num_chosen)
    sums: dict[str, torch.Tensor] = {}
    votes = torch.zeros((), device=accelerator.device)
    count = torch.zeros((), device=accelerator.device)
    for draw in range(draws):
        batches = fixed_draws(held_out, config.train.batch_size, draws, draw)
        while group := list(islice(batches, accelerator.num_processes)):
            # Weights in shards come together in every forward, so all processes do equally many.
            spare = accelerator.process_index >= len(group)
            batch = group[-1 if spare else accelerator.process_index]
            counts = torch.full((len(batch),), float(not spare), device=accelerator.device)
            decided = counts * (batch.preference != 0.5).to(accelerator.device)
            _, metrics = fixed(batch, rng)
            if "rewards/accuracies" in metrics:
                metrics["rewards/accuracies"] = metrics["rewards/accuracies"] * decided
            for name, value in metrics.items():
                sums[name] = sums.get(name, torch.zeros_like(count)) + (value * counts).sum()
            votes += decided.sum()
            count += counts.sum()
    names = sorted(sums)
    totals = accelerator.reduce(torch.stack([votes, count, *(sums[name] for name in names)]), "sum").tolist()
    votes_total, count_total = totals[:2]
    out = {name: total / count_total for name, total in zip(names, totals[2:], strict=True) if name != "rewards/accuracies"}
    if "rewards/accuracies" in sums and votes_total:
        out["rewards/accuracies"] = totals[2 + names.index("rewards/accuracies")] / votes_total
    return out


def sample_prompts(config: Config, ready: Prepared) -> list[str]:
    """What the run draws along the way: the configured prompts, else the first held-out ones."""
    from flowalign.data import prompts

    if config.sample.prompts:
        wanted = config.sample.prompts
        return prompts.read([wanted] if isinstance(wanted, str) else list(wanted), config.sample.count)
    source = ready.held_out or ready.train
    return list(source.cached.prompts[: config.sample.count])


def draw_samples(config: Config, ready: Prepared, run: RunDir, prompts: list[str], step: int, progress: bool) -> None:
    """Pictures of the policy as it is, from seeds that stay the same over the run."""
    side = config.data.resolution
    settings = SamplerSettings(
        steps=config.sample.steps, guidance=config.sample.guidance, precision=config.train.precision, height=side, width=side
    )
    seeds = [config.sample.seed + index for index in range(len(prompts))]
    size = config.sample.batch_size
    with ready.whole() as denoiser:
        for part, policy in [] if denoiser is None else parts(run, denoiser):
            folder, pipeline = part.samples / f"step-{step:08d}", ready.family.pipeline(policy)
            write_images(folder, pipeline, prompts, seeds, settings, batch_size=size, progress=progress)


def parts(run: RunDir, policy: nn.Module) -> list[tuple[RunDir, nn.Module]]:
    """Each policy with the folder of its weights and pictures: the run's own, or one for each type of annotator."""
    policies = by_type(policy)
    if len(policies) == 1:
        return [(run, policy)]
    return [(RunDir(run.types / str(place)), each) for place, each in enumerate(policies)]


def write_weights(config: Config, ready: Prepared, run: RunDir, policy: nn.Module) -> list[Path]:
    """What was learned, for others to load, and who is of which type of annotator; returns the run folders that hold it."""
    family, written = ready.family, []
    for part, each in parts(run, policy):
        write_text(part.config, dump(config))
        export(each, config.trainable.kind, family.pipeline(each), family.component, part.weights)
        written.append(part.path)
    if ready.annotators is not None:
        run.write_json("annotators.json", ready.annotators.table())
        written.append(run.path)
    return written
