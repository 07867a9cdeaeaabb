"""A loop whose rounds fit flows, behind a generator that stays as it is.

RUN/rounds/00/flow/  flow.json         the round's flow, fitted to pictures that the flows before it had moved
              chain.json               all flows so far, one after the other: with the generator, what draws the next round
              pictures/before/         what the generator drew, where a chain moved it into pictures/
    weights/chain.json  00/  01/ …     the chain after the round that is kept
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from flowalign.data.drawing import Row
from flowalign.device import choose_device
from flowalign.errors import ConfigError
from flowalign.files import atomic, write_text
from flowalign.flow import settings
from flowalign.flow.apply import apply_folder
from flowalign.flow.folders import TABLE
from flowalign.flow.improve import load_flow, write_chain
from flowalign.improve_settings import Draw, ImproveConfig
from flowalign.rng import key
from flowalign.runs.drawing import draw_alone
from flowalign.runs.flow_parts import check_flow
from flowalign.runs.flows import fit_flow, table_line
from flowalign.runs.rounds import Loop
from flowalign.runs.serving import UPSTREAM_KEY
from flowalign.serve.client import ImagesAPI

ALIGNING = ("objective", "reference", "switches", "trainable", "train", "steer", "guard", "sample")
"""Sections that say how weights are trained."""
SAMPLING = ("steps", "guidance", "sampler", "batch_size", "precision")
"""Of `draw`, what a checkpoint is told and an API is not."""


class FlowLoop(Loop):
    """A loop that fits flows."""

    @property
    def device(self) -> str:
        return self.config.flow.train.device

    @property
    def api(self) -> ImagesAPI | None:
        """What draws, where it is not the model. Raises ConfigError for what is no address, and a key that is not there."""
        cfg = self.config.generator
        if cfg is None:
            return None
        name = cfg.key or UPSTREAM_KEY
        secret = os.environ.get(name) or None
        if secret is None and cfg.key is not None:
            raise ConfigError(
                f"generator.key names the environment variable {name}, which is not set; set it to the API's key."
            )
        return ImagesAPI(**cfg.model_dump(exclude={"key"}), key=secret)

    def check(self) -> None:
        """Raises what fitting would of the settings: before anything is drawn, which may have a price."""
        self.policy(0)
        try:
            check_flow(self.fitting(0))
        except ConfigError as error:
            raise ConfigError(f"the section flow cannot be used, its data.resolution being draw.resolution: {error}") from error

    def policy(self, finished: int) -> str:
        if finished > 0:
            return str(self.round(finished - 1))
        return self.model.checkpoint if (api := self.api) is None else f"{api.model} at {api.host}"

    def learned(self, number: int) -> Path:
        return self.round(number) / "flow"

    def flows(self, finished: int) -> list[Path]:
        """Those of so many rounds, in the order in which they are applied."""
        return [self.learned(number) for number in range(finished)]

    def fitting(self, number: int) -> settings.FlowConfig:
        """The settings of one round's flow."""
        model, how = self.config.model, self.config.flow
        seed = key(how.train.seed, "round", number) % 2**31
        return settings.FlowConfig(
            **dict(how) | {"train": how.train.model_copy(update={"seed": seed})},
            model=None if model is None else settings.Model(**model.model_dump(exclude={"quantize"})),
            data=settings.Pairs(**self.data(number).model_dump()),
            output=str(self.learned(number)),
        )

    def draw(self, source: str, rows: Sequence[Row], folder: Path) -> None:
        if source == self.policy(0):
            self._generate(rows, folder)
            return
        # The generator has drawn the held-out prompts already, and an API would draw others, at a price.
        before = self.base / "evaluation" / "pictures"
        if (before / "plan.jsonl").read_bytes() != (folder / "plan.jsonl").read_bytes():
            before = folder / "before"
            self._generate(rows, before)
        apply_folder(load_flow(source, device=choose_device(self.device)), before, folder, progress=self.progress)

    def _generate(self, rows: Sequence[Row], folder: Path) -> None:
        if (api := self.api) is None:
            draw_alone(self, self.model.checkpoint, rows, folder)
        else:
            ask(api, rows, folder, self.policy(0), progress=self.progress)

    def learn(self, number: int) -> dict[str, Any]:
        result = fit_flow(self.fitting(number), resume=True, progress=self.progress)
        if result["finished"]:
            write_chain(self.round(number), self.flows(number + 1))
        return result

    def keep(self, best: int, folder: Path) -> None:
        copies = [folder / each.parent.name for each in self.flows(best + 1)]
        for flow, copy in zip(self.flows(best + 1), copies, strict=True):
            shutil.copytree(flow / "weights", copy)
        write_chain(folder, copies)

    def about(self, best: int | None) -> dict[str, Any]:
        chain = [] if best is None else [each.relative_to(self.folder).as_posix() for each in self.flows(best + 1)]
        return {"checkpoint": self.policy(0), "objective": "flow matching", "flows": chain}


