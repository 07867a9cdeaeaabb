"""The recipes beside the bundled models: what they train is what diffusers' pipelines run."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, emoji: Path) -> Any:
    monkeypatch.syspath_prepend(str(emoji))
    return importlib.import_module("pretrain_sd3")


def test_one_zero_token_stands_for_all_that_the_pipeline_puts_in_t5s_place(recipe: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    transformer = recipe.make_transformer().eval()
    with torch.no_grad():
        for parameter in transformer.parameters():  # at their start some outputs are 0 whatever the attention
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))

    def velocity(zeros: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(1)
        states = torch.randn(2, 32, recipe.TRANSFORMER["joint_attention_dim"], generator=draw)
        with torch.no_grad():
            return transformer(
                hidden_states=torch.randn(2, 4, 16, 16, generator=draw),
                timestep=torch.tensor([300.0, 700.0]),
                encoder_hidden_states=torch.nn.functional.pad(states, (0, 0, 0, zeros)),
                pooled_projections=torch.randn(2, recipe.TRANSFORMER["pooled_projection_dim"], generator=draw),
                return_dict=False,
            )[0]

    whole, short = velocity(recipe.T5_TOKENS), velocity(1)
    transformer.set_attn_processor(recipe.OneForAll())
    torch.testing.assert_close(velocity(1), whole, rtol=1e-4, atol=1e-4 * float(whole.abs().mean()))
    assert (short - whole).abs().mean() > 0.01 * whole.abs().mean()  # without the weight it would be another function


def test_the_bundled_flow_model_knows_drawings_that_it_has_not_seen_by_their_captions(emoji: Path) -> None:
    """Error of the velocity on held-out drawings: far below that of guessing (2), and lower with a drawing's own caption."""
    import io

    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    from flowalign.data.batch import GEOMETRY
    from flowalign.families.sd3 import StableDiffusion3

    folder = emoji / "tiny-sd3"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 28 * 2**20
    rows = [row for row in pq.read_table(emoji / "emoji.parquet").to_pylist() if row["split"] == "held_out"][:64]
    family = StableDiffusion3.load(folder, dtype=torch.float32)
    pixels = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows]
    x0 = family.encode_images(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255).mean
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    t = (torch.arange(64) + 0.5) / 64
    x_t, target = family.noisy(x0, noise, t)

    def error(captions: list[str]) -> float:
        told = family.encode_prompts(captions).joined(GEOMETRY, torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 64))
        with torch.no_grad():
            return (family.predict(family.denoiser, x_t, t, told) - target).square().mean().item()

    captions = [row["caption"] for row in rows]
    own, shifted = error(captions), error(captions[8:] + captions[:8])
    assert own < 0.6
    assert own < 0.95 * shifted
