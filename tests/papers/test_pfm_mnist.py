"""The reproduction on MNIST: its losses and likelihood written out, its pairs, its page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.papers import digits, emoji_flow_page, pfm_mnist, pfm_mnist_page

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base() -> digits.Generator:
    net = digits.Generator()
    digits.seeded(net, 0)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def reward() -> digits.LeNet5:
    net = digits.LeNet5()
    digits.seeded(net, 1)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pairs(base: digits.Generator, reward: digits.LeNet5) -> digits.Pairs:
    return digits.Pairs(base, reward, 40, seed=0)


def test_the_likelihood_is_that_of_a_gaussian(base: digits.Generator) -> None:
    labels = torch.arange(4)
    z, noise = digits.drawn(labels, 0, "test")
    pictures = base(z, labels, noise)
    law = base.law(z, labels).base_dist
    expected = torch.distributions.MultivariateNormal(law.mean, torch.diag_embed(law.stddev.square())).log_prob(
        pictures.flatten(1)
    )
    found = base.log_likelihood(pictures, z, labels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)
    spread = law.stddev.double()
    by_hand = -(noise.double().square() / 2 + spread.log() + 0.5 * math.log(2 * math.pi)).sum(1)
    torch.testing.assert_close(found.double(), by_hand, rtol=1e-4, atol=1e-2)
    assert float(law.mean.abs().max()) <= 1
    assert float(spread.min()) >= 0.01


def test_lsgan_losses_are_the_formulas() -> None:
    real, fake = torch.tensor([1.5, 0.0]), torch.tensor([0.5, -1.0])
    assert float(digits.lsgan_discriminator(real, fake)) == pytest.approx(0.5 * (0.25 + 1) / 2 + 0.5 * (0.25 + 1) / 2)
    assert float(digits.lsgan_generator(fake)) == pytest.approx(0.5 * (0.25 + 4) / 2)
    assert float(digits.lsgan_discriminator(torch.ones(3), torch.zeros(3))) == 0


def test_the_dpo_loss_is_the_formula() -> None:
    margin = torch.tensor([0.3, -2.0])
    expected = [-math.log(1 / (1 + math.exp(-0.7 * each))) for each in margin.tolist()]
    assert digits.dpo_loss(margin, 0.7).tolist() == pytest.approx(expected)


def test_dpo_raises_the_ratio_of_the_chosen_one(base: digits.Generator, reward: digits.LeNet5) -> None:
    more = digits.Pairs(base, reward, 130, seed=0)
    tuned = digits.dpo(base, more, 0.01, 5, seed=0)

    def margin(net: digits.Generator) -> torch.Tensor:
        chosen = net.log_likelihood(more.chosen, more.z_chosen, more.labels)
        return chosen - net.log_likelihood(more.rejected, more.z_rejected, more.labels)

    assert float((margin(tuned) - margin(base)).mean()) > 1


def test_pairs_are_the_best_and_worst_of_a_label(reward: digits.LeNet5, pairs: digits.Pairs) -> None:
    assert len(pairs.labels) == len(pairs.chosen) == 40
    assert bool((pairs.reward_chosen > pairs.reward_rejected).all())
    torch.testing.assert_close(reward(pairs.rejected, pairs.labels), pairs.reward_rejected)
    score, labels = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.3]), torch.tensor([4, 4, 4, 2, 2])
    best, worst = digits.extremes(score, labels)
    assert (best.tolist(), worst.tolist()) == ([1], [0])  # two of one score prefer nothing


def test_the_reward_is_a_probability_of_the_digit_asked_for(reward: digits.LeNet5) -> None:
    pictures = torch.rand(3, 1, 28, 28) * 2 - 1
    every = torch.stack([reward(pictures, torch.full((3,), label)) for label in range(10)])
    torch.testing.assert_close(every.sum(0), torch.ones(3))


def test_the_papers_classifier_reads_digits(test_data: Path) -> None:
    path = test_data / digits.CLASSIFIER
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    net = digits.LeNet5()
    net.load_state_dict(torch.load(path, weights_only=True))
    one = torch.full((1, 1, 28, 28), -1.0)
    one[0, 0, 5:23, 13:16] = 1.0
    with torch.no_grad():
        assert float(net(one, torch.tensor([1]))) > 0.9


def test_batches_go_through_all_before_any_comes_again() -> None:
    found = list(digits.batches(10, 5, 4, 0, "test"))
    assert sorted(torch.cat(found[:2]).tolist()) == sorted(torch.cat(found[2:]).tolist()) == list(range(10))


def figures(mean: float) -> dict[str, Any]:
    return {
        "mean": mean,
        "low": mean - 0.01,
        "high": mean + 0.01,
        "spread": 1.0,
        "count": 5,
        "cpu": 1.0,
        "pictures": [[0.0] * 784] * 20,
    }


def test_the_ordering_is_told_step_by_step(tmp_path: Path) -> None:
    means = {"rejected": 0.1, "base": 0.3, "dpo 1": 0.2, "dpo 0.1": 0.305, "pfm": 0.5, "pfm x2": 0.4}
    found: dict[str, Any] = {
        "arms": {name: figures(mean) for name, mean in means.items()},
        "size": pfm_mnist.Size().__dict__,
        "best_of": {2: 0.4},
        "reward_of_digits": 0.99,
        "spread_of_digits": 2.0,
        "generator_cpu": 1.0,
        "cpu": 60.0,
        "origin": "somewhere",
    }
    steps = [("rejected", "base", "holds"), ("base", "dpo 0.1", "is open"), ("dpo 0.1", "pfm", "holds")]
    assert pfm_mnist_page.ordering(found) == [*steps, ("pfm", "pfm x2", "is reversed")]
    page = tmp_path / "pfm_mnist.md"
    page.write_text("# A page\n<!-- pfm mnist -->\nformer\n<!-- end of pfm mnist -->\nafter\n")
    pfm_mnist_page.write_page(found, page)
    text = page.read_text()
    assert "former" not in text
    assert text.endswith("after\n")
    assert "| pfm | 0.500 [0.490, 0.510] |" in text
    assert (tmp_path / "pfm_mnist.png").is_file()
    assert (tmp_path / "pfm_mnist-digits.png").is_file()
    assert "pictures" not in (tmp_path / "pfm_mnist.json").read_text()


@pytest.mark.parametrize(
    ("style", "low", "identity", "all_of_it"),
    [(0.85, -0.01, 0.9, True), (0.84, -0.01, 0.9, False), (0.9, 0.001, 0.95, False), (0.9, -0.01, 0.89, False)],
)
def test_the_bar(style: float, low: float, identity: float, all_of_it: bool) -> None:
    found = {"style": {"value": style}, "change": {"value": 0.01, "low": low, "high": 0.02}, "identity": identity}
    assert emoji_flow_page.reaches(found) is all_of_it
