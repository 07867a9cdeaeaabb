"""A short probe on a throw-away copy that says which β suits new data: `flowalign suggest-beta`, and `objective.beta: auto`.

While policy and reference agree every margin is 0, so β cannot be read off the start. A few optimizer steps show how far
margins Δ spread with these data and this model; β is then what leaves the gradient factor σ(−βΔ) at its target on average.
"""

from __future__ import annotations

import tempfile
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from flowalign import config as configuration
from flowalign.data.pairs import fixed_draws
from flowalign.errors import ConfigError, RunError
from flowalign.rng import Keyed
from flowalign.settings import AUTO, Config, Objective
from flowalign.setup import Prepared, load_objective, prepare
from flowalign.sources import OWN_BATCHES
from flowalign.train.checkpoint import State
from flowalign.train.loop import Hooks, fit
from flowalign.train.ranks import Ranks
from flowalign.train.rundir import RunDir
from flowalign.train.trainable import trained

STEPS, TARGET = 25, 0.3
BESIDE = (0.25, 0.5, 1.0, 2.0, 4.0)
"""β of the table, as multiples of the suggested one."""
QUANTILES = (0.05, 0.5, 0.95)


def suggest(
    config: Config, accelerator: Accelerator, *, steps: int = STEPS, target: float = TARGET, progress: bool = True
) -> dict[str, Any]:
    """Train a copy for `steps` at the full rate and return β for the mean gradient factor `target`, 0 to ½, with a table.

    Margins are those of held-out comparisons at fixed draws, or of the run's first batches where none are held out. Nothing of
    the copy is kept. Raises ConfigError for an objective without β or reference, RunError where no β reaches the target.
    """
    if not 0 < target < 0.5:
        raise ConfigError(f"the target is {target:g}; a mean of σ(−βΔ) lies between 0 and 0.5, and 0.3 is a good one.")
    objective, knobs = load_objective(config)
    if "beta" not in knobs or "reference" not in objective.needs:
        raise ConfigError(
            f"objective.name {config.objective.name!r} has no beta that scales a margin against a reference; choose one "
            "that has both (flowalign objectives lists them)."
        )
    start = {**config.objective.knobs, "beta": knobs["beta"]}
    train = dict(steps=steps, warmup_steps=0, schedule="constant", ema=None, save_every=None, validate_every=None, trackers=())
    switches = config.switches.model_copy(update={"beta": "fixed", "annotator_types": 1})
    parts = {"objective": Objective(name=config.objective.name, **start), "switches": switches}
    parts["train"] = config.train.model_copy(update=train)
    with tempfile.TemporaryDirectory() as own:
        folder = Ranks(accelerator, config.train.timeout).gather(own)[0]  # the first process's, which is the one that writes
        copied = config.model_copy(update={**parts, "output": folder})
        ready = prepare(copied, accelerator, progress=progress)
        _train(ready, Path(folder), progress)
        margins = _margins(ready)
    accelerator.free_memory()
    beta = solve(margins, target)
    scale = margins.std().item()
    rows = [_row(margins, beta * factor) for factor in BESIDE]
    return {
        "beta": beta,
        "target": target,
        "steps": steps,
        "probed_at": knobs["beta"],
        "margin": {"mean": margins.mean().item(), "deviation": scale, "positive": (margins > 0).double().mean().item()},
        "table": rows,
    }


def _train(ready: Prepared, folder: Path, progress: bool) -> None:
    state = State(trained(ready.policy), ready.optimizer, None, ready.accelerator.scaler, {})

    hooks = Hooks(lambda step, values: None, after=ready.after)
    arguments = (ready.accelerator, ready.model, state, ready.batches, ready.step, ready.config.train, hooks)
    if not fit(*arguments, folder / "state", ready.about, progress=progress):
        raise KeyboardInterrupt


