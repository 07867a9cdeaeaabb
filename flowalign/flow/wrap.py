"""Anything that draws pictures from prompts and seeds, and the same with a flow behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from flowalign.errors import DataError, RunError
from flowalign.families.sampling import SamplerSettings, sample
from flowalign.flow.folders import list_pictures
from flowalign.flow.improve import Chain, Flow, load_flow
from flowalign.flow.settings import Solve


class Generator(Protocol):
    """Draws one picture for each prompt and seed."""

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]: ...


@dataclass(frozen=True)
class Pipeline:
    """A diffusers pipeline, such as `families.loading.open_checkpoint` gives; a picture depends on its own seed only."""

    pipeline: Any
    settings: SamplerSettings = field(default_factory=SamplerSettings)
    batch_size: int = 4

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        drawn = sample(self.pipeline, prompts, seeds, self.settings, batch_size=self.batch_size, progress=False)
        return [picture for _, picture in drawn]


@dataclass(frozen=True)
class Function:
    """Any function of one prompt and one seed."""

    function: Callable[[str, int], Image.Image]

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        return [self.function(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]


class Folder:
    """Pictures that lie in a folder with a `metadata.jsonl` of `file_name`, `prompt` and `seed`, as `generate` writes it."""

    def __init__(self, folder: str | Path) -> None:
        """Raises DataError as `list_pictures` does."""
        self.folder = Path(folder)
        self._pictures = {(each.prompt, each.row.get("seed")): each for each in list_pictures(folder)}

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """Raises DataError for a prompt and seed that the folder has no picture of."""
        out = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            picture = self._pictures.get((prompt, seed))
            if picture is None:
                raise DataError(f"{self.folder} has no picture of prompt {prompt!r} with seed {seed}; draw it or leave it out.")
            out.append(picture.read())
        return out


@dataclass(frozen=True)
class Wrapped:
    """A generator with a flow behind it; itself a generator."""

    generator: Generator
    flow: Flow | Chain

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """Raises RunError for a generator that gives another number of pictures than it was asked for."""
        drawn = self.generator(prompts, seeds)
        if len(drawn) != len(prompts):
            raise RunError(f"the generator gave {len(drawn)} pictures for {len(prompts)} prompts; it must give one each.")
        return self.flow.apply(drawn, prompts).pictures

    def with_strength(self, strength: float) -> Wrapped:
        """The same, its pictures moved so far, by each flow of a chain; 0 is the generator itself.

        Raises ConfigError for what is not from 0 to 1.
        """
        return replace(self, flow=self.flow.with_solve({"strength": strength}))


def wrap(generator: Generator, flow: Flow | Chain | str | Path, *, solve: Solve | None = None) -> Wrapped:
    """`generator` with a flow behind it, or a chain of them, given or by its run folder.

    solve: how it, or each of a chain, is applied, instead of in its own way. Raises CheckpointError for a folder that holds no
    flow.
    """
    ready = flow if isinstance(flow, Flow | Chain) else load_flow(flow)
    return Wrapped(generator, ready if solve is None else ready.with_solve(solve.model_dump(mode="json")))
