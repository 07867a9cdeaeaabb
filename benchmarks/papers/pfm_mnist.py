"""The MNIST table of preference flow matching (Kim et al. 2024, arXiv 2405.19806), on 10,000 digits.

    python -m benchmarks.papers.pfm_mnist [--work runs/pfm-mnist] [--full] [--quick]

A conditional generator (LSGAN) draws digits, LeNet-5 gives the probability of the digit that was asked for, and of about ten
pictures of a label the best and the worst become a pair, 10,000 times. Then

    pfm, pfm x2, x3   a flow from worst to best, behind the generator, applied once, twice, three times
    dpo               the generator, by the exact ratio of likelihoods given z, at several β
    reward gradient   the generator, by the gradient through the reward, which nobody has of a human

and the flow again for every coupling. The default is a shorter schedule and a narrower field, for minutes of one core; --full
is the published one. What is finished in --work is kept.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.papers import pfm_mnist_page
from benchmarks.papers.digits import (
    CLASSES,
    Generator,
    LeNet5,
    Pairs,
    classifier,
    digits,
    dpo,
    drawn,
    reward_gradient,
    spread_within,
    train_generator,
)
from benchmarks.papers.stages import Tree, kept, options_of
from flowalign import runs
from flowalign.evaluate.best_of import best_of
from flowalign.evaluate.compare import mean_with_interval
from flowalign.flow.arrays import ArrayPairs
from flowalign.flow.field import FieldSettings, load_field, make_field
from flowalign.flow.path import COUPLINGS
from flowalign.flow.settings import Match, Solve, Train
from flowalign.flow.solve import guided, solve
from flowalign.rng import key

PAGE = Path("docs/results/pfm_mnist.md")
BETAS = (1.0, 1e-1, 1e-2, 1e-3, 1e-6)
PENALTIES = (1.0, 0.1)
SHOWN = 2
"""Pictures of every digit on the sheet."""


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    generator_steps: int = 1200
    """Of the LSGAN, 100 digits each."""
    pairs: int = 10_000
    tuning_steps: int = 240
    """Of dpo and of the reward's gradient, 125 pairs or pictures each."""
    width: int = 16
    """Channels of the field's first level; 32 as published."""
    steps: int = 100
    """Of the field, 125 pairs each; 8,000 as published: 100 epochs."""
    iterations: int = 3
    solver: str = "euler"
    solver_steps: int = 5
    samples: int = 10_000
    """Pictures that a generator is scored on."""
    moved: int = 5_000
    """Those of them that the flow of the given pairs moves; couplings are compared on 2,000 of these."""
    compared: int = 2_000


FULL = Size(generator_steps=6000, tuning_steps=800, width=32, steps=8000, solver="midpoint", solver_steps=16, moved=10_000)
QUICK = Size(3, 30, 2, 8, 2, 2, "euler", 1, 40, 20, 20)


def measure(work: Path, size: Size, seed: int) -> Tree:
    """Figures of every arm, `{arms: {name: {reward: [], spread, cpu, …}}, …}`."""
    torch.set_flush_denormal(True)  # gradients of a DPO that has learned its pairs are denormal, and ten times as slow
    started = time.process_time()
    pictures, known = digits(work / "data")
    reward, origin = classifier(pictures, known)
    file = work / f"generator-{size.generator_steps}-{seed}.safetensors"
    base, seconds = generator_of(file, lambda: train_generator(pictures, known, size.generator_steps, seed))
    labels = torch.arange(size.samples) % CLASSES
    z, noise = drawn(labels, seed, "samples")
    pairs = Pairs(base, reward, size.pairs, seed)
    arms: dict[str, Tree] = {}

    def arm(name: str, about: Tree, make: Callable[[], Tensor], places: slice = slice(None)) -> None:
        """Scores of pictures of these labels, `make()`; the CPU seconds are all that it took to have them."""

        def figures() -> Tree:
            begun = time.process_time()
            found = make()
            spent = time.process_time() - begun
            return scored(found, labels[places], reward) | {"cpu": spent}

        file = work / f"{name.replace(' ', '-')}.json"
        arms[name] = kept(file, about | {"seed": seed, "generator": size.generator_steps, "pairs": size.pairs}, figures)
        mean = sum(arms[name]["reward"]) / len(arms[name]["reward"])
        print(f"{time.process_time() - started:6.0f} s  {name:24} {mean:.4f}  spread {arms[name]['spread']:.2f}", flush=True)

    def draw(net: Generator) -> Tensor:
        with torch.no_grad():
            return torch.cat([net(*part) for part in zip(z.split(500), labels.split(500), noise.split(500), strict=True)])

    plain = draw(base)
    counts = {"samples": size.samples}
    arm("base", counts, lambda: plain)
    tuned = counts | {"tuning": size.tuning_steps}
    for beta in BETAS:
        arm(f"dpo {beta:g}", tuned | {"beta": beta}, lambda beta=beta: draw(dpo(base, pairs, beta, size.tuning_steps, seed)))
    for penalty in PENALTIES:
        make = lambda penalty=penalty: draw(reward_gradient(base, reward, penalty, size.tuning_steps, seed))  # noqa: E731
        arm(f"reward gradient {penalty:g}", tuned | {"penalty": penalty}, make)

    shared = {name: value for name, value in asdict(size).items() if name in ("width", "steps", "solver", "solver_steps")}
    for coupling in COUPLINGS:
        rows = slice(size.moved if coupling == "paired" else size.compared)
        here = plain[rows]
        for turn in range(1, (size.iterations if coupling == "paired" else 1) + 1):
            name = {("paired", 1): "pfm"}.get((coupling, turn), f"pfm x{turn}" if coupling == "paired" else f"pfm {coupling}")
            file = work / f"moved-{coupling}-{turn}.safetensors"

            def moved(start: Tensor = here, rows: slice = rows, coupling: str = coupling, file: Path = file) -> Tensor:
                end = apply(fitted(pairs, coupling, size, seed, work), start, labels[rows], size)
                save_file({"pictures": end.contiguous()}, file)
                return end

            arm(name, shared | {"moved": len(here), "coupling": coupling, "turn": turn}, moved, rows)
            here = load_file(file)["pictures"]

    chosen = {"reward": pairs.reward_chosen.tolist(), "spread": spread_within(reward.features(pairs.chosen), pairs.labels)}
    rejected = {
        "reward": pairs.reward_rejected.tolist(),
        "spread": spread_within(reward.features(pairs.rejected), pairs.labels),
    }
    arms |= {"chosen": chosen, "rejected": rejected}
    table = torch.tensor(arms["base"]["reward"]).view(-1, CLASSES).T.numpy()
    return {
        "size": asdict(size),
        "seed": seed,
        "origin": origin,
        "arms": {name: summary(each) for name, each in arms.items()},
        "best_of": {n: float(best_of(table, table, n).mean()) for n in (2, 4, 8, 10) if n <= table.shape[1]},
        "reward_of_digits": float(reward(pictures, known).mean()),
        "spread_of_digits": spread_within(reward.features(pictures), known),
        "generator_cpu": seconds,
        "cpu": time.process_time() - started,
    }


