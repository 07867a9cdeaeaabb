"""`Survey`: comparisons and all their pictures, each read once: what the checks of an audit look at."""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from flowalign.data.images import decode
from flowalign.data.likeness import CROPS, SMALL, Look, Looks, look
from flowalign.data.readers import BadRow
from flowalign.data.records import Comparison, ImageRef
from flowalign.errors import DataError


class Vote(NamedTuple):
    """One comparison, its pictures by number."""

    place: int
    """In the comparisons."""
    source: str
    """Where it was read, as in "votes.jsonl:17"."""
    prompt: str
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    preference: float
    annotator: str | None
    scores: dict[str, tuple[float, ...]]
    """Reward name -> one score per picture, chosen ones first; {} where the comparison carries none."""
    weights: tuple[tuple[str, float], ...] = ()
    """Of objectives, under which the vote holds."""

    @property
    def pictures(self) -> tuple[int, ...]:
        return self.chosen + self.rejected

    @property
    def question(self) -> str:
        """What the vote answers: the prompt, and the weights of objectives under which it does."""
        said = ", ".join(f"{name} {value:g}" for name, value in self.weights)
        return f"{self.prompt} ({said})" if said else self.prompt

    @property
    def is_tie(self) -> bool:
        return self.preference == 0.5


class Shown(NamedTuple):
    """A picture to show for a finding."""

    image: ImageRef
    prompt: str
    """Of the first comparison that has it."""
    size: tuple[int, int]
    """Width and height in pixels."""


@dataclass(frozen=True)
class Survey:
    """What was read of a source. Pictures are numbered by their names in it; equal content has one `content` number."""

    name: str
    rows: int
    """Comparisons that the source holds."""
    votes: tuple[Vote, ...]
    bad: tuple[BadRow, ...]
    """Comparisons that cannot be used."""
    refs: tuple[ImageRef, ...]
    digests: tuple[str | None, ...]
    """sha256 of each picture's encoded bytes, in hexadecimal; None where it cannot be decoded."""
    content: NDArray[np.int64]
    """`[P]` equal for pictures with equal bytes; -1 where a picture cannot be decoded."""
    why: dict[int, str]
    """Why a picture cannot be decoded."""
    sizes: NDArray[np.int64]
    """`[P, 2]` width and height in pixels, upright; 0 where it cannot be decoded."""
    hashes: NDArray[np.uint64]
    """`[P, crops]`, see `data.likeness.Look`."""
    small: NDArray[np.uint8]
    """`[P, crops, SMALL, SMALL, 3]`, on disk."""

    def readable(self, vote: Vote) -> bool:
        """Whether all its pictures can be decoded."""
        return all(self.content[number] >= 0 for number in vote.pictures)

    def shown(self, number: int) -> Shown:
        """That picture, to be shown."""
        prompt = next(vote.prompt for vote in self.votes if number in vote.pictures)
        width, height = map(int, self.sizes[number])
        return Shown(self.refs[number], prompt, (width, height))

    def looks(self) -> Looks:
        """Each content once, by its first picture."""
        content, first = np.unique(self.content, return_index=True)
        return Looks(self.hashes, self.small, first[content >= 0])


class _Seen(NamedTuple):
    digest: str
    size: tuple[int, int]
    look: Look


def survey(
    comparisons: Sequence[Comparison], name: str, *, limit: int | None = None, workers: int = 2, progress: bool = False
) -> Survey:
    """Read comparisons and decode every picture once, in `workers` threads. Nothing that is broken ends it.

    limit: the first so many comparisons. Held in memory are the votes and some 100 bytes a picture.
    """
    count = len(comparisons) if limit is None else min(limit, len(comparisons))
    votes: list[Vote] = []
    bad: list[BadRow] = []
    numbers: dict[str, int] = {}
    refs: list[ImageRef] = []
    for place in tqdm(range(count), desc=f"reading {name}", unit="row", disable=not progress, leave=False):
        try:
            comparison = comparisons[place]
        except DataError as error:
            bad.append(BadRow(place, str(error)))
            continue
        pictures = []
        for image in comparison.images:
            number = numbers.setdefault(image.name, len(refs))
            if number == len(refs):
                refs.append(image)
            pictures.append(number)
        k, preference = comparison.num_chosen, comparison.preference
        sides = tuple(pictures[:k]), tuple(pictures[k:])
        scores = {reward: tuple(values) for reward, values in (comparison.scores or {}).items()}
        if preference < 0.5:  # the other side is preferred
            sides, preference = sides[::-1], 1 - preference
            scores = {reward: values[k:] + values[:k] for reward, values in scores.items()}
        under = tuple(sorted((comparison.objective_weights or {}).items()))
        votes.append(Vote(place, comparison.source, comparison.prompt, *sides, preference, comparison.annotator, scores, under))

    size = len(refs)
    digests: list[str | None] = [None] * size
    why: dict[int, str] = {}
    sizes, hashes = np.zeros((size, 2), dtype=np.int64), np.zeros((size, len(CROPS)), dtype=np.uint64)
    with tempfile.TemporaryFile() as file:  # unlinked already: the array keeps it alive, and it goes with it
        shape = (size, len(CROPS), SMALL, SMALL, 3)
        small = np.memmap(file, dtype=np.uint8, mode="w+", shape=shape) if size else np.zeros(shape, dtype=np.uint8)
    bar = tqdm(total=size, desc=f"looking at {name}", unit="picture", disable=not progress, leave=False)
    with bar:
        for number, seen in _seen(refs, workers):
            if isinstance(seen, str):
                why[number] = seen
            else:
                digests[number], sizes[number], hashes[number] = seen.digest, seen.size, seen.look.hashes
                small[number] = seen.look.small
            bar.update()
    known = {digest: place for place, digest in enumerate(dict.fromkeys(each for each in digests if each is not None))}
    content = np.array([-1 if digest is None else known[digest] for digest in digests], dtype=np.int64)
    return Survey(name, count, tuple(votes), tuple(bad), tuple(refs), tuple(digests), content, why, sizes, hashes, small)


def _seen(refs: Sequence[ImageRef], workers: int) -> Iterator[tuple[int, _Seen | str]]:
    """Pictures in order; a few are read ahead."""
    ahead: deque[tuple[int, Future[_Seen | str]]] = deque()
    lock = threading.Lock()
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for number, ref in enumerate(refs):
            ahead.append((number, pool.submit(_see, ref, lock)))
            if len(ahead) > 8 * workers:
                place, future = ahead.popleft()
                yield place, future.result()
        while ahead:
            place, future = ahead.popleft()
            yield place, future.result()


def _see(ref: ImageRef, lock: threading.Lock) -> _Seen | str:
    try:
        with lock:  # sources are read by one thread at a time, pictures are decoded by all
            data = ref.read()
        picture = decode(data)
    except DataError as error:
        return str(error)
    return _Seen(hashlib.sha256(data).hexdigest(), picture.size, look(picture))
