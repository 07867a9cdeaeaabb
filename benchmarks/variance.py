"""Variance of the policy's gradient by how times are drawn, at equal batches, before and after some training.

    python benchmarks/variance.py [--config configs/emoji-dpo-lora.yaml] [--pairs 20] [--times 32] [--json FILE]

Gradients of whole batches have such heavy tails that a few dozen of them say nothing (two seeds of the same sampler differed
by a factor of 1.76). So the gradient of every one of some pairs, each with noise of its own, is taken at every time of a grid;
their inner products, after a random projection, give the variance that any way of drawing (pair, time) would have, and
batches are then drawn by the thousand from the samplers themselves. A time is rounded to its cell of the grid.

Ratios are to independent uniform times; intervals are 95 % of a bootstrap over pairs.

    no times     each pair's gradient averaged over all times: what would be left if times added no noise
    best shares  cells drawn in proportion to the true root mean square gradient, as if it were known
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
from flowalign.align.timesteps import TIMESTEPS, Importance, Sampler
from flowalign.data.batch import Batch
from flowalign.device import make_accelerator
from flowalign.rng import Keyed
from flowalign.setup import Prepared, prepare
from flowalign.train.trainable import trained

SKETCH = 8192
SIZES = (16, 64)
DRAWN = 1500
BOOTSTRAPS = 200


def sketches(ready: Prepared, pairs: int, times: int, learning: Importance) -> Tensor:
    """`[pairs, times, SKETCH]`: each gradient with its elements added up, with random signs, in SKETCH places."""
    parameters = list(trained(ready.policy).values())
    size, dice = sum(parameter.numel() for parameter in parameters), torch.Generator().manual_seed(0)
    place = torch.randint(SKETCH, (size,), generator=dice)
    sign = torch.randint(2, (size,), generator=dice) * 2.0 - 1
    TIMESTEPS["grid"] = Sampler(
        lambda rng, batch: (torch.tensor(batch.positions, dtype=torch.float64) + 0.5) / times, TIMESTEPS["uniform"].bend
    )
    step, out = replace(ready.step, timesteps="grid", importance=learning), torch.zeros(pairs, times, SKETCH)
    for pair, batch in enumerate(islice(ready.batches(0), pairs)):
        for cell in range(times):
            loss, _ = step(replace(batch, positions=(cell,)), Keyed(ready.config.train.seed))
            rows = torch.autograd.grad(loss.sum(), parameters)
            out[pair, cell].index_add_(0, place, sign * torch.cat([row.flatten() for row in rows]))
    return out


def drawn(
    name: str, like: Batch, size: int, count: int, times: int, share: Tensor, learned: Importance
) -> tuple[Tensor, Tensor]:
    """Cells and weights, each `[count, size]`, of batches from places all over a run."""
    cells, weights = [], []
    for number in range(count):
        places = tuple(range(number * size, (number + 1) * size))
        rows = replace(like, ids=places, draws=(number,) * size, positions=places)
        weight = torch.ones(size, dtype=torch.float64)
        if name == "best shares":
            even = Keyed(number).stratified("timestep", places)
            cell = torch.searchsorted(share.cumsum(0), even, right=True).clamp(max=times - 1)
            weight = 1 / (times * share[cell])
        else:
            even = TIMESTEPS["stratified" if name == "importance" else name].spread(Keyed(number), rows)
            if name == "importance":
                even, _, weight = learned.place(even)
            cell = (even * times).long().clamp(max=times - 1)
        cells.append(cell)
        weights.append(weight)
    return torch.stack(cells), torch.stack(weights)


def traces(gram: Tensor, cells: Tensor, weights: Tensor, resamples: list[Tensor]) -> Tensor:
    """`[resamples]` trace of the covariance of the batch gradient, pairs drawn from each list of pairs.

    gram: `[pairs, times, pairs, times]`.
    """
    dice, out = torch.Generator().manual_seed(1), []
    for pairs in resamples:
        own = pairs[torch.randint(len(pairs), cells.shape, generator=dice)]
        products = gram[own[:, :, None], cells[:, :, None], own[:, None], cells[:, None]]
        square = (weights[:, :, None] * products * weights[:, None]).mean((1, 2)).mean()
        out.append(square - gram[pairs][:, :, pairs].mean())
    return torch.stack(out)


def measure(ready: Prepared, pairs: int, times: int, gain: Tensor) -> dict[str, Any]:
    ready.model.train()
    learning, like = Importance(ready.step.device), ready.first_batch()
    learning.gain.copy_(gain)
    rows = sketches(ready, pairs, times, learning).flatten(0, 1).double()  # unlearned, importance left weights alone
    learning.refresh()
    gram = (rows @ rows.T).view(pairs, times, pairs, times)
    own = torch.einsum("ptpt->pt", gram)
    share = own.mean(0).sqrt() / own.mean(0).sqrt().sum()
    dice = torch.Generator().manual_seed(0)
    everyone = [torch.arange(pairs)]
    resamples = [torch.randint(pairs, (pairs,), generator=dice) for _ in range(BOOTSTRAPS)]

    def exact(these: Tensor) -> tuple[Tensor, Tensor]:
        """Of a single draw: with independent uniform times, and with each pair's gradient averaged over times."""
        mean = gram[these][:, :, these].mean()
        averaged = torch.einsum("ptps->p", gram[these][:, :, these]).mean() / times**2
        return own[these].mean() - mean, averaged - mean

    def described(value: Tensor, others: Tensor) -> dict[str, float]:
        low, high = others.quantile(torch.tensor([0.025, 0.975], dtype=others.dtype)).tolist()
        return {"value": float(value), "low": low, "high": high}

    single, still = exact(everyone[0])
    boots = torch.stack([torch.stack(exact(these)) for these in resamples])
    out: dict[str, Any] = {
        "root_mean_square_gradient_by_time": [round(value, 4) for value in (share * times).tolist()],
        "importance_shares": [round(value * 16, 3) for value in learning.probability.tolist()],
        "no times": {str(size): described(still / single, boots[:, 1] / boots[:, 0]) for size in SIZES},
    }
    for name in ("uniform", "stratified", "antithetic", "importance", "best shares"):
        out[name] = {}
        for size in SIZES:
            cells, weights = drawn(name, like, size, DRAWN, times, share, learning)
            value = traces(gram, cells, weights, everyone)[0] * size / single
            few = max(1, len(cells) // 5)
            others = traces(gram, cells[:few], weights[:few], resamples) * size / boots[:, 0]
            out[name][str(size)] = described(value, others)
    return out


def train(ready: Prepared, steps: int, size: int) -> None:
    parameters, stream = list(trained(ready.policy).values()), ready.batches(100_000)
    for _ in range(steps):
        for batch in islice(stream, size):
            loss, _ = ready.step(batch, Keyed(ready.config.train.seed))
            (loss.mean() / size).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        ready.optimizer.step()
        ready.optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/emoji-dpo-lora.yaml"))
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--times", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40, help="training steps of 8 pairs before the second measurement")
    parser.add_argument("--set", nargs="+", default=[], metavar="a.b=c", help="override settings of the configuration")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = configuration.load(options.config, ["train.batch_size=1", f"output={folder}", *options.set])
        ready = prepare(config, make_accelerator(config, Path(folder)), progress=False)
        importance = Importance(ready.step.device)
        own = replace(ready.step, importance=importance)
        own.gains(islice(ready.batches(50_000), 8), list(trained(ready.policy).values()), Keyed(config.train.seed))
        found = {"at the start": measure(ready, options.pairs, options.times, importance.gain)}
        print(f"{time.perf_counter() - started:.0f} s", flush=True)
        train(ready, options.steps, 8)
        found[f"after {options.steps} steps"] = measure(ready, options.pairs, options.times, importance.gain)
    for moment, rows in found.items():
        print(f"{moment}: root mean square gradient by time {rows['root_mean_square_gradient_by_time']}")
        print(f"  importance draws {rows['importance_shares']}")
        for name, row in rows.items():
            if isinstance(row, dict):
                shown = [
                    f"B {size}: {each['value']:5.2f} [{each['low']:.2f}, {each['high']:.2f}]" for size, each in row.items()
                ]
                print(f"  {name:14}{'   '.join(shown)}")
    print(f"{time.perf_counter() - started:.0f} s")
    if options.json:
        about = {"config": str(options.config), "pairs": options.pairs, "times": options.times, "torch": torch.__version__}
        options.json.write_text(json.dumps(about | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
