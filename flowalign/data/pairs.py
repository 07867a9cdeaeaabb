"""Cached comparisons as batches: `PairStream`, endless and addressed by position, and `sequential`, each row once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from flowalign.data.batch import Batch, Conditioning
from flowalign.data.cache import LatentCache, distinct
from flowalign.data.cached import Cached
from flowalign.data.records import key63
from flowalign.errors import ConfigError, DataError
from flowalign.rng import Keyed

MEMORY = 2 * 2**30
UNKNOWN, BROKEN = -2, -1
"""In the place of a comparison's index: it was not prepared, or cannot be."""


class Item(NamedTuple):
    """One comparison as it goes into a batch, all decisions made."""

    place: int
    """Place in the PairDataset."""
    draw: int
    position: int
    flip: bool
    """Mirror all pictures of the comparison."""
    drop: bool
    """Give the empty prompt instead of the comparison's own, and no objective weights."""
    bare: bool = False
    """Give no objective weights."""


class PairDataset(Dataset[Batch]):
    """Latents and conditioning of cached comparisons. Nothing in it is random: an Item says what is wanted.

    Everything is held in memory if that takes no more than `memory` bytes (0: never), otherwise read when asked for.
    Raises DataError if an entry is missing or damaged.
    """

    def __init__(
        self,
        cache: LatentCache,
        cached: Cached,
        *,
        users: Sequence[str] = (),
        judge: str | None = None,
        by_picture: bool = False,
        memory: int = MEMORY,
        progress: bool = False,
    ) -> None:
        """users: who a policy knows; instead of objective weights, batches then have 1 at the place of who judged and 0 at all
        others. judge: who judged everything, whatever the rows say. by_picture: objective weights are each picture's own.
        """
        self.cached, self._cache, self.users, self._by_picture = cached, cache, tuple(users), by_picture
        known = {name: place for place, name in enumerate(users)}
        self._user = torch.tensor([known.get(judge or name, -1) for name in cached.annotators])[cached.annotator]
        unique, place = distinct(cached.pictures)
        self._digests = unique
        self._picture = torch.from_numpy(place)
        self._prompts = (*cached.prompts, "")  # the last one is what caption dropout gives
        self._preference, self._weight = torch.from_numpy(cached.preference), torch.from_numpy(cached.weight)
        self._scores, self._grades = torch.from_numpy(cached.scores), torch.from_numpy(cached.grades)
        names = np.array([-1 if name == "" else key63(name) for name in cached.annotators])
        self._annotators = names[cached.annotator].tolist()
        self._weights = torch.from_numpy(cached.objective_weights)
        self._in_words = bool((cached.told != cached.prompt).any())
        self._held: dict[str, Tensor] | None = None  # of each variant and picture, by the names of Batch
        self._conditioning: Conditioning | None = None
        entry, prompt = self._latents(0, cached.flips[0]), cache.read_prompt(cache.prompt_path(""))
        size = sum(tensor.nbytes for tensor in entry.values()) * len(unique) * len(cached.flips)
        size += sum(tensor.nbytes for tensor in prompt.values()) * len(self._prompts)
        if size <= memory:
            self._load(entry, progress)

    def __len__(self) -> int:
        return len(self.cached)

    @property
    def resolution(self) -> int:
        """Side of the pictures in pixels."""
        return self._cache.resolution

    @property
    def in_memory(self) -> bool:
        return self._held is not None

    def __getitem__(self, item: Item) -> Batch:
        return self.__getitems__([item])

    def __getitems__(self, items: Sequence[Item]) -> Batch:
        """The batch of these items, in this order; the name is the one that DataLoader asks for."""
        index = torch.tensor([item.place for item in items])
        pictures, flips = self._picture[index], [item.flip for item in items]
        prompts = [len(self._prompts) - 1 if item.drop else int(self.cached.prompt[item.place]) for item in items]
        bare = torch.tensor([item.drop or item.bare for item in items])
        if self._held is not None:
            variants = torch.tensor([self.cached.flips.index(flip) for flip in flips]).unsqueeze(1)
            parts = {name: part[variants, pictures] for name, part in self._held.items()}
        else:
            rows = [self._latents(int(each), flip) for row, flip in zip(pictures, flips, strict=True) for each in row]
            stacks = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            parts = {name: stack.view(*pictures.shape, *stack.shape[1:]) for name, stack in stacks.items()}
        told = [int(self.cached.told[item.place]) for item in items]
        told = [plain if none else each for plain, each, none in zip(prompts, told, bare, strict=True)]
        return Batch(
            **parts,
            conditioning=self._conditionings(prompts),
            preference=self._preference[index],
            weight=self._weight[index],
            ids=tuple(int(self.cached.ids[item.place]) for item in items),
            draws=tuple(item.draw for item in items),
            positions=tuple(item.position for item in items),
            scores=self._scores[index],
            grades=self._grades[index],
            annotators=tuple(self._annotators[item.place] for item in items),
            objective_weights=self._weighed(index, bare),
            policy_conditioning=self._conditionings(told) if self._in_words else None,
        )

    def _weighed(self, index: Tensor, bare: Tensor) -> Tensor | None:
        if self.users:
            return one_hot(self._user[index].masked_fill(bare, -1) + 1, len(self.users) + 1)[:, 1:].float()
        if not self._weights.shape[1]:
            return None
        weights = self._weights[index].masked_fill(bare[:, None], 0)
        return weights.unflatten(1, (self._picture.shape[1], -1)) if self._by_picture else weights

    def _conditionings(self, prompts: Sequence[int]) -> Conditioning:
        if self._conditioning is not None:
            return self._conditioning[torch.tensor(prompts)]
        return Conditioning.stack([self._prompt(prompt) for prompt in prompts])

    def _latents(self, picture: int, flip: bool) -> dict[str, Tensor]:
        """By the names of Batch; a picture without a mask counts everywhere where others have one."""
        entry = self._cache.read_image(self._cache.image_path(self._digests[picture].tobytes(), flip))
        if "mask" in self.cached.attached and "mask" not in entry:
            entry["mask"] = torch.ones(entry["mean"].shape[-2:])
        return entry

    def _prompt(self, prompt: int) -> dict[str, Tensor]:
        return self._cache.read_prompt(self._cache.prompt_path(self._prompts[prompt]))

    def _load(self, first: Mapping[str, Tensor], progress: bool) -> None:
        count = len(self.cached.flips), len(self._digests)
        held = {name: torch.empty(*count, *tensor.shape) for name, tensor in first.items()}
        for picture in tqdm(range(len(self._digests)), desc="loading cached latents", unit="picture", disable=not progress):
            for variant, flip in enumerate(self.cached.flips):
                for name, tensor in self._latents(picture, flip).items():
                    held[name][variant, picture] = tensor
        self._conditioning = Conditioning.stack([self._prompt(prompt) for prompt in range(len(self._prompts))])
        self._held = held


