"""The drawings of people in five skin tones, and the judge of tones, which sees other concepts than the votes are about."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from flowalign.evaluate.judges import to_pixels
from flowalign.families.loading import open_checkpoint
from flowalign.rng import key

SAMPLES = "samples/emoji"
TONES = ("light", "medium-light", "medium", "medium-dark", "dark", "yellow")
"""Five skin tones, and the yellow that emoji have where none is asked for."""
SPREADS = (None, 0.0, 0.25)
"""Copies of each picture: as drawn, and through the VAE with noise of this spread on its latents, whose own spread is 1."""
Pictures = Sequence[Image.Image]


@dataclass(frozen=True)
class Drawing:
    """A Noto drawing of a person or a hand."""

    place: str
    """`FILE.parquet#ROW`, as comparison files name it."""
    caption: str
    split: str
    """train or held_out."""
    tone: int
    """Place in TONES."""
    picture: Image.Image

    @property
    def voted_on(self) -> bool:
        """Whether votes are about this concept: half of the train ones, by caption."""
        return self.split == "train" and key(self.caption) % 2 == 0


def drawings() -> list[Drawing]:
    """All concepts with five plain skin tones, in six drawings each."""
    found = []
    for row_number, row in enumerate(pq.read_table(f"{SAMPLES}/skin_tones.parquet").to_pylist()):
        tone = row["tone"].removesuffix(" skin tone")
        if tone in TONES:
            found.append(_drawing("skin_tones", row_number, row, TONES.index(tone)))
    captions = {each.caption for each in found}
    for row_number, row in enumerate(pq.read_table(f"{SAMPLES}/emoji.parquet").to_pylist()):
        if row["style"] == "noto" and row["caption"] in captions:
            found.append(_drawing("emoji", row_number, row, TONES.index("yellow")))
    return found


def _drawing(table: str, number: int, row: dict[str, Any], tone: int) -> Drawing:
    picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
    return Drawing(f"{table}.parquet#{number}", row["caption"], row["split"], tone, picture)


@torch.no_grad()
def copies(vae: Any, pictures: Pictures) -> list[list[Image.Image]]:
    """Each picture as SPREADS says; all it takes from the generator is its VAE."""
    out: list[list[Image.Image]] = [[] for _ in SPREADS]
    rng = torch.Generator().manual_seed(0)
    for start in range(0, len(pictures), 32):
        batch = list(pictures[start : start + 32])
        latents = vae.encode(to_pixels(batch, batch[0].width) * 2 - 1).latent_dist.mean
        for kind, spread in zip(out, SPREADS, strict=True):
            if spread is None:
                kind += batch
                continue
            noisy = latents + spread * torch.randn(latents.shape, generator=rng)
            pixels = ((vae.decode(noisy).sample + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
            kind += [Image.fromarray(each) for each in pixels.numpy()]
    return out


def colours(pictures: Pictures) -> NDArray[np.float64]:
    """Root of the share of pixels in each of 16³ bins of hue, saturation and value, `[n, 4096]`."""
    pixels = np.stack([np.asarray(picture.convert("HSV")).reshape(-1, 3) for picture in pictures]).astype(np.int64)
    places = pixels // 16 @ (256, 16, 1)
    return np.sqrt(np.stack([np.bincount(row, minlength=4096) for row in places]) / places.shape[1])


@dataclass(frozen=True)
class ToneJudge:
    """A multinomial logistic regression over the tones, on colours."""

    model: Pipeline
    accuracy: dict[str, float]
    """Share of held-out concepts' pictures whose tone is found: as drawn, and through the VAE."""

    def __call__(self, pictures: Pictures) -> list[int]:
        """Places in TONES."""
        return self.model.predict(colours(pictures)).tolist()


def fit_judge(known: Sequence[Drawing]) -> ToneJudge:
    """Fit on the train concepts that no vote is about, in all their copies, and try on the held-out ones."""
    train = [each for each in known if each.split == "train" and not each.voted_on]
    held = [each for each in known if each.split == "held_out"]
    vae = open_checkpoint(f"{SAMPLES}/tiny-sd").vae
    x = np.concatenate([colours(kind) for kind in copies(vae, [each.picture for each in train])])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    model.fit(x, [each.tone for each in train] * len(SPREADS))
    right = [
        np.mean(model.predict(colours(kind)) == [each.tone for each in held])
        for kind in copies(vae, [each.picture for each in held])
    ]
    return ToneJudge(model, {"drawn": float(right[0]), "decoded": float(np.mean(right[1:]))})
