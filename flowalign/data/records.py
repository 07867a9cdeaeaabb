"""`Comparison`: a prompt and N pictures, best first; and `ImageRef`: where a picture's bytes lie until somebody asks."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from flowalign.data.remote import Place, Remote
from flowalign.data.weights import check_weights
from flowalign.errors import DataError

TIE = 0.5


@dataclass(frozen=True)
class ImageRef(ABC):
    """Where a picture's encoded bytes lie; cheap to hold."""

    name: str
    """The picture's identity inside its data source, which does not change when the source is moved."""

    @property
    def in_row(self) -> bool:
        """Whether the picture lies in the row that names it, not beside it where other rows may name it too."""
        return True

    @abstractmethod
    def read(self) -> bytes:
        """The encoded picture (PNG, JPEG, ...). Raises DataError if there is none."""


@dataclass(frozen=True)
class InlineImage(ImageRef):
    """Bytes that the row itself carries."""

    data: bytes = field(repr=False)

    def read(self) -> bytes:
        return self.data


@dataclass(frozen=True)
class FileImage(ImageRef):
    """A picture file, here or at an address."""

    path: Place

    @property
    def in_row(self) -> bool:
        return False

    def read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read picture {str(self.path)!r} ({error.strerror}); check the path in the row") from None


@dataclass(frozen=True)
class SpanImage(ImageRef):
    """A stretch of an uncompressed archive."""

    path: Place
    offset: int
    size: int

    def read(self) -> bytes:
        try:
            if isinstance(self.path, Remote):
                data = self.path.read_span(self.offset, self.size)
            else:
                with self.path.open("rb") as file:
                    file.seek(self.offset)
                    data = file.read(self.size)
        except OSError as error:
            raise DataError(
                f"cannot read {str(self.path)!r} ({error.strerror}); check that the archive is still there"
            ) from None
        if len(data) != self.size:
            raise DataError(f"{str(self.path)!r} ends in the middle of picture {self.name!r}; fetch the archive again")
        return data


class Cells(Protocol):
    """A table whose picture cells are read one at a time."""

    def cell(self, row: int, column: str) -> bytes:
        """Encoded picture in that cell. Raises DataError."""


@dataclass(frozen=True)
class CellImage(ImageRef):
    """A cell of a table (Parquet, Arrow)."""

    table: Cells = field(repr=False)
    row: int
    column: str
    beside: bool = False
    """Named from outside of the table."""

    @property
    def in_row(self) -> bool:
        return not self.beside

    def read(self) -> bytes:
        return self.table.cell(self.row, self.column)


@dataclass(frozen=True)
class Comparison:
    """A prompt and N pictures, best first. Raises DataError on values that mean nothing.

    A pair has N = 2 and num_chosen = 1; groups have num_chosen = k of N = 2k; a ranked list has any N and `grades`. A picture
    that was judged alone has N = 1, and its `preference` is the probability that it is wanted.
    """

    prompt: str
    images: tuple[ImageRef, ...]
    num_chosen: int = 1
    """The first `num_chosen` pictures are the chosen ones, the others the rejected ones."""
    scores: Mapping[str, tuple[float, ...]] | None = None
    """Reward name -> one score per picture."""
    weight: float = 1.0
    """Factor on the loss, >= 0."""
    margin: float | None = None
    """By how much chosen is better, in the annotator's own unit."""
    preference: float = 1.0
    """Probability in [0, 1] that chosen is preferred: 1 for a plain vote, 0.5 for a tie, a share of votes otherwise."""
    grades: tuple[float, ...] | None = None
    """Relevance of each picture in a ranked list, not increasing."""
    generator: tuple[str, ...] | None = None
    """What made each picture."""
    seed: tuple[int, ...] | None = None
    """With which seed each picture was made."""
    noise: tuple[ImageRef, ...] | None = None
    """Files with the noise that each picture was drawn from, see `attached.Attached`."""
    mask: tuple[ImageRef, ...] | None = None
    """Where each picture counts, as a picture of the same shape: white counts, black does not."""
    objective_weights: Mapping[str, float] | None = None
    """Objective name -> its weight, under which this order holds: not negative, with a sum of 1."""
    annotator: str | None = None
    """Who judged."""
    source: str = field(default="", compare=False)
    """Where the comparison was read, as in "votes.jsonl:17"."""
    id: int = field(init=False)
    """63-bit key of the comparison's randomness, from the prompt, the names of pictures and masks, and objective weights."""

    def __post_init__(self) -> None:
        count = len(self.images)
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise DataError(f"the prompt is {self.prompt!r}; it must be text that is not empty")
        if not count:
            raise DataError("a comparison needs at least one picture and this one has none")
        if not 1 <= self.num_chosen < max(count, 2):
            raise DataError(f"num_chosen is {self.num_chosen}; with {count} pictures it must be 1 to {max(count - 1, 1)}")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise DataError(f"weight is {self.weight}; it must be a finite number that is not negative")
        if not 0 <= self.preference <= 1:
            raise DataError(f"preference is {self.preference}; it must be a probability from 0 to 1")
        if self.margin is not None and not math.isfinite(self.margin):
            raise DataError(f"margin is {self.margin}; it must be a finite number")
        names = ("grades", "generator", "seed", "noise", "mask")
        per_picture: dict[str, Sequence[Any] | None] = {name: getattr(self, name) for name in names}
        per_picture |= {f"scores[{name!r}]": values for name, values in (self.scores or {}).items()}
        for name, values in per_picture.items():
            if values is not None and len(values) != count:
                raise DataError(f"{name} has {len(values)} entries for {count} pictures; give one per picture")
            if values is not None and any(isinstance(value, float) and not math.isfinite(value) for value in values):
                raise DataError(f"{name} is {list(values)}; every entry must be finite")
        if self.grades is not None and any(a < b for a, b in zip(self.grades, self.grades[1:], strict=False)):
            raise DataError(f"grades are {list(self.grades)}; pictures must come best first, so grades must not increase")
        masks = ("mask", *(mask.name for mask in self.mask)) if self.mask is not None else ()
        told: tuple[str, ...] = ()
        if self.objective_weights is not None:
            check_weights(self.objective_weights)
            told = ("weights", *(f"{name}={value:.6f}" for name, value in sorted(self.objective_weights.items())))
        object.__setattr__(self, "id", key63(self.prompt, *(image.name for image in self.images), *masks, *told))

    def reversed(self) -> Comparison:
        """The judgement of somebody of the opposite taste: the worst picture first, scores with their sign turned.

        How sure it is, and by how much one is better, stays; a picture that was judged alone is wanted as often as it was not.
        """
        turned: dict[str, Any] = {"images": self.images[::-1], "num_chosen": max(len(self.images) - self.num_chosen, 1)}
        for name in ("generator", "seed", "noise", "mask"):
            values = getattr(self, name)
            turned[name] = None if values is None else values[::-1]
        if self.scores is not None:
            turned["scores"] = {name: tuple(-value for value in values[::-1]) for name, values in self.scores.items()}
        if self.grades is not None:
            turned["grades"] = tuple(max(self.grades) + min(self.grades) - value for value in self.grades[::-1])
        if len(self.images) == 1:
            turned["preference"] = 1 - self.preference
        return replace(self, **turned)

    @property
    def in_row(self) -> bool:
        """Whether all that it refers to lies in its row."""
        return all(ref.in_row for ref in (*self.images, *(self.noise or ()), *(self.mask or ())))

    @property
    def is_tie(self) -> bool:
        return self.preference == TIE


def key63(*parts: int | str) -> int:
    """A 63-bit integer that depends on every part and on their order."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") >> 1