class PairStream:
    """Batches without end. Position p holds comparison `permutation("order", epoch)[p mod n]` with epoch = p div n.

    Of a source of which only a part was prepared, the permutation is one of all N that there are, without those that have a
    broken picture; an order does not depend on what was prepared, but the stream ends where what comes next was not.

    Order, mirroring and caption dropout are keyed by (seed, comparison, epoch), so a stream does not depend on batch
    size, ranks, workers, or where it was taken up again; all pictures of a comparison share one decision. If `cached`
    has both variants of its pictures, each draw is mirrored with probability 1/2.

    With `cycle` K, epoch e repeats draw e mod K of every comparison in all that is keyed by draws, time included: its
    `positions` are then place·K + draw, so that a comparison's K times stay what they are in every order.
    """

    def __init__(
        self,
        dataset: PairDataset,
        seed: int,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        position: int = 0,
        caption_dropout: float = 0.0,
        weights_dropout: float = 0.0,
        cycle: int | None = None,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """batch_size: comparisons per batch over all ranks; rank r gets the r-th of world_size equal parts.
        position: where to start, in comparisons over all ranks. caption_dropout: probability in [0, 1] of the empty prompt;
        weights_dropout: of no objective weights, which the empty prompt never has.
        Raises ConfigError if the ranks cannot share a batch evenly, or for a probability or position that is none.
        """
        if batch_size < 1 or batch_size % world_size:
            raise ConfigError(f"batch_size is {batch_size}; it must be a positive multiple of the {world_size} process(es)")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank is {rank}; with {world_size} process(es) it must be 0 to {world_size - 1}")
        if not 0 <= caption_dropout <= 1:
            raise ConfigError(f"caption_dropout is {caption_dropout}; it must be a probability from 0 to 1")
        if position < 0:
            raise ConfigError(f"position is {position}; a stream starts at 0 or later")
        self.dataset, self.batch_size, self.position = dataset, batch_size, position
        self._keyed, self._dropout, self._weights_dropout = Keyed(seed), caption_dropout, weights_dropout
        self._rank, self._world_size, self._workers, self._pin = rank, world_size, workers, pin_memory
        self._cycle = cycle

    def __iter__(self) -> Iterator[Batch]:
        """From the starting position; each call starts there anew. Raises DataError after the last that was prepared."""
        loader: DataLoader[Batch] = DataLoader(
            self.dataset,
            batch_sampler=self._items(),
            collate_fn=_same,
            generator=torch.Generator(),  # or making the iterator would draw from the global one
            num_workers=self._workers,
            pin_memory=self._pin,
        )
        yield from loader
        raise DataError(
            f"only the {len(self.dataset)} comparisons were prepared that so many steps see, and a place after them was asked "
            "for; raise train.steps."
        )

    def covering(self, draw: int, places: range) -> Iterator[Batch]:
        """The comparisons at these places, in order, at one of their draws, in batches of this rank's size.

        The last one is filled up with those that come next, after the last comparison with the first ones.
        """
        share, count = self.batch_size // self._world_size, len(self.dataset)
        for start in range(places.start, places.stop, share):
            batch = [place % count for place in range(start, start + share)]
            yield self.dataset.__getitems__([self._item(place, place, draw) for place in batch])

    def _items(self) -> Iterator[list[Item]]:
        share = self.batch_size // self._world_size
        start, orders = self.position + self._rank * share, _Orders(self._keyed, self.dataset.cached)
        while None not in (found := [orders.at(place) for place in range(start, start + share)]):
            yield [self._item(start + place, *each) for place, each in enumerate(found) if each is not None]
            start += self.batch_size

    def _item(self, position: int, index: int, epoch: int) -> Item:
        draw = epoch % self._cycle if self._cycle else epoch
        key = [int(self.dataset.cached.ids[index])], [draw]
        flips = self.dataset.cached.flips
        flip = flips[0] if len(flips) == 1 else float(self._keyed.uniform("flip", *key)) < 0.5
        drop = self._dropout > 0 and float(self._keyed.uniform("caption-dropout", *key)) < self._dropout
        bare = self._weights_dropout > 0 and float(self._keyed.uniform("weights-dropout", *key)) < self._weights_dropout
        return Item(index, draw, index * self._cycle + draw if self._cycle else position, flip, drop, bare)


class _Orders:
    """The order of the epoch that was asked for last; ranks and batches walk forward."""

    def __init__(self, keyed: Keyed, cached: Cached) -> None:
        self._keyed, self._cached, self._epoch = keyed, cached, -1
        self._order = np.empty(0, np.int64)
        among = cached.among
        self._whole = among is None or len(cached) + len(among.broken) == among.total

    def at(self, position: int) -> tuple[int, int] | None:
        """Index and epoch at a position; None after the last that was prepared."""
        epoch, place = divmod(position, len(self._cached)) if self._whole else (0, position)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._made(epoch)
        return (int(self._order[place]), epoch) if place < len(self._order) else None

    def _made(self, epoch: int) -> np.ndarray:
        among = self._cached.among
        if among is None:
            return self._keyed.permutation("order", epoch, len(self._cached)).numpy()
        index = np.full(among.total, UNKNOWN)
        index[among.place], index[among.broken] = np.arange(len(self._cached)), BROKEN
        order = index[self._keyed.permutation("order", epoch, among.total).numpy()]
        unknown = np.flatnonzero(order == UNKNOWN)
        order = order[: unknown[0]] if len(unknown) else order
        return order[order != BROKEN]


def sequential(dataset: PairDataset, batch_size: int, places: range | None = None) -> Iterator[Batch]:
    """Every comparison once, in order, draw 0, own prompt, upright if that is cached; the last batch may be smaller.

    places: those from the start of one batch to the end of another.
    """
    flip = False not in dataset.cached.flips
    places = range(len(dataset)) if places is None else places
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        yield dataset.__getitems__([Item(place, 0, place, flip, False) for place in batch])


def fixed_draws(dataset: PairDataset, batch_size: int, draws: int, draw: int, places: range | None = None) -> Iterator[Batch]:
    """`sequential` at draw `draw` of `draws`, with positions place·draws + draw."""
    for batch in sequential(dataset, batch_size, places):
        positions = tuple(place * draws + draw for place in batch.positions)
        yield replace(batch, draws=(draw,) * len(batch), positions=positions)


def _same(batch: Any) -> Any:  # the dataset has made the batch already
    return batch
