"""From the settings of a flow to parts that are ready to train: space, contexts, cached pairs, field."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from flowalign.data.audit import audit
from flowalign.data.batch import Batch
from flowalign.data.cache import LatentCache
from flowalign.data.cached import Cached
from flowalign.data.fill import fill
from flowalign.data.pairs import Item, PairDataset, PairStream, fixed_draws
from flowalign.data.readers import Comparisons, open_comparisons, scan, write_bad_rows
from flowalign.device import choose_workers
from flowalign.errors import ConfigError
from flowalign.flow.contexts import Classes, Contexts, Encoder, Nothing, Prompts
from flowalign.flow.domain import Domain, features, fit_domain
from flowalign.flow.field import Field, FieldSettings, make_field
from flowalign.flow.improve import Flow, open_space
from flowalign.flow.settings import FlowConfig
from flowalign.flow.spaces import Space
from flowalign.rng import key
from flowalign.runs.flow_fit import Material
from flowalign.runs.flow_pairs import write_pairs
from flowalign.sources import cache_folder, open_source, split
from flowalign.train.ranks import Ranks

PAIRS = "pairs.jsonl"
"""Comparisons that a run made itself from a score table."""


@dataclass(frozen=True)
class FlowParts:
    """What a flow is trained from."""

    config: FlowConfig
    space: Space
    source: dict[str, Any]
    """Where the autoencoder lies."""
    contexts: Contexts
    resolution: int
    field: Field
    train: PairDataset
    held_out: PairDataset | None
    held_out_source: Comparisons
    """Where the pictures of the held-out pairs are, or of all where none are held out."""
    material: Material
    summary: dict[str, Any]

    def domain(self) -> Domain | None:
        """Statistics of all distinct training pictures, chosen and rejected: a generator draws both."""
        quantile = self.config.domain.quantile
        if quantile is None:
            return None
        rows, seen = [], set[bytes]()
        for place in range(len(self.train)):
            fresh = [n for n, digest in enumerate(self.train.cached.pictures[place]) if digest.tobytes() not in seen]
            seen |= {digest.tobytes() for digest in self.train.cached.pictures[place]}
            if fresh:
                batch = self.train.__getitems__([Item(place, 0, place, self.train.cached.flips[0], False)])
                rows.append(features(batch.mean[0, fresh]))
        return fit_domain(torch.cat(rows), quantile, self.config.train.seed)

    def flow(self, device: torch.device, domain: Domain | None) -> Flow:
        """The trained flow."""
        config = self.config
        return Flow(
            self.field.eval(),
            self.space,
            self.contexts,
            domain,
            self.resolution,
            config.space.fit,
            config.solve,
            self.source,
            device,
        )


def prepare_flow(config: FlowConfig, accelerator: Accelerator, *, progress: bool = True) -> FlowParts:
    """Load, cache and build all parts of a flow. Raises UserErrors for what cannot be used."""
    ranks, device = Ranks(accelerator, config.train.timeout), accelerator.device
    ranks.agree(config.model_dump(mode="json"))
    folder = Path(config.output)
    source = _autoencoder(config)
    space = open_space(config.space.kind, source, device)
    comparisons = _open(config, folder, config.data.train, ranks)
    held, places, held_places = split(config.data, comparisons, config.train.seed)
    contexts = _contexts(config, comparisons, device)
    resolution, multiple = _resolution(config, space)
    settings = FieldSettings(
        (space.channels, resolution // space.factor, resolution // space.factor),
        contexts.kind,  # type: ignore[arg-type]
        contexts.size,
        config.field.width,
        config.field.levels,
        config.field.blocks,
    )
    cache = LatentCache(
        cache_folder(config.data.cache),
        space.fingerprint,
        contexts.fingerprint,
        resolution=resolution,
        checkpoint=str(source.get("autoencoder") or space.name),
    )
    encoder = Encoder(space, contexts, multiple)

    def cached(comparisons: Comparisons, places: Any, flips: tuple[bool, ...]) -> Cached:
        return fill(
            cache,
            comparisons,
            places,
            encoder,
            flips=flips,
            on_bad_row=config.data.on_bad_row,
            rewards=config.data.rewards,
            ranks=ranks,
            progress=progress and ranks.main,
        )

    parts = {"train": cached(comparisons, places, (False, True) if config.data.flip else (False,))}
    if len(held_places):
        parts["held_out"] = cached(held, held_places, (False,))
    contexts.release()
    sources = {"train": comparisons, "held_out": held}
    if ranks.main:
        write_bad_rows(folder / "bad_rows.jsonl", [row for part in parts.values() for row in part.bad])
    sets = {name: PairDataset(cache, part) for name, part in parts.items()}
    train, held_out = sets["train"], sets.get("held_out")
    summary = {
        **{name: audit(sources[name], part.indices) for name, part in parts.items()},
        "bad_rows": sum(len(part.bad) for part in parts.values()),
        "resolution": resolution,
        "sources": {"train": config.data.train or PAIRS, "validation": config.data.validation or "held out by prompt"},
    }
    made = make_field(settings, key(config.train.seed, "field"))
    about = {
        "field": config.field.model_dump(mode="json") | {"shape": list(settings.shape), "context": settings.context},
        "space": space.fingerprint,
        "contexts": contexts.fingerprint,
        "data": train.cached.about,
    }
    material = Material(_stream(config, accelerator, train), _fixed(config, held_out), train.cached.num_chosen, about)
    whole = held if held_out is not None else comparisons
    return FlowParts(config, space, source, contexts, resolution, made, train, held_out, whole, material, summary)


def check_flow(config: FlowConfig) -> None:
    """Raise what `prepare_flow` would of space, resolution and prompts, while there are no comparisons yet."""
    _resolution(config, open_space(config.space.kind, _autoencoder(config), "cpu"))
    if config.context.kind == "prompt":
        _prompts(config, torch.device("cpu"))


def _resolution(config: FlowConfig, space: Space) -> tuple[int, int]:
    """Side in pixels, and what it is a multiple of. Raises ConfigError."""
    resolution = config.data.resolution or space.resolution
    if resolution is None:
        raise ConfigError("data.resolution is missing, and the space does not say one; set it to the side of the pictures.")
    multiple = space.factor * 2 ** (config.field.levels - 1)
    if resolution % multiple:
        near = max(multiple, round(resolution / multiple) * multiple)
        raise ConfigError(
            f"data.resolution is {resolution}; a field of {config.field.levels} levels in {space.name} needs a multiple of "
            f"{multiple}, for example {near}, or fewer field.levels."
        )
    return resolution, multiple


def _stream(config: FlowConfig, accelerator: Accelerator, train: PairDataset) -> Any:
    def batches(position: int) -> Iterator[Batch]:
        stream = PairStream(
            train,
            config.train.seed,
            batch_size=config.train.batch_size * accelerator.num_processes,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            position=position,
            workers=choose_workers(config.data, accelerator.device),
            pin_memory=accelerator.device.type == "cuda",
        )
        return iter(stream)

    return batches


def _fixed(config: FlowConfig, held_out: PairDataset | None) -> Any:
    if held_out is None:
        return None
    draws = config.train.validation_draws
    return lambda draw: fixed_draws(held_out, config.train.batch_size, draws, draw)


def _autoencoder(config: FlowConfig) -> dict[str, Any]:
    if config.space.kind == "pixels":
        return {}
    if config.space.autoencoder is not None:
        return {"autoencoder": config.space.autoencoder}
    if config.model is None:
        raise ConfigError(
            "space.kind 'latents' needs an autoencoder: set space.autoencoder, or model.checkpoint to take the one it has."
        )
    return {"autoencoder": config.model.checkpoint, "revision": config.model.revision, "variant": config.model.variant}


def _contexts(config: FlowConfig, comparisons: Comparisons, device: torch.device) -> Contexts:
    match config.context.kind:
        case "none":
            return Nothing()
        case "class":
            good, _ = scan(comparisons)
            return Classes(sorted({comparisons[place].prompt for place in good}))
    return _prompts(config, device)


def _prompts(config: FlowConfig, device: torch.device) -> Prompts:
    if config.model is None:
        raise ConfigError(
            "context.kind 'prompt' needs model.checkpoint, whose text encoder reads them; or set context.kind=none."
        )
    return Prompts(config.model, device)


def _open(config: FlowConfig, folder: Path, source: str, ranks: Ranks) -> Comparisons:
    """The comparisons named, or those made from scores."""
    data = config.data
    if (config.scores is None) == (not source):
        raise ConfigError("set either data.train, a source of comparisons, or scores.table, to make them from; and not both.")
    if config.scores is not None:
        if ranks.main:
            write_pairs(config.scores, folder / PAIRS, config.seed)
        ranks.wait()
        return open_comparisons(folder / PAIRS, tie_policy=data.tie_policy, order=data.order, limit=data.limit)
    return open_source(data, source, data.limit)
