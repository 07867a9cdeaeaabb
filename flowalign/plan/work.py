"""What a whole run costs: its stages in FLOP, and from them hours and money on named GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flowalign.errors import ConfigError, allowed
from flowalign.plan.data import Counted
from flowalign.plan.flops import Flops
from flowalign.plan.gpus import GPUS, USABLE
from flowalign.settings import Config


@dataclass(frozen=True)
class Work:
    """FLOP of each stage of a run, of all its processes; None where the number of comparisons is not known."""

    pairs: int
    """Comparisons trained on, repetitions included."""
    per_pair: int
    """FLOP of a training step per comparison, as configured."""
    training: int
    caching: int | None
    bank: int | None
    validation: int | None
    processes: int = 1

    @property
    def total(self) -> int:
        """All that is known."""
        return self.training + sum(each or 0 for each in (self.caching, self.bank, self.validation))


def work(config: Config, flops: Flops, counted: Counted, processes: int = 1) -> Work:
    """Multiply out. Sample pictures, the report and reading files are not in it."""
    cfg, bank = config.train, config.reference.bank
    pairs = cfg.steps * cfg.batch_size * cfg.accumulation * processes
    per_pair = flops.cached if bank is None else flops.bank
    caching = filled = validation = None
    if counted.pictures is not None and counted.prompts is not None:
        variants = 2 if config.data.flip else 1
        caching = counted.pictures * variants * flops.images // counted.per_comparison + (counted.prompts + 1) * flops.prompts
    if counted.train is not None and counted.held_out is not None:
        held = counted.held_out * cfg.validation_draws
        filled = 0 if bank is None else (counted.train * bank + held) * flops.reference
        every = cfg.validate_every or cfg.steps
        times = 1 + cfg.steps // every + (cfg.steps % every > 0)
        validation = times * held * (flops.policy_forward + (flops.reference if bank is None else 0))
    return Work(pairs, per_pair, pairs * per_pair, caching, filled, validation, processes)


def on_gpus(
    config: Config, work: Work, needed: int, efficiency: float, prices: Mapping[str, float]
) -> list[dict[str, str | float | bool]]:
    """Speed, time and cost on as many of each GPU as there are processes, each at `efficiency` of its peak.

    needed: bytes that must fit into each.

    `prices` in USD an hour replace the assumed ones. Raises ConfigError for an efficiency or a GPU that is none.
    """
    if not 0 < efficiency <= 1:
        raise ConfigError(f"the efficiency is {efficiency:g}; it is a share of the GPU's peak, above 0 and up to 1.")
    for name in prices:
        if name not in GPUS:
            raise ConfigError(f"no GPU is called {name!r} here; {allowed(name, GPUS)}.")
    rows: list[dict[str, Any]] = []
    for name, gpu in GPUS.items():
        speed = efficiency * gpu.peak(config.train.precision, config.train.tf32)
        hours, price = work.total / work.processes / speed / 3600, prices.get(name, gpu.usd_per_hour)
        rows.append(
            {
                "gpu": name,
                "peak_tflops": gpu.peak(config.train.precision, config.train.tf32) / 1e12,
                "comparisons_per_second": work.processes * speed / work.per_pair,
                "hours": hours,
                "usd_per_hour": price,
                "usd": work.processes * hours * price,
                "memory_gib": gpu.gib,
                "fits": needed <= USABLE * gpu.gib * 2**30,
                "source": gpu.source,
            }
        )
    return rows
