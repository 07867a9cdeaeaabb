"""What holds for every reward that the folder offers: card, batches, neighbours, failures, gradient, direction."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowalign import plugins
from flowalign.errors import DataError, MissingExtraError, RunError
from flowalign.scoring.rewards.base import Backbone, Reward, Shelf
from tests.scoring.reward_rows import ROWS

NAMES = plugins.names("rewards")
PROMPTS = ("a red fox in snow", "two cups of tea", "the moon over a lake", "a bicycle")
each_reward = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module", autouse=True)
def _threads(one_thread: None) -> None:
    """Sums in the same order."""


class Installed(dict[str, Reward]):
    """Rewards by name; asking for another one skips the test."""

    def __missing__(self, name: str) -> Reward:
        pytest.skip(f"what {name} needs is in an extra that is not installed")


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reward]:
    """A tiny instance of each whose package is installed."""
    made = Installed()
    for name in NAMES:
        with contextlib.suppress(MissingExtraError):
            made[name] = ROWS[name].make(tmp_path_factory.mktemp(name), Shelf(torch.device("cpu")))
    return made


def pictures() -> list[Image.Image]:
    """Four of different sizes and shapes: smooth, noisy, flat with an edge, and dark."""
    rng = np.random.default_rng(0)
    ramp = np.stack(np.meshgrid(np.linspace(0, 255, 80), np.linspace(255, 0, 64)), 2)
    smooth = np.concatenate([ramp, np.full((64, 80, 1), 90.0)], 2)
    edge = np.full((90, 70, 3), 250.0)
    edge[20:60, 10:50] = (200, 30, 40)
    arrays = (smooth, rng.uniform(0, 255, (64, 64, 3)), edge, rng.uniform(0, 60, (50, 96, 3)))
    return [Image.fromarray(array.astype(np.uint8)) for array in arrays]


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1.0))


def test_every_reward_has_a_row() -> None:
    assert set(ROWS) == set(NAMES)


@each_reward
def test_the_card_is_sane(name: str, rewards: dict[str, Reward]) -> None:
    card = rewards[name].card
    low, high = card.range
    assert low < high
    assert card.better in ("higher", "lower")
    for text in (card.name, card.title, card.licence, card.source, card.weights, card.fingerprint):
        assert text.strip() == text
        assert text
    assert len(card.fingerprint) >= 8
    assert isinstance(rewards[name].backbone, Backbone)
    assert rewards[name].backbone.key


@each_reward
def test_scores_are_in_range(name: str, rewards: dict[str, Reward]) -> None:
    low, high = rewards[name].card.range
    scores = rewards[name].score(pictures(), PROMPTS)
    assert scores.shape == (4,)
    assert scores.dtype == torch.float32
    assert scores.device.type == "cpu"
    assert bool((scores >= low - 1e-5).all())
    assert bool((scores <= high + 1e-5).all())
    assert len({round(score, 6) for score in scores.tolist()}) > 1, "it says the same of four different pictures"


@each_reward
def test_a_batch_of_four_is_four_batches_of_one(name: str, rewards: dict[str, Reward]) -> None:
    reward, images = rewards[name], pictures()
    together = reward.score(images, PROMPTS)
    apart = torch.cat([reward.score([image], [prompt]) for image, prompt in zip(images, PROMPTS, strict=True)])
    assert close(together, apart, ROWS[name].tolerance)


@each_reward
def test_neighbours_do_not_matter(name: str, rewards: dict[str, Reward]) -> None:
    reward, images = rewards[name], pictures()
    among = reward.score(images, PROMPTS)[:1]
    others = reward.score([images[0], images[3], images[3], images[1]], [PROMPTS[0], "x" * 400, "é", PROMPTS[0]])[:1]
    assert close(among, others, ROWS[name].tolerance)


@each_reward
def test_the_same_again_is_the_same(name: str, rewards: dict[str, Reward], tmp_path: Path) -> None:
    first, second = (rewards[name].score(pictures(), PROMPTS) for _ in range(2))
    assert torch.equal(first, second)
    again = ROWS[name].make(tmp_path, Shelf(torch.device("cpu")))
    assert again.card.fingerprint == rewards[name].card.fingerprint
    assert torch.equal(again.score(pictures(), PROMPTS), first)


@each_reward
def test_the_prompt_matters_where_the_card_says_so(name: str, rewards: dict[str, Reward]) -> None:
    image = pictures()[2]
    scores = rewards[name].score([image] * 4, PROMPTS)
    assert (len(set(scores.tolist())) > 1) == rewards[name].card.reads_prompt


@each_reward
def test_unequal_lengths_are_an_error(name: str, rewards: dict[str, Reward]) -> None:
    for images, prompts in ((pictures(), PROMPTS[:3]), (pictures()[:1], PROMPTS), ([], [])):
        with pytest.raises(DataError, match="give one prompt a picture"):
            rewards[name].score(images, prompts)


@each_reward
def test_what_is_not_finite_is_an_error(name: str, rewards: dict[str, Reward], monkeypatch: pytest.MonkeyPatch) -> None:
    reward = rewards[name]
    judge = type(reward).judge
    for value in (math.nan, math.inf):
        monkeypatch.setattr(type(reward), "judge", lambda self, *rest, value=value: judge(self, *rest) * 0 + value)
        with pytest.raises(RunError, match="its model failed"):
            reward.score(pictures(), PROMPTS)


@each_reward
def test_there_is_a_gradient_exactly_where_the_card_says_so(name: str, rewards: dict[str, Reward]) -> None:
    reward = rewards[name]
    side = pictures()[1].size
    pixels = torch.from_numpy(np.asarray(pictures()[1]).copy()).permute(2, 0, 1)[None].float().div(255)
    assert pixels.shape == (1, 3, *side[::-1])
    pixels = torch.cat([pixels, pixels.flip(3)]).requires_grad_()
    if not reward.card.differentiable:
        with pytest.raises(RunError, match="no gradient"):
            reward.score_pixels(pixels, PROMPTS[:2])
        return
    scores = reward.score_pixels(pixels, PROMPTS[:2])
    (gradient,) = torch.autograd.grad(scores[0], pixels)
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient[0].abs().max()) > 0
    assert float(gradient[1].abs().max()) == 0, "a score depends on its neighbour's pixels"
    with torch.no_grad():  # the gradient is that of the score: a small step up it raises the score by what it says
        size = 1e-3 / gradient.norm()
        up, down = (reward.score_pixels(pixels + sign * size * gradient, PROMPTS[:2])[0] for sign in (1, -1))
    assert float(up - down) == pytest.approx(2 * float(size * gradient.square().sum()), rel=0.1)


@each_reward
def test_pixels_score_like_pictures(name: str, rewards: dict[str, Reward]) -> None:
    tolerance, reward = ROWS[name].pixels_tolerance, rewards[name]
    if tolerance is None:
        pytest.skip("no gradient, or pixels that are read in another way")
    for image, prompt in zip(pictures(), PROMPTS, strict=True):
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float().div(255)
        with torch.no_grad():
            assert float(reward.score_pixels(pixels, [prompt])) == pytest.approx(
                float(reward.score([image], [prompt])), abs=tolerance
            )


@each_reward
def test_the_direction_is_right(name: str, rewards: dict[str, Reward]) -> None:
    row, reward = ROWS[name], rewards[name]
    if row.better is None:
        pytest.skip("its tiny instance has random weights")
    for (good, good_prompt), (bad, bad_prompt) in row.better():
        above, below = reward.score([good, bad], [good_prompt, bad_prompt]).tolist()
        assert reward.card.sign * above > reward.card.sign * below
