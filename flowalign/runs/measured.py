"""What is measured of a policy on held-out prompts: rewards that it was trained on, judges that it was not, diversity."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flowalign.data.drawing import Row
from flowalign.data.weights import are_even, grid
from flowalign.device import choose_device
from flowalign.errors import ConfigError, RunError
from flowalign.evaluate.compare import Generated, read_generation
from flowalign.evaluate.judges import ImageTower, load_judges, to_pixels
from flowalign.evaluate.rounds import COMBINED, HYPERVOLUME, Measured
from flowalign.files import write_text
from flowalign.improve_settings import ImproveConfig
from flowalign.runs.rounds import Loop, draw
from flowalign.runs.scoring import score
from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards.base import Reward, Shelf
from flowalign.scoring.table import WHY, ScoreTable, read_table

AT_ONCE, SMALL, TOWER = 32, 16, 128
"""Pictures judged together; sides in pixels of what diversity looks at."""


def measure(loop: Loop, source: str, folder: Path) -> Measured:
    """Draw the held-out prompts with a policy into `folder/pictures` and score them, as far as that is not done.

    A steered policy draws all of them under each weight of a grid, from the same seeds.
    """
    cfg, steer = loop.config.evaluate, loop.config.steer
    seeds = [cfg.seed + place for place in range(cfg.images)]
    every = loop.prompts[1]
    count = min(cfg.prompts or len(every), len(every))
    wanted = [(every[place * len(every) // count], seed) for place in range(count) for seed in seeds]
    under = [] if steer is None or source == loop.policy(0) else grid(steer.objectives, cfg.weights)
    draw(loop, source, [Row(*each, told) for told in under or [None] for each in wanted], folder / "pictures")
    table, judged = folder / "scores.parquet", folder / "judges.json"
    device = loop.device
    if not table.is_file():
        rewards = [*loop.config.rewards, *cfg.rewards]
        score(str(folder / "pictures"), rewards, out=table, device=device, cache=loop.cache, progress=loop.progress)
    even = next((place for place, each in enumerate(under) if are_even(each)), 0)
    pictures = read_generation(folder / "pictures")[even * len(wanted) : (even + 1) * len(wanted)]
    if cfg.judges is not None and not judged.is_file():
        found: dict[str, list[float]] = {}
        for judge in load_judges(cfg.judges, choose_device(device)):
            parts = [judge.score(_opened(part), [each.prompt for each in part]) for part in _parts(pictures)]
            found[judge.name] = [value for part in parts for value in part.tolist()]
        write_text(judged, json.dumps(found) + "\n")
    scores = read_table(table)
    _check_scored(scores, table)
    drawn = {name: scores.oriented(name).reshape(-1, len(wanted)) for name in scores.rewards}
    values = {name: each[even] for name, each in drawn.items()}
    if judged.is_file():
        values |= {f"judge {name}": np.array(each) for name, each in json.loads(judged.read_text()).items()}
    front = {name: drawn[name].T for name in steer.objectives} if steer is not None and under else {}
    return Measured(tuple(prompt for prompt, _ in wanted), values, _features(loop, pictures), tuple(under), front)


def _check_scored(scores: ScoreTable, table: Path) -> None:
    """Raises RunError where a picture lacks a score, without which figures of the policy are not comparable with others'.

    The table goes, so that a loop that goes on asks again; scores that there were are still in the cache.
    """
    for name in scores.rewards:
        missing = np.flatnonzero(np.isnan(scores.raw(name)))
        if len(missing):
            place = int(missing[0])
            picture, why = scores.texts("path")[place], scores.texts(WHY + name)[place]
            table.unlink()
            raise RunError(
                f"{name} gave no score to {len(missing)} held-out pictures, the first {picture} ({why}); --resume tries again."
            )


def _opened(pictures: Sequence[Generated]) -> list[Image.Image]:
    return [Image.open(each.path).convert("RGB") for each in pictures]


def _parts(pictures: Sequence[Generated]) -> list[Sequence[Generated]]:
    return [pictures[start : start + AT_ONCE] for start in range(0, len(pictures), AT_ONCE)]


def _features(loop: Loop, pictures: Sequence[Generated]) -> np.ndarray:
    """`[n, d]`."""
    if loop.config.evaluate.features == "pixels":
        return np.concatenate([to_pixels(_opened(part), SMALL).flatten(1).double().numpy() for part in _parts(pictures)])
    tower = ImageTower(choose_device(loop.device))
    return np.concatenate([tower(to_pixels(_opened(part), TOWER)).double().cpu().numpy() for part in _parts(pictures)])


def trained_on(config: ImproveConfig) -> Mapping[str, float]:
    """The rewards that are listed, with their weights; one of weight 0 is no judge either.

    Raises ConfigError where something that judges is one of them, or looks through the same model, for weights of other
    rewards, and where `best` is not measured.
    """
    shelf = Shelf(choose_device("cpu"))
    rewards = load_rewards(config.rewards, shelf)
    names = [reward.card.name for reward in rewards]
    judges = load_rewards(config.evaluate.rewards, shelf) if config.evaluate.rewards else []
    for judge in judges:
        if (same := next((each for each in rewards if _same(each, judge)), None)) is not None:
            raise ConfigError(
                f"evaluate.rewards has {judge.card.name!r}, which is or looks through the model of the reward "
                f"{same.card.name!r} that is trained on and would only repeat what it says; judge by another model."
            )
    if config.evaluate.judges is not None:
        _apart(config.rewards, Path(config.evaluate.judges))
    steered = () if config.steer is None else config.steer.objectives
    for name in steered:
        if name not in names:
            raise ConfigError(f"steer.objectives names {name!r}, which is no reward here; allowed: {', '.join(names)}.")
    for name in config.calibrate.weights:
        if name not in names:
            raise ConfigError(f"calibrate.weights has {name!r}, which is no reward here; allowed: {', '.join(names)}.")
    wanted = config.calibrate.weights
    weights = {name: wanted.get(name, 0.0) if wanted else float(not steered or name in steered) for name in names}
    several = sum(map(bool, weights.values())) > 1
    known = [COMBINED, *([HYPERVOLUME] if several else []), *names, *(judge.card.name for judge in judges)]
    if config.evaluate.judges is not None:
        card = json.loads((Path(config.evaluate.judges) / "card.json").read_text(encoding="utf-8"))
        known += [f"judge {name}" for name in card["judges"]]
    if config.best not in known:
        raise ConfigError(f"best is {config.best!r}, which is not measured; allowed: {', '.join(known)}.")
    return weights


def _same(reward: Reward, judge: Reward) -> bool:
    """Formulas of the pixels are the same only where they are one formula; models also where they share a tower."""
    if reward.card.fingerprint == judge.card.fingerprint:
        return True
    return reward.backbone.key == judge.backbone.key and "none" not in (reward.card.weights, judge.card.weights)


def _apart(rewards: Sequence[Any], judges: Path) -> None:
    """Raises ConfigError for a reward with weights of the folder of judges."""
    inside = judges.resolve()
    for reward in rewards:
        for value in reward.values() if isinstance(reward, Mapping) else (reward,):
            if isinstance(value, str) and Path(value).resolve().is_relative_to(inside):
                raise ConfigError(
                    f"the reward {value} lies in evaluate.judges {judges}, so what is trained on would judge itself; name "
                    "other judges."
                )
