"""The stages of a round: each writes its files whole, and is left alone where they are.

RUN/config.yaml  cache/  encoders.json
    rounds/base/pictures/  scores.parquet  scores-calibrated.parquet .json       what the base draws, once,
                evaluation/                                                      and for held-out prompts
    rounds/00/pictures/  scores.parquet  scores-calibrated.parquet               (round 00 has the base's pictures)
              pairs.jsonl  pairs-with-margins.jsonl  selected.jsonl  comparisons.jsonl
              align/  align.json  evaluation/pictures/  scores.parquet  judges.json  evaluation.json
Where flows are fitted, `runs.flow_rounds` says what lies there instead of align/ and align.json.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flowalign import config as configuration
from flowalign import yaml_text
from flowalign.data import prompts as prompt_files
from flowalign.data.drawing import Row, in_turn, mixed, parted, rows_of_round, unsteered
from flowalign.data.readers import open_comparisons
from flowalign.data.writer import others_of, row_of, write_comparisons
from flowalign.device import training_device
from flowalign.errors import ConfigError
from flowalign.files import text_lines, write_text
from flowalign.improve_settings import ImproveConfig, Select
from flowalign.parent import end_with
from flowalign.rng import key
from flowalign.runs.calibration import calibrate
from flowalign.runs.drawing import draw_and_keep, encoders
from flowalign.runs.implicit import margins
from flowalign.runs.scoring import score
from flowalign.runs.selection import READ_BY, select
from flowalign.runs.training import align
from flowalign.scoring.steered import STEERED, drawn_weights
from flowalign.scoring.table import read_table
from flowalign.sections import Data, Model
from flowalign.settings import Config
from flowalign.setup import load_objective


@dataclass(frozen=True)
class Loop:
    """A loop's settings, its folder, and what its rounds are made of."""

    config: ImproveConfig
    progress: bool = True

    @property
    def model(self) -> Model:
        """Raises ConfigError where none is named."""
        if self.config.model is None:
            raise ConfigError("model.checkpoint is missing: nothing draws; set it to a diffusers folder or a hub id.")
        return self.config.model

    @property
    def device(self) -> str:
        return self.config.train.device

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    @property
    def base(self) -> Path:
        """Beside the rounds, whose comparisons name its pictures: a loop is the same wherever its folder lies."""
        return self.folder / "rounds" / "base"

    @property
    def cache(self) -> Path:
        """Of latents, conditioning and scores."""
        return self.folder / "cache"

    def round(self, number: int) -> Path:
        return self.folder / "rounds" / f"{number:02d}"

    @cached_property
    def prompts(self) -> tuple[list[str], list[str]]:
        """(to train on, held out). Raises DataError and ConfigError."""
        wanted, held = self.config.prompts, self.config.held_out
        every = prompt_files.read(wanted if isinstance(wanted, str) else list(wanted))
        if isinstance(held, int):
            return parted(every, held, self.config.draw.seed)
        others = list(dict.fromkeys(prompt_files.read(held)))
        return [prompt for prompt in dict.fromkeys(every) if prompt not in others], others

    def plan(self, number: int) -> list[Row]:
        """What round `number` draws; that of round 0 is what the base draws for these prompts."""
        draw = self.config.draw
        prompts = in_turn(self.prompts[0], draw.prompts, draw.seed, number)
        return rows_of_round(prompts, draw.images, draw.seed, number, self._under(number))

    def _under(self, number: int) -> Callable[[str], Sequence[Mapping[str, float] | None]]:
        """What gives the weights of a prompt's pictures in a round, keyed by seed, round, prompt and draw."""
        steer, draw = self.config.steer, self.config.draw
        if steer is None:
            return unsteered
        names, seed = steer.objectives, key(draw.seed, "weights", number)

        def under(prompt: str) -> list[Mapping[str, float]]:
            rows = [drawn_weights(len(names), draw.alpha, prompt, each, seed).tolist() for each in range(draw.weights)]
            return [dict(zip(names, row, strict=True)) for row in rows]

        return under

    def pool(self) -> list[Row]:
        """What the base draws: round 0's pictures of every prompt that any round has."""
        draw = self.config.draw
        turns = (in_turn(self.prompts[0], draw.prompts, draw.seed, number) for number in range(self.config.rounds))
        prompts = list(dict.fromkeys(each for turn in turns for each in turn))
        return rows_of_round(prompts, draw.images, draw.seed, 0, self._under(0))

    def policy(self, finished: int) -> str:
        """What generates after so many finished rounds."""
        return str(self.learned(finished - 1)) if finished > 0 else self.model.checkpoint

    def version(self, source: str) -> dict[str, str | None]:
        """Which revision and variant of a policy's files to open: what a round wrote has one, and knows its base's."""
        model = self.model
        return {"revision": model.revision, "variant": model.variant} if source == model.checkpoint else {}

    def learned(self, number: int) -> Path:
        """The run folder of what learned in a round."""
        return self.round(number) / "align"

    def staleness(self, number: int) -> int:
        """Rounds that the policy which draws round `number` is older than the newest."""
        return min(number, 1) if self.config.draw.when == "ahead" else 0

    def data(self, number: int) -> Data:
        """What one round learns from."""
        cfg = self.config
        return Data(
            train=str(self.round(number) / "comparisons.jsonl"),
            held_out=0.0,
            cache=str(self.cache),
            rewards={cfg.select.score: 1.0} if cfg.select.score != "raw" else {},
            resolution=cfg.draw.resolution,
        )

    def aligning(self, number: int) -> Config:
        """The settings of one round's training."""
        cfg, before = self.config, self.policy(number)
        first = number == 0
        reference = cfg.reference.model_copy(update={"kind": "auto"} if first and cfg.reference.kind == "start" else {})
        return Config(
            model=self.model,
            data=self.data(number),
            objective=cfg.objective,
            reference=reference,
            switches=cfg.switches,
            trainable=cfg.trainable.model_copy(update={"start": None if first else before}),
            train=cfg.train.model_copy(update={"seed": key(cfg.train.seed, "round", number) % 2**31}),
            steer=cfg.steer,
            guard=cfg.guard,
            sample=cfg.sample,
            output=str(self.learned(number)),
        )

    def check(self) -> None:
        """Raises what training would of the settings: before anything is drawn, which may take hours."""
        aligning = self.aligning(0)
        load_objective(aligning)
        training_device(aligning.train)

    def draw(self, source: str, rows: Sequence[Row], folder: Path) -> None:
        """Draw rows into `folder` with a policy."""
        draw_and_keep(self, source, rows, folder)

    def learn(self, number: int) -> dict[str, Any]:
        """One round's training."""
        return align(self.aligning(number), resume=True, progress=self.progress)

    def keep(self, best: int, folder: Path) -> None:
        """Write the policy after round `best` into `folder`."""
        shutil.copytree(self.learned(best) / "weights", folder, dirs_exist_ok=True)

    def about(self, best: int | None) -> dict[str, Any]:
        """What `improve.json` says of the base, of what learns and of what is kept."""
        return {"checkpoint": self.policy(0), "objective": self.config.objective.name}


