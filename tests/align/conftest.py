"""A tiny model that sees colours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import schedulers, tiny_pipeline


@pytest.fixture(scope="module")
def clear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a picture encoder that tells red from blue by latents of about ±2, and adds no noise."""
    pipeline = tiny_pipeline("epsilon", schedulers()["epsilon"])
    tints = torch.tensor([[225.0, 30.0, 30.0], [30.0, 30.0, 225.0]]) / 127.5 - 1
    with torch.no_grad():
        last = pipeline.vae.quant_conv
        red, blue = pipeline.vae.encode(tints[:, :, None, None].expand(-1, -1, 16, 16)).latent_dist.mean.mean((2, 3))
        gain = 4 / (red - blue).abs() / pipeline.vae.config.scaling_factor
        last.weight[:4] *= gain[:, None, None, None]
        last.bias[:4] = (last.bias[:4] - (red + blue) / 2) * gain
        last.weight[4:], last.bias[4:] = 0, -20
    folder = tmp_path_factory.mktemp("clear") / "model"
    pipeline.save_pretrained(folder)
    return folder
