"""`Flow`: a trained flow, ready to be applied to pictures; `Chain`: several, one after the other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowalign import config
from flowalign.data.images import flat
from flowalign.errors import CheckpointError, DataError, reason
from flowalign.files import write_text
from flowalign.flow.contexts import Contexts, open_contexts
from flowalign.flow.domain import Domain, load_domain
from flowalign.flow.field import Field, load_field, read_about, save_field
from flowalign.flow.settings import Solve
from flowalign.flow.solve import guided, solve, there_and_back
from flowalign.flow.spaces import LatentSpace, PixelSpace, Space, open_autoencoder
from flowalign.flow.tiles import Tiling, cut, joined, tiling

CHAIN = "chain.json"
"""In a folder of several flows: which, the first to be applied first."""


@dataclass(frozen=True)
class Applied:
    """Pictures after a flow, and what was done to each."""

    pictures: list[Image.Image]
    """Of the sizes they came in."""
    strength: list[float]
    """How far each was moved: what was asked for, less where a picture is unlike those trained on."""
    distance: list[float | None]
    """From the pictures trained on; None where that is not watched."""
    limit: float | None
    """Distance beyond which strength falls."""
    evaluations: int
    """Of the field, for each picture."""
    error: list[float] | None = None
    """Share of the way that is lost by going there and back; None where that was not asked for."""

    def words(self, place: int) -> str | None:
        """One sentence on a picture that was moved less than asked for; None for others."""
        distance = self.distance[place]
        if distance is None or self.limit is None or distance <= self.limit:
            return None
        return (
            f"unlike the pictures trained on (distance {distance:.2f}, full strength up to {self.limit:.2f}): moved with "
            f"strength {self.strength[place]:.2f}"
        )


@dataclass(frozen=True)
class Flow:
    """A field, the space it moves pictures in, and what it is told."""

    field: Field
    space: Space
    contexts: Contexts
    domain: Domain | None
    resolution: int
    """Side in pixels of the pictures it was trained on."""
    fit: str
    """How pictures of other sizes are cut, see `tiles.tiling`."""
    solve: Solve
    """How it is applied unless told otherwise."""
    source: dict[str, Any]
    """Where the autoencoder lies."""
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def reads_prompts(self) -> bool:
        """Whether it is told what a picture shows."""
        return self.contexts.kind != "none"

    @property
    def solves(self) -> tuple[Solve, ...]:
        """How it is applied, as a chain says it of each of its flows."""
        return (self.solve,)

    def with_solve(self, options: Mapping[str, Any]) -> Flow:
        """The same with these values of `solve` in place of its own. Raises ConfigError for one out of range."""
        tree = self.solve.model_dump(mode="json") | dict(options)
        return replace(self, solve=config.parse_tree(Solve, tree, "the options"))

    def apply(
        self,
        pictures: Sequence[Image.Image],
        prompts: Sequence[str] | None = None,
        *,
        solve: Solve | None = None,
        diagnose: bool = False,
    ) -> Applied:
        """Move pictures (any mode and size) along the flow.

        prompts: one a picture, or None where the flow is told nothing. solve: how, instead of `self.solve`. diagnose: also
        measure the error of the steps, by going back, which takes three times as long. Raises DataError for a flow that is told
        prompts and gets none, RunError as `solve` does.
        """
        settings = solve or self.solve
        if prompts is None and self.reads_prompts:
            raise DataError("this flow is told what a picture shows; give one prompt for each picture.")
        if prompts is not None and len(prompts) != len(pictures):
            raise DataError(f"there are {len(pictures)} pictures and {len(prompts)} prompts; give one prompt for each picture.")
        before = [np.array(flat(picture)) for picture in pictures]
        tilings = [tiling(*pixels.shape[:2], self.resolution, self.fit) for pixels in before]
        z = self._encode(before, tilings, settings.batch_size)
        owner = [place for place, tiles in enumerate(tilings) for _ in tiles.corners]
        strength, distance = self._strengths(z, owner, len(before), settings.strength)
        context = None
        if prompts and self.reads_prompts:
            context = self.contexts.encode(prompts)[torch.tensor(owner)]
        reach = strength[torch.tensor(owner, dtype=torch.int64)]
        residuals, evaluations, errors = self._moved(z, context, reach, settings, diagnose)
        after, start = [], 0
        for pixels, tiles in zip(before, tilings, strict=True):
            end = start + len(tiles.corners)
            residual = joined(residuals[start:end], tiles).permute(1, 2, 0).double().cpu().numpy()
            after.append(Image.fromarray((pixels + 255 * residual).round().clip(0, 255).astype(np.uint8)))
            start = end
        lost = None
        if errors is not None:
            lost = [max(float(errors[row]) for row, each in enumerate(owner) if each == place) for place in range(len(before))]
        limit = None if self.domain is None else self.domain.limit
        return Applied(after, strength.tolist(), distance, limit, evaluations, lost)

    def _encode(self, pictures: Sequence[np.ndarray], tilings: Sequence[Tiling], size: int) -> Tensor:
        """Squares of all pictures as places `[T, C, h, w]`."""
        rows = [
            cut(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, tiles)
            for pixels, tiles in zip(pictures, tilings, strict=True)
        ]
        if not rows:
            return torch.zeros(0, *self.field.settings.shape)
        squares = torch.cat(rows)
        return torch.cat([self.space.encode(part.clamp(0, 1).to(self.device)) for part in squares.split(size)])

    def _strengths(self, z: Tensor, owner: Sequence[int], count: int, asked: float) -> tuple[Tensor, list[float | None]]:
        """Each picture's strength `[n]` and distance: that of the square of it which is least like those trained on."""
        if self.domain is None or not count:
            return torch.full((count,), asked, dtype=torch.float64), [None] * count
        found = self.domain.distance(z)
        rows = torch.tensor(owner)
        worst = torch.stack([found[rows == place].max() for place in range(count)])
        return asked * self.domain.factor(worst), worst.tolist()

    @torch.no_grad()
    def _moved(
        self, z: Tensor, context: Tensor | None, strength: Tensor, settings: Solve, diagnose: bool
    ) -> tuple[Tensor, int, Tensor | None]:
        """Residuals `[T, 3, side, side]`, evaluations, and the errors of the steps `[T]`."""
        if not bool(strength.any()):  # nothing moves: decoding twice would say so at a price
            still = torch.zeros(len(z), 3, self.resolution, self.resolution)
            return still, 0, torch.zeros(len(z)) if diagnose else None
        residuals, errors, evaluations = [], [], 0
        for start in range(0, len(z), settings.batch_size):
            part = slice(start, start + settings.batch_size)
            places, reach = z[part].to(self.device), strength[part].to(self.device)
            told = None if context is None else context[part].to(self.device)
            velocity = guided(self.field, told, settings.guidance)
            with self.autocast():
                found = solve(velocity, places, settings, reach)
                if diagnose:
                    errors.append(there_and_back(velocity, places, settings, reach))
            residuals.append(self.space.residual(places, found.end))
            evaluations = max(evaluations, found.evaluations)
        return torch.cat(residuals), evaluations, torch.cat(errors) if errors else None

    def save(self, folder: Path) -> None:
        """Write what `load_flow` reads: the field, the domain, and where autoencoder and text encoder lie."""
        about = {
            "space": {"kind": self.space.name, "fingerprint": self.space.fingerprint, **self.source},
            "context": self.contexts.about() | {"fingerprint": self.contexts.fingerprint},
            "resolution": self.resolution,
            "fit": self.fit,
            "solve": self.solve.model_dump(mode="json"),
        }
        if self.domain is not None:
            self.domain.save(folder)
        save_field(self.field, folder, {"flow": about})


