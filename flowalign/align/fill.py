"""The banks of a run: what each is named after, and in which shapes and precision it is filled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.align.bank import Batches, ReferenceBank, Stored, fill_bank
from flowalign.align.merged import Merged
from flowalign.align.step import PreferenceStep
from flowalign.data.batch import Batch
from flowalign.data.cache import BANK, describe
from flowalign.data.fill import Ranks
from flowalign.data.pairs import PairDataset, PairStream, fixed_draws
from flowalign.errors import ConfigError
from flowalign.families.sampling import PRECISIONS
from flowalign.rng import Keyed
from flowalign.settings import Config


def stored_for(needs: frozenset[str], config: Config) -> Stored:
    """What a bank keeps for an objective with these needs: errors always, predictions where it needs the drift, and noise."""
    precision = PRECISIONS[config.train.precision] if "drift" in needs else None
    return Stored(precision, noise=config.switches.noise == "inverted")


def kind_of(device: torch.device) -> str:
    """What computes: kernels, and last bits with them, differ between kinds of GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def fill_banks(
    config: Config,
    device: torch.device,
    ranks: Ranks,
    step: PreferenceStep,
    stream: PairStream,
    held_out: PairDataset | None,
    folder: Path,
    *,
    progress: bool = True,
) -> tuple[ReferenceBank, ReferenceBank | None]:
    """What the reference says at every draw of the train and of the held-out comparisons, from `folder` or computed.

    All processes must call it, on a folder that all of them see: they share the work.
    Mirroring and caption dropout are keyed by comparison and draw, so that draws fix them too. Raises ConfigError for an
    objective without a reference.
    """
    if not step.objective.needs & {"reference", "drift"}:
        raise ConfigError(
            f"reference.bank stores what the reference says, but objective.name {config.objective.name!r} needs no reference; "
            "set reference.bank=null."
        )
    cfg = config.train
    stored = stored_for(step.objective.needs, config)
    references = step.reference.about if isinstance(step.reference, Merged) else None
    shared = {
        "fingerprints": [step.family.fingerprint(part) for part in ("denoiser", "images", "prompts")],
        "compute": [
            cfg.precision,
            cfg.compile,
            config.trainable.gradient_checkpointing,
            cfg.tf32,
            sorted(set(ranks.gather(kind_of(device)))),
            torch.__version__,
            cfg.batch_size,
            step.chunk,
        ],
    } | ({} if references is None else {"references": references})

    def fill(
        data: PairDataset,
        fixed: PreferenceStep,
        seed: int,
        draws: int,
        batches: Batches,
        settings: dict[str, Any],
    ) -> ReferenceBank:
        cached, rng = data.cached, Keyed(seed)
        contents = [
            cached.pictures.tobytes(),
            cached.ids.tobytes(),
            cached.prompt.tobytes(),
            "\0".join(cached.prompts).encode(),
        ]
        key = (
            shared
            | {"seed": seed, "draws": draws, "timesteps": [fixed.timesteps, *fixed.between], "resolution": data.resolution}
            | {"noise": [fixed.switches.noise, fixed.switches.inversion_steps if stored.noise else None]}
            | settings
        )

        def answer(batch: Batch) -> dict[str, Tensor]:
            batch = fixed.with_noise(batch, rng)
            errors, predictions = fixed.for_bank(batch, rng)
            return {"errors": errors, "predictions": predictions} | ({} if batch.noise is None else {"noise": batch.noise})

        name = hashlib.blake2b(json.dumps(key, sort_keys=True).encode() + b"\0".join(contents), digest_size=10).hexdigest()
        store = folder / BANK.format(name)
        about = {"checkpoint": config.model.checkpoint, "denoiser": shared["fingerprints"][0], "precision": cfg.precision}
        if ranks.index == 0:
            with suppress(OSError):  # for people only: a full disk is told below, and a bank that may only be read is read
                describe(store, {"kind": "bank", "fingerprint": name} | about | {"pairs": len(data), "draws": draws})
        return fill_bank(
            store,
            batches,
            answer,
            count=len(data),
            draws=draws,
            batch_size=cfg.batch_size,
            stored=stored,
            ranks=ranks,
            progress=progress and ranks.index == 0,
        )

    train = stream.dataset
    dropout = {"caption_dropout": cfg.caption_dropout, "flips": train.cached.flips}
    bank = fill(train, step, cfg.seed, config.reference.bank or 1, stream.covering, dropout)
    if held_out is None:
        return bank, None
    count = cfg.validation_draws

    def held(draw: int, places: range) -> Iterator[Batch]:
        return fixed_draws(held_out, cfg.batch_size, count, draw, places)

    return bank, fill(held_out, step.on_held_out(), cfg.seed + 1, count, held, {})