def generator_of(path: Path, make: Callable[[], Generator]) -> tuple[Generator, float]:
    """The generator kept at `path`, or a new one, and the CPU seconds that it took."""
    begun = time.process_time()
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(make().state_dict(), path)
    net = Generator()
    net.load_state_dict(load_file(path))
    return net.eval().requires_grad_(False), time.process_time() - begun


def scored(pictures: Tensor, labels: Tensor, reward: LeNet5) -> Tree:
    with torch.no_grad():
        parts = list(zip(pictures.split(500), labels.split(500), strict=True))
        return {
            "reward": torch.cat([reward(*part) for part in parts]).tolist(),
            "spread": spread_within(torch.cat([reward.features(part) for part, _ in parts]), labels),
            "pictures": pictures[: SHOWN * CLASSES].clamp(-1, 1).flatten(1).tolist(),
        }


def fitted(pairs: Pairs, coupling: str, size: Size, seed: int, work: Path) -> torch.nn.Module:
    """A field from the worst to the best, by the one training loop."""
    settings = FieldSettings((1, 28, 28), "class", CLASSES, size.width, levels=3, blocks=1)
    field = make_field(settings, key(seed, "field"))
    folder = work / f"field-{coupling}-{size.width}-{size.steps}-{seed}"
    if not (folder / "weights").is_dir():
        cfg = Train(
            steps=size.steps,
            batch_size=125,
            learning_rate=1e-3,
            weight_decay=0.0,
            ema=0.99 if size.steps > 50 else None,
            schedule="cosine",
            device="cpu",
            seed=seed,
        )
        data = ArrayPairs(pairs.rejected, pairs.chosen, pairs.labels)
        result = runs.fit_field(field, data, folder, cfg, Match(coupling=coupling, sigma=0.1), resume=True, progress=False)  # type: ignore[arg-type]
        if not result["finished"]:
            raise SystemExit(result["summary"])
    return load_field(folder / "weights")


def apply(field: torch.nn.Module, start: Tensor, labels: Tensor, size: Size) -> Tensor:
    """One pass of the flow over pictures."""
    how = Solve(solver=size.solver, steps=size.solver_steps)  # type: ignore[arg-type]
    parts = zip(start.split(250), labels.split(250), strict=True)
    return torch.cat([solve(guided(field, told), part, how).end for part, told in parts])


def summary(arm: Tree) -> Tree:
    """What the page needs: the mean with its interval instead of every score."""
    found = mean_with_interval(arm["reward"], range(len(arm["reward"])))
    rest = {name: value for name, value in arm.items() if name != "reward"}
    return rest | {"mean": found.value, "low": found.low, "high": found.high, "count": len(arm["reward"])}


def main() -> None:
    options = parser().parse_args()
    size = FULL if options.full else QUICK if options.quick else Size()
    given = {name: getattr(options, name) for name in ("width", "steps", "moved") if getattr(options, name) is not None}
    found = measure(options.work, replace(size, **given), options.seed)
    print("\n".join(pfm_mnist_page.tables(found)))
    if not options.quick:
        pfm_mnist_page.write_page(found, PAGE)


def parser() -> argparse.ArgumentParser:
    made = options_of(__doc__, "runs/pfm-mnist")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--full", action="store_true", help="the published schedule: more than a day of one core")
    made.add_argument("--width", type=int, help="channels of the field's first level")
    made.add_argument("--steps", type=int, help="steps of the field")
    made.add_argument("--moved", type=int, help="pictures that the flow moves")
    return made


if __name__ == "__main__":
    main()