@dataclass(frozen=True)
class Chain:
    """Flows one after the other, each fitted to pictures that those before it had moved."""

    flows: tuple[Flow, ...]
    """At least one."""

    @property
    def solves(self) -> tuple[Solve, ...]:
        """How each is applied unless told otherwise."""
        return tuple(flow.solve for flow in self.flows)

    @property
    def reads_prompts(self) -> bool:
        """Whether any is told what a picture shows."""
        return any(flow.reads_prompts for flow in self.flows)

    def with_solve(self, options: Mapping[str, Any]) -> Chain:
        """The same with these values of `solve` in place of each flow's own. Raises ConfigError for one out of range."""
        return Chain(tuple(flow.with_solve(options) for flow in self.flows))

    def apply(
        self,
        pictures: Sequence[Image.Image],
        prompts: Sequence[str] | None = None,
        *,
        solve: Solve | None = None,
        diagnose: bool = False,
    ) -> Applied:
        """Move pictures along all flows, as `Flow.apply` does along one: along each in its own way, or in that of `solve`.

        A picture's strength is the least of any flow; its distance is the largest, in units of that flow's limit; evaluations
        are summed, and its error is the largest of any flow.
        """
        found, now = list[Applied](), list(pictures)
        for flow in self.flows:
            found.append(flow.apply(now, prompts, solve=solve, diagnose=diagnose))
            now = found[-1].pictures
        places, watched = range(len(now)), [each for each in found if each.limit is not None]
        far = [max(((each.distance[n] or 0.0) / (each.limit or 1.0) for each in watched), default=None) for n in places]
        return Applied(
            now,
            [min(each.strength[n] for each in found) for n in places],
            far,
            1.0 if watched else None,
            sum(each.evaluations for each in found),
            [max(each.error[n] for each in found if each.error is not None) for n in places] if diagnose else None,
        )


