"""What a run looks at along the way: metrics on held-out comparisons, and sample pictures."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from flowalign.align.bank import ReferenceBank
from flowalign.align.step import PreferenceStep
from flowalign.data.pairs import PairDataset, fixed_draws
from flowalign.families.sampling import SamplerSettings, write_images
from flowalign.rng import Keyed
from flowalign.settings import Config
from flowalign.setup import Prepared
from flowalign.train.rundir import RunDir


@torch.no_grad()
def validation(
    step: PreferenceStep, held_out: PairDataset, config: Config, accelerator: Any, bank: ReferenceBank | None = None
) -> dict[str, float]:
    """Metrics on held-out comparisons at fixed (t, noise) draws: the same numbers at each call for the same weights.

    Ties take no part in the accuracy: whichever picture wins, there is nothing to be right about. What is held out may be
    of another kind than what is trained on: pairs where groups are.
    """
    draws, rng = config.train.validation_draws, Keyed(config.train.seed + 1)
    fixed = replace(step.on_held_out(bank), num_chosen=held_out.cached.num_chosen)
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
    folder, size = run.samples / f"step-{step:08d}", config.sample.batch_size
    with ready.whole() as denoiser:
        if denoiser is not None:
            write_images(folder, ready.family.pipeline(denoiser), prompts, seeds, settings, batch_size=size, progress=progress)
