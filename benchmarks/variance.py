"""Variance of the policy's gradient by how times are drawn, at equal batches, before and after some training.

    python benchmarks/variance.py [--config configs/emoji-dpo-lora.yaml] [--batch-size 8] [--batches 64] [--json FILE]

Every sampler sees the same batches with the same noise, caption dropout and weights; only times differ. Measured is the
trace of the covariance of a batch's gradient over the batches, its ratio to that of independent uniform times with a 95 %
bootstrap interval over batches, and the same for means of four consecutive batches, over which low discrepancy goes on.

    again        uniform times of another seed; half its mean squared distance from `uniform`, batch by batch, is what times
                 alone contribute: no sampler can win more than that share of the variance
    importance   draws by what was learned from the `uniform` row, which is then kept fixed
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign import config as configuration
from flowalign.align.step import PreferenceStep
from flowalign.align.timesteps import TIMESTEPS, Importance, Sampler
from flowalign.rng import Keyed
from flowalign.setup import Prepared, make_accelerator, prepare
from flowalign.train.trainable import trained

SAMPLERS = ("stratified", "antithetic", "importance")
GROUP = 4


def gradients(ready: Prepared, step: PreferenceStep, batches: int) -> Tensor:
    """`[batches, parameters]` of the first batches of the run."""
    parameters, rows = list(trained(ready.policy).values()), []
    for batch in islice(ready.batches(0), batches):
        loss, _ = step(batch, Keyed(ready.config.train.seed))
        rows.append(torch.cat([each.flatten() for each in torch.autograd.grad(loss.mean(), parameters)]))
    return torch.stack(rows)


def spread(rows: Tensor) -> Tensor:
    """Squared distances from the mean `[R]`; their mean is the unbiased trace of the covariance."""
    return (rows - rows.mean(0)).square().sum(1) * len(rows) / (len(rows) - 1)


def ratio(found: Tensor, base: Tensor) -> dict[str, float]:
    """Of two sums of squared distances over the same batches."""
    dice = torch.randint(len(base), (2000, len(base)), generator=torch.Generator().manual_seed(0))
    low, high = (found[dice].sum(1) / base[dice].sum(1)).quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"value": float(found.sum() / base.sum()), "low": low, "high": high}


def measure(ready: Prepared, batches: int) -> dict[str, Any]:
    ready.model.train()
    learning = Importance(ready.step.device)
    own = {
        "uniform": replace(
            ready.step, timesteps="uniform", importance=learning
        ),  # unlearned, it leaves times and weights alone
        "again": replace(ready.step, timesteps="again"),
    }
    uniform = gradients(ready, own["uniform"], batches)
    learning.refresh()
    again = gradients(ready, own["again"], batches)
    single, grouped = spread(uniform), spread(uniform.unflatten(0, (-1, GROUP)).mean(1))
    times = 0.5 * (uniform - again).square().sum(1).mean()
    out: dict[str, Any] = {
        "trace_uniform": float(single.mean()),
        "signal_over_noise": float((uniform.mean(0).square().sum() - single.mean() / batches) / single.mean()),
        "share_of_times": float(times / single.mean()),
        "importance_shares": [round(share, 4) for share in learning.probability.tolist()],
        "again": ratio(spread(again), single),
    }
    del again
    for name in SAMPLERS:
        importance = learning if name == "importance" else None
        step = replace(ready.step, timesteps="stratified" if importance else name, importance=importance)
        rows = gradients(ready, step, batches)
        out[name] = ratio(spread(rows), single)
        out[f"{name}, mean of {GROUP}"] = ratio(spread(rows.unflatten(0, (-1, GROUP)).mean(1)), grouped)
    return out


def train(ready: Prepared, steps: int) -> None:
    parameters, rng = list(trained(ready.policy).values()), Keyed(ready.config.train.seed + 7)
    for batch in islice(ready.batches(100_000), steps):
        loss, _ = ready.step(batch, rng)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        ready.optimizer.step()
        ready.optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/emoji-dpo-lora.yaml"))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=64, help=f"a multiple of {GROUP}")
    parser.add_argument("--steps", type=int, default=60, help="training steps before the second measurement")
    parser.add_argument("--set", nargs="+", default=[], metavar="a.b=c", help="override settings of the configuration")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    straight = TIMESTEPS["uniform"].bend
    TIMESTEPS["again"] = Sampler(lambda rng, batch: TIMESTEPS["uniform"].spread(Keyed(rng.seed + 1), batch), straight)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"train.batch_size={options.batch_size}", f"output={folder}", *options.set]
        config = configuration.load(options.config, overrides)
        ready = prepare(config, make_accelerator(config, Path(folder)), progress=False)
        found = {"at the start": measure(ready, options.batches)}
        train(ready, options.steps)
        found[f"after {options.steps} steps"] = measure(ready, options.batches)
    for moment, rows in found.items():
        print(f"{moment}: times alone make up {rows['share_of_times']:.0%} of the variance")
        print(f"  shares of the draws by importance: {rows['importance_shares']}")
        for name, row in rows.items():
            if isinstance(row, dict):
                print(f"  {name:24}{row['value']:6.2f} [{row['low']:.2f}, {row['high']:.2f}]")
    print(f"{time.perf_counter() - started:.0f} s")
    if options.json:
        about = {"config": str(options.config), "batch_size": options.batch_size, "batches": options.batches}
        options.json.write_text(json.dumps(about | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