def write_chain(folder: Path, flows: Sequence[Path]) -> None:
    """Make `folder` a chain of flows that `load_flow` reads; it names their folders by the way from there to them."""
    names = [Path(os.path.relpath(flow, folder)).as_posix() for flow in flows]
    write_text(folder / CHAIN, json.dumps({"flows": names}, indent=1) + "\n")


def open_space(kind: str, source: dict[str, Any], device: torch.device | str) -> Space:
    """A space by its kind; source: `autoencoder`, `revision`, `variant` of latents. Raises CheckpointError."""
    if kind == "pixels":
        return PixelSpace()
    name = source["autoencoder"]
    made = open_autoencoder(name, revision=source.get("revision"), variant=source.get("variant"))
    return LatentSpace(made, name).to(device)


def load_flow(
    run: str | Path,
    *,
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Flow | Chain:
    """The flow of a run folder, or of its `weights` folder, or the chain of flows there. Raises CheckpointError.

    Autoencoder and text encoder are loaded from where they lay when the flow was trained, and must be the same still.
    """
    folder, opened = _weights(Path(run)), dict[str, Any]()
    if not (folder / CHAIN).is_file():
        return _load(folder, device, autocast, opened)
    try:
        names = [str(name) for name in json.loads((folder / CHAIN).read_text(encoding="utf-8"))["flows"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{folder / CHAIN} cannot be read ({reason(error)}); make it again or copy it.") from error
    if not names:
        raise CheckpointError(f"{folder / CHAIN} names no flow; make it again or copy it.")
    return Chain(tuple(_load(_weights(folder / name), device, autocast, opened) for name in names))


def _weights(run: Path) -> Path:
    return run / "weights" if (run / "weights").is_dir() else run


def _load(
    folder: Path,
    device: torch.device | str,
    autocast: Callable[[], AbstractContextManager[Any]],
    opened: dict[str, Any],
) -> Flow:
    """One flow. opened: autoencoders and text encoders by what is said of them; flows of a chain share them."""
    field, about = load_field(folder, device), read_about(folder).get("flow")
    if not isinstance(about, dict):
        raise CheckpointError(f"{folder} holds a field but no flow of pictures; load it with flowalign.flow.field.load_field.")
    source = {name: value for name, value in about["space"].items() if name not in ("kind", "fingerprint")}
    spaces, told = (json.dumps(about[part], sort_keys=True) for part in ("space", "context"))
    space = opened.get(spaces) or open_space(about["space"]["kind"], source, device)
    contexts = opened.get(told) or open_contexts(about["context"], device)
    for name, now, then in (
        ("the autoencoder", space.fingerprint, about["space"]["fingerprint"]),
        ("the text encoder", contexts.fingerprint, about["context"]["fingerprint"]),
    ):
        if now != then:
            raise CheckpointError(
                f"{name} that {folder} was trained with has changed since (fingerprint {then}, now {now}); restore it, or fit "
                "the flow again."
            )
    opened |= {spaces: space, told: contexts}
    return Flow(
        field,
        space,
        contexts,
        load_domain(folder),
        int(about["resolution"]),
        str(about["fit"]),
        Solve(**about["solve"]),
        source,
        torch.device(device),
        autocast,
    )
