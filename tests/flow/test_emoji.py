"""A few style pairs of the bundled drawings, in the bundled autoencoder's latents, for seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowalign.data.images import decode, fit
from flowalign.data.readers import open_comparisons
from flowalign.flow.arrays import ArrayPairs
from flowalign.flow.field import FieldSettings
from flowalign.flow.settings import Solve
from flowalign.flow.solve import guided, solve
from flowalign.flow.spaces import LatentSpace, open_autoencoder
from tests.flow.toys import train

pytestmark = pytest.mark.usefixtures("one_thread")


def latents(space: LatentSpace, path: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rejected, chosen) of the first pairs, pictures of 32 pixels: `[count, 4, 8, 8]` each."""
    pairs = [open_comparisons(path)[place] for place in range(count)]
    sides = []
    for side in (1, 0):
        rows = [torch.from_numpy(fit(decode(pair.images[side].read()), 32)) for pair in pairs]
        sides.append(space.encode(torch.stack(rows).float() / 255))
    return sides[0], sides[1]


@pytest.mark.parametrize("style", ["fluent_over_noto", pytest.param("noto_over_fluent", marks=pytest.mark.slow)])
def test_drawings_move_to_the_chosen_style_and_not_to_the_other(style: str, emoji: Path, tmp_path: Path) -> None:
    space = LatentSpace(open_autoencoder(str(emoji / "tiny-sd")), "tiny-sd")
    rejected, chosen = latents(space, emoji / "preferences" / f"{style}-train.jsonl", 32)
    settings = FieldSettings((4, 8, 8), width=32, levels=2)
    field = train(tmp_path, ArrayPairs(rejected, chosen), settings, sigma=0.1, steps=30, batch_size=8, learning_rate=3e-3)
    before, wanted = latents(space, emoji / "preferences" / f"{style}-held_out.jsonl", 16)
    moved = solve(guided(field, None), before, Solve(steps=2)).end - before
    own = torch.nn.functional.cosine_similarity(moved.flatten(1), (wanted - before).flatten(1))
    assert float(own.mean()) > 0.15  # towards the same thing in the other style; -0.15 and less where pairs are swapped
    assert float((own > 0).float().mean()) > 0.8
    reverse = torch.nn.functional.cosine_similarity(moved.flatten(1), (before - wanted).flatten(1))
    assert float(own.mean()) > float(reverse.mean())