def draw(loop: Loop, source: str, rows: Sequence[Row], folder: Path, stale: int = 0) -> None:
    """Draw rows into `folder` with a policy that is `stale` rounds old, unless that is done."""
    done = folder / "drawn.json"
    if done.is_file():
        return
    write_text(folder / "plan.jsonl", "".join(json.dumps(row.line(), ensure_ascii=False) + "\n" for row in rows))
    loop.draw(source, rows, folder)
    about = {"pictures": len(rows), "policy": source, "stale": stale}
    write_text(done, json.dumps(about, indent=1) + "\n")


def ahead(loop: Loop, number: int) -> multiprocessing.process.BaseProcess | None:
    """Another process that draws round `number` with the policy that there is now; None where nothing is left to draw."""
    folder = loop.round(number) / "pictures"
    if loop.config.draw.when != "ahead" or number >= loop.config.rounds or (folder / "drawn.json").is_file():
        return None
    encoders(loop)  # found out once, by this process
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_draw_ahead, args=(configuration.dump(loop.config), number, os.getpid()), daemon=True)
    process.start()
    return process


def _draw_ahead(settings: str, number: int, parent: int) -> None:
    end_with(parent)
    loop = Loop(configuration.parse_tree(ImproveConfig, yaml_text.read(settings)), progress=False)
    draw_round(loop, number)


def draw_round(loop: Loop, number: int) -> None:
    """The pictures of a round after the first, by the policy that is due."""
    stale = loop.staleness(number)
    draw(loop, loop.policy(number - stale), loop.plan(number), loop.round(number) / "pictures", stale)


