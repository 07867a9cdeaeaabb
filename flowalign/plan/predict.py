"""The whole plan of a configuration as plain values: what `flowalign plan --json` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from flowalign.plan.dangers import Facts, dangers
from flowalign.plan.data import count as count_data
from flowalign.plan.flops import count as count_flops
from flowalign.plan.memory import encoders, memory, size
from flowalign.plan.model import outline
from flowalign.plan.work import on_gpus, work
from flowalign.settings import AUTO, Config
from flowalign.train.quantized import outlined_bytes
from flowalign.train.trainable import trained


def predict(
    config: Config, efficiency: float, prices: Mapping[str, float], comparisons: int | None, processes: int = 1
) -> dict[str, Any]:
    """Plan a run without weights and pictures. Bytes and FLOP are whole numbers; None is not known.

    processes: one a GPU, as plain data parallelism has them, each with the whole model. Memory is that of one of them, work
    that of all.

    Raises ConfigError and CheckpointError.
    """
    counted = count_data(config, comparisons, processes)
    outlined = outline(config, counted.per_comparison, counted.num_chosen)
    denoiser = list(outlined.family.denoiser.parameters())
    learns = sum(parameter.numel() for parameter in trained(outlined.policy).values())
    coders = encoders(outlined)
    caching = size(denoiser, outlined_bytes([outlined.family.denoiser])) + sum(found["bytes"] for found in coders.values())
    flops = count_flops(outlined)
    disk = counted.disk(outlined, config)
    parts = memory(outlined, config)  # the last to touch the outline, whose weights it casts
    total = sum(part.bytes for part in parts)
    stages = work(config, flops, counted, processes)
    facts = Facts(
        config,
        {name: value for name, value in outlined.step.knobs.items() if config.objective.knobs.get(name) != AUTO},
        outlined.step.objective.needs,
        counted,
        torch.Size(outlined.latents).numel(),
        processes,
    )
    bank = config.reference.bank
    models = len(config.reference.checkpoints) if config.reference.kind == "merged" else 1
    each = models * (1 + config.switches.inversion_steps if config.switches.noise == "inverted" else 1)
    forwards = None
    if counted.train is not None and facts.needs:
        forwards = {"live": each * stages.pairs, "per_draw": each * counted.train}
    return {
        "model": {
            "checkpoint": config.model.checkpoint,
            "family": outlined.family.name,
            "resolution": outlined.resolution,
            "latents": list(outlined.latents),
        },
        "parameters": {
            "kind": config.trainable.kind,
            "trained": learns,
            "denoiser": sum(parameter.numel() for parameter in denoiser),
            "encoders": {name: found["parameters"] for name, found in coders.items()},
        },
        "memory": {"parts": [asdict(part) for part in parts], "total": total, "while_caching": caching},
        "data": asdict(counted),
        "disk": disk,
        "flops_per_comparison": asdict(flops)
        | {"re_encoded": flops.re_encoded, "cached": flops.cached, "with_bank": flops.bank, "configured": stages.per_pair},
        "run": {
            "steps": config.train.steps,
            "processes": processes,
            "comparisons_per_step": facts.pairs_per_step,
            "comparisons": stages.pairs,
            "epochs": facts.epochs,
            "bank": bank,
            "reference_forwards": forwards,
            "flops": {name: getattr(stages, name) for name in ("caching", "bank", "training", "validation", "total")},
        },
        "gpus": on_gpus(config, stages, max(total, caching), efficiency, prices),
        "efficiency": efficiency,
        "precision": config.train.precision,
        "warnings": dangers(facts),
    }