@torch.no_grad()
def _margins(ready: Prepared) -> Tensor:
    """Δ of every comparison that is no tie, in the direction of its vote, float64 on the CPU; alike in every process.

    Of a picture that was judged alone it is h, which rises where the picture is wanted and falls where it is not.
    """
    ready.model.eval()
    cfg, found = ready.config.train, []
    if ready.held_out is None:
        step, rng, batches = ready.step, Keyed(cfg.seed), islice(ready.batches(0), OWN_BATCHES)
    else:
        step, rng = ready.step.on_held_out(ready.held_out_bank, ready.held_out.cached.num_chosen), Keyed(cfg.seed + 1)
        draws = cfg.validation_draws
        batches = chain.from_iterable(fixed_draws(ready.held_out, cfg.batch_size, draws, draw) for draw in range(draws))
    for batch in batches:
        terms = step.terms(batch, rng)
        towards = (2 * terms.preference - 1).sign()
        margin = terms.log_ratio[:, 0] if terms.policy_error.shape[1] == 1 else terms.margin
        found.append((margin * towards)[towards != 0])
    margins = torch.cat(found).double()
    if ready.held_out is None:  # every process has batches of its own
        return torch.tensor(list(chain.from_iterable(ready.ranks.gather(margins.tolist()))), dtype=torch.float64)
    return ready.accelerator.reduce(margins, "mean").cpu()


def factor(margins: Tensor, beta: float) -> float:
    """Mean of σ(−βΔ)."""
    return torch.sigmoid(-beta * margins).mean().item()


def solve(margins: Tensor, target: float) -> float:
    """The smallest β ≥ 0 with mean σ(−βΔ) = target < ½. Raises RunError where there is none, or nothing was learned."""
    scale, mean = margins.abs().mean().item(), margins.mean().item()
    if mean <= 0:
        raise RunError(
            f"the probe did not learn the preference: margins are {mean:.1e} on average and should be above 0; give it more "
            "steps, or raise train.learning_rate."
        )
    grid = (torch.logspace(-4, 4, 400, dtype=torch.float64) / scale).tolist()
    factors = [factor(margins, beta) for beta in grid]
    reached = next((place for place, value in enumerate(factors) if value <= target), None)
    if reached is None:
        wrong = (margins <= 0).double().mean().item()
        raise RunError(
            f"no beta leaves a mean gradient factor of {target:g}: the lowest is {min(factors):.2f}, because {wrong:.0%} of "
            "the margins are not positive after the probe; give it more steps, raise train.learning_rate, or take a higher "
            "target."
        )
    low, high = (0.0 if reached == 0 else grid[reached - 1]), grid[reached]
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if factor(margins, middle) <= target else (middle, high)
    return high


def _row(margins: Tensor, beta: float) -> dict[str, Any]:
    low, middle, high = (beta * margins).quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    return {"beta": beta, "factor": factor(margins, beta), "reward_margin": [low, middle, high]}


def table(found: dict[str, Any]) -> str:
    """What `suggest` found, for people."""
    margin = found["margin"]
    lines = [
        f"beta {rounded(found['beta']):g} leaves a mean gradient factor of {found['target']:g} after {found['steps']} steps",
        f"margins: mean {margin['mean']:.2e}, deviation {margin['deviation']:.2e}, {margin['positive']:.0%} above 0",
        "",
        f"{'beta':>10}  {'gradient factor':>15}  {'reward margin, 5 % to median to 95 %':>38}",
    ]
    for row in found["table"]:
        spread = " to ".join(f"{value:+.2f}" for value in row["reward_margin"])
        lines.append(f"{rounded(row['beta']):>10g}  {row['factor']:>15.2f}  {spread:>38}")
    return "\n".join(lines)


def rounded(beta: float) -> float:
    """To two digits: the probe knows no more."""
    return float(f"{beta:.2g}")


def resolved(config: Config, accelerator: Accelerator, run: RunDir, *, progress: bool = True) -> Config:
    """The configuration with a number for β `auto`: found once a run, so that a resumed one goes on with the same."""
    if config.objective.knobs.get("beta") != AUTO:
        return config
    if run.config.exists():
        begun = load_objective(configuration.load(run.config))[1]  # of another objective it is refused with the saved state
        beta = begun.get("beta", load_objective(config)[1]["beta"])
    else:
        found = suggest(config, accelerator, target=config.switches.target_factor, progress=progress)
        beta = rounded(found["beta"])
        if accelerator.is_main_process:
            run.write_json("beta.json", found)
            print(table(found), flush=True)
    return config.model_copy(
        update={"objective": Objective(name=config.objective.name, **config.objective.knobs | {"beta": beta})}
    )