def ask(api: ImagesAPI, rows: Sequence[Row], folder: Path, generator: str, *, progress: bool = True) -> None:
    """Draw rows with an images API into `folder`, with a table as `generate` writes it.

    Each picture is written when it comes, under a name of its prompt and seed, and one that is there is not asked for again.
    Raises RunError and MissingExtraError as the API does.
    """
    paths = [folder / f"{key(row.prompt, row.seed):016x}.png" for row in rows]
    missing = [place for place, path in enumerate(paths) if not path.is_file()]
    writing = threading.Lock()
    with tqdm(total=len(missing), unit="picture", disable=not progress) as bar:

        def keep(place: int, picture: Image.Image) -> None:
            # One at a time: asking for the umask sets it for a moment, for all threads.
            with writing, atomic(paths[missing[place]]) as temporary:
                picture.save(temporary, format="PNG")
            bar.update()

        api.each([rows[place].prompt for place in missing], [rows[place].seed for place in missing], keep)
    lines = []
    for row, path in zip(rows, paths, strict=True):
        with Image.open(path) as picture:
            lines.append(table_line(path.name, picture, row.prompt, row.seed, {}, generator))
    write_text(folder / TABLE, "".join(lines))


def open_loop(config: ImproveConfig, progress: bool = True) -> Loop:
    """The loop of what learns. Raises ConfigError for settings that do not go with that, before anything is drawn."""
    flow = config.fit == "flow"
    if found := [name for name in (ALIGNING if flow else ("flow", "generator")) if _given(config, name)]:
        kept = "the section flow says how flows are fitted" if flow else "weights can only be aligned where they are at hand"
        raise ConfigError(
            f"fit is {config.fit}, and {' and '.join(found)} {'is' if len(found) == 1 else 'are'} for "
            f"fit={'weights' if flow else 'flow'}; {kept}, so leave out what is for the other, or set fit to it."
        )
    if not flow:
        loop = Loop(config, progress)
        loop.check()
        return loop
    if config.replay.rounds:
        raise ConfigError(
            f"replay.rounds is {config.replay.rounds}, and fit is flow: a round's flow goes on from pictures that those before "
            "it moved, and earlier pairs begin elsewhere; set it to 0."
        )
    if config.draw.when == "ahead":
        raise ConfigError(
            "draw.when is 'ahead', and fit is flow: pictures of an older chain are not those that the next flow is applied to; "
            "set it to in_turn."
        )
    if config.select.order in ("implicit", "potential"):
        raise ConfigError(
            f"select.order is {config.select.order!r}, which asks a policy's weights for margins, and fit is flow; set it to "
            "none, random or explicit."
        )
    told = [f"draw.{name}" for name in SAMPLING if getattr(config.draw, name) != Draw.model_fields[name].default]
    if config.generator is not None and told:
        raise ConfigError(f"{' and '.join(told)} cannot be set: a checkpoint is told that and an API is not; leave it out.")
    made = FlowLoop(config, progress)
    made.check()
    return made


def _given(config: ImproveConfig, name: str) -> bool:
    return getattr(config, name) != ImproveConfig.model_fields[name].default