def score_base(loop: Loop) -> None:
    """What the base draws, its scores, and the calibration that all rounds share."""
    draw(loop, loop.policy(0), loop.pool(), loop.base / "pictures")
    _scored(loop, loop.base / "pictures", loop.base / "scores.parquet", loop.config.rewards)
    if not (table := loop.base / "scores-calibrated.parquet").is_file():
        cfg = loop.config.calibrate
        calibrate(loop.base / "scores.parquet", pairs=cfg.pairs, **_combined(loop), out=table)


def score_round(loop: Loop, number: int) -> None:
    """Calibrated scores of a round: of the first against each other, of later ones against the base's pictures."""
    folder = loop.round(number)
    out, base = folder / "scores-calibrated.parquet", loop.base / "scores-calibrated.parquet"
    if out.is_file():
        return
    if number == 0:
        table, wanted = read_table(base), {row.prompt for row in loop.plan(0)}
        table.select([place for place, prompt in enumerate(table.texts("prompt")) if prompt in wanted]).write(out)
        return
    _scored(loop, folder / "pictures", folder / "scores.parquet", loop.config.rewards)
    calibrate(
        folder / "scores.parquet",
        base=loop.base / "scores.parquet",
        fitted=base.with_suffix(".json"),
        **_combined(loop),
        out=out,
    )


def _combined(loop: Loop) -> dict[str, Any]:
    cfg = loop.config.calibrate
    return {"by": "sum" if cfg.weights else cfg.by, "weights": cfg.weights}


def _scored(loop: Loop, pictures: Path, out: Path, rewards: Sequence[Any]) -> None:
    if not out.is_file():
        how = {"device": loop.device, "cache": loop.cache, "progress": loop.progress}
        score(str(pictures), list(rewards), out=out, **how)


def select_pairs(loop: Loop, number: int) -> int:
    """`comparisons.jsonl`, of this round and, where they are replayed, of earlier ones; how many. Raises RunError for none."""
    folder, cfg = loop.round(number), loop.config.select
    out, pairs = folder / "comparisons.jsonl", folder / "pairs.jsonl"
    lot = key(loop.config.draw.seed, "select", number) % 2**31
    if not pairs.is_file():
        own: dict[str, Any] = {"by": cfg.by}
        if (steer := loop.config.steer) is not None:
            drawn = folder if number > 0 else loop.base
            own = {"by": STEERED, "objectives": steer.objectives, "plan": drawn / "pictures" / "plan.jsonl"}
        select(
            folder / "scores-calibrated.parquet",
            **own,
            **changed(cfg),
            out=pairs,
            weights=cfg.pair_weights,
            seed=lot,
        )
    ordered = pairs
    if cfg.order != "none":
        ordered = folder / "selected.jsonl"
        if not ordered.is_file():
            source = pairs if cfg.order in ("explicit", "random") else folder / "pairs-with-margins.jsonl"
            if not source.is_file():
                train, policy = loop.config.train, loop.policy(number)
                margins(
                    policy,
                    str(pairs),
                    out=source,
                    **loop.version(policy),
                    draws=cfg.draws,
                    resolution=loop.config.draw.resolution,
                    precision=train.precision,
                    device=train.device,
                    cache=loop.cache,
                    progress=loop.progress,
                )
            weight = cfg.potential_weight if cfg.order == "potential" else None
            select(str(source), by=cfg.order, out=ordered, ratio=cfg.ratio, potential_weight=weight, seed=lot)
    if not out.is_file():
        rows, replay = _rows(ordered), loop.config.replay
        earlier = range(max(0, number - replay.rounds), number)
        before = [row for each in earlier for row in _rows(loop.round(each) / ordered.name)]
        write_comparisons(out, mixed(rows, before, replay.share, loop.config.draw.seed, number))
    return sum(1 for line in text_lines(out) if line)


def changed(select: Select) -> dict[str, Any]:
    """How pairs are picked, as far as that is not as usual; two more say how an order asks for margins and weighs them."""
    picking = READ_BY.keys() - {"draws", "potential_weight"}
    fields = {name: field.default for name, field in Select.model_fields.items() if name in picking}
    return {name: value for name, usual in fields.items() if (value := getattr(select, name)) != usual}


def _rows(path: Path) -> list[dict[str, Any]]:
    comparisons = open_comparisons(str(path))
    return [row_of(comparisons[place]) | others_of(comparisons, place) for place in range(len(comparisons))]


def train_round(loop: Loop, number: int) -> dict[str, Any]:
    """The result of training; `finished` is False where a signal stopped it. Raises what training does."""
    path = loop.learned(number).with_suffix(".json")
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    result = loop.learn(number)
    if result["finished"]:
        write_text(path, json.dumps(result, indent=1) + "\n")
    return result
