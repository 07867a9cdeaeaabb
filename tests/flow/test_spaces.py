"""Spaces, and pictures in parts: nothing moved is nothing changed, and detail stays."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch

from flowalign.errors import CheckpointError
from flowalign.flow.spaces import LatentSpace, PixelSpace, Space, open_autoencoder
from flowalign.flow.tiles import cut, joined, tiling

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny() -> diffusers.AutoencoderTiny:
    torch.manual_seed(0)
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )  # fmt: skip


@pytest.fixture(params=["pixels", "kl", "tiny"])
def space(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Space:
    if request.param == "pixels":
        return PixelSpace()
    vae = tiny() if request.param == "tiny" else open_autoencoder(str(folders["sample"]))  # it has a shift
    return LatentSpace(vae, request.param)


def test_what_does_not_move_does_not_change(space: Space) -> None:
    pixels = torch.rand(2, 3, 32, 32)
    z = space.encode(pixels)
    assert z.shape == (2, space.channels, 32 // space.factor, 32 // space.factor)
    assert z.dtype == torch.float32
    assert not space.residual(z, z.clone()).any()
    assert space.residual(z, z + 0.3).abs().max() > 1e-3


def test_pictures_are_apart(space: Space) -> None:
    pixels = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(
        space.encode(pixels), torch.cat([space.encode(each[None]) for each in pixels]), rtol=1e-4, atol=1e-5
    )


def test_pixels_decode_to_themselves() -> None:
    pixels = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(PixelSpace().decode(PixelSpace().encode(pixels)), pixels)


def test_latents_are_those_of_the_family(folders: dict[str, Path]) -> None:
    from flowalign.families.sd import StableDiffusion

    source, pixels = str(folders["sample"]), torch.rand(2, 3, 32, 32)
    family = StableDiffusion.load(source, dtype=torch.float32)
    space = LatentSpace(open_autoencoder(source), source)
    torch.testing.assert_close(space.encode(pixels), family.encode_images(pixels).mean)
    pipeline = family.pipeline(family.denoiser)
    vae, z = pipeline.vae, torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        decoded = vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor).sample / 2 + 0.5
    torch.testing.assert_close(space.decode(z), decoded)


def test_an_autoencoder_lies_in_a_checkpoint_or_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = LatentSpace(open_autoencoder(str(folders["epsilon"])), "whole")
    alone = LatentSpace(open_autoencoder(str(folders["epsilon"] / "vae")), "alone")
    assert whole.fingerprint == alone.fingerprint != LatentSpace(tiny(), "tiny").fingerprint
    assert (whole.channels, whole.factor, whole.resolution) == (4, 2, 32)
    tiny().save_pretrained(tmp_path / "tiny")
    assert LatentSpace(open_autoencoder(str(tmp_path / "tiny")), "tiny").factor == 4
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "nothing", tmp_path / "empty"):
        with pytest.raises(CheckpointError, match=str(wrong)):
            open_autoencoder(str(wrong))


@pytest.mark.parametrize("fit", ["scale", "tile"])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 40), (37, 23), (64, 64), (7, 9), (100, 16)])
def test_squares_cover_a_picture_and_give_it_back(fit: str, height: int, width: int) -> None:
    tiles, picture = tiling(height, width, 16, fit), torch.rand(3, height, width)
    squares = cut(picture, tiles)
    assert squares.shape[1:] == (3, 16, 16)
    again = joined(squares, tiles)
    assert again.shape == picture.shape
    if tiles.scaled == tiles.size:
        torch.testing.assert_close(again, picture)
    assert not joined(torch.zeros_like(squares), tiles).any()
    torch.testing.assert_close(joined(torch.full_like(squares, 0.25), tiles), torch.full_like(picture, 0.25))
    if fit == "scale":
        assert min(tiles.scaled) == 16
    if fit == "tile" and min(height, width) >= 16:
        assert tiles.scaled == (height, width)


def test_a_square_picture_is_one_square_and_long_ones_are_several() -> None:
    assert len(tiling(512, 512, 64, "scale").corners) == 1
    assert len(tiling(64, 64, 64, "tile").corners) == 1
    assert tiling(64, 160, 64, "tile").corners == ((0, 0), (0, 48), (0, 96))
    assert len(tiling(128, 128, 64, "tile").corners) == 9  # overlapping by a quarter or more
