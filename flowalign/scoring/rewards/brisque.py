"""BRISQUE: how unnatural the statistics of neighbouring pixels are, by a support vector regression on human opinions.

Source: Mittal, Moorthy and Bovik, 2012, "No-reference image quality assessment in the spatial domain", IEEE TIP 21(12). The
regression is the one that the package `brisque` 0.2 carries (Apache-2.0), read as text: none of its code runs. About 0 is
pristine and 100 is ruined. It was fitted on photographs with blur, noise and compression, not on what generators do wrong.
Pictures of a few pixels are like none of them: no support vector is near, and the score is -ρ = 155.8.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flowalign.errors import CheckpointError, MissingExtraError, RunError, reason
from flowalign.scoring.rewards.base import Card, Reward, Shelf
from flowalign.scoring.rewards.pixels import Formula, Pixels

LOWEST = (
    *(0.336999, 0.019667, 0.23, -0.125959, 0.000167, 0.000616, 0.231, -0.125873, 0.000165, 0.0006, 0.241, -0.128814),
    *(0.000179, 0.000386, 0.243, -0.13308, 0.000182, 0.000421, 0.436998, 0.016929, 0.247, -0.200231, 0.000104, 0.000834),
    *(0.257, -0.200017, 0.000112, 0.000876, 0.257, -0.155072, 0.000112, 0.000356, 0.258, -0.154374, 0.000117, 0.000351),
)
HIGHEST = (
    *(9.999411, 0.807472, 1.644021, 0.202917, 0.712384, 0.468672, 1.644021, 0.169548, 0.713132, 0.467896, 1.553016, 0.101368),
    *(0.687324, 0.533087, 1.554016, 0.101, 0.689177, 0.533133, 3.639918, 0.800955, 1.096995, 0.175286, 0.755547, 0.39927),
    *(1.095995, 0.155928, 0.751488, 0.402398, 1.041992, 0.093209, 0.623516, 0.532925, 1.042992, 0.093714, 0.621958, 0.534484),
)
"""Smallest and largest value of each of the 36 features where the regression was fitted; they become -1 and 1."""
SIDE = 3
"""Below it, the picture of half the size has no neighbours left."""
SHAPES = (0.2, 10.0)
"""Between these the shape α of a distribution is looked for, as published."""
ZERO = 1e-12
"""Contrasts that are rounding, and products of these."""
GREY = (0.2125, 0.7154, 0.0721)
HALVING = (-0.09375, 0.59375, 0.59375, -0.09375)
"""Bicubic interpolation (a = -0.75) half-way between pixels."""


@dataclass(frozen=True)
class Regression:
    """ε-SVR with a radial kernel: Σ_i c_i exp(-γ |x - v_i|²) - ρ."""

    vectors: Tensor = field(repr=False)
    """v `[S, 36]`, float64"""
    weights: Tensor = field(repr=False)
    """c `[S]`"""
    gamma: float
    rho: float

    def __call__(self, x: Tensor) -> Tensor:
        """`[N, 36]` -> `[N]`"""
        distances = (x[:, None] - self.vectors).square().sum(2)
        return (-self.gamma * distances).exp() @ self.weights - self.rho

    def to(self, device: torch.device) -> Regression:
        return Regression(self.vectors.to(device), self.weights.to(device), self.gamma, self.rho)


@dataclass(frozen=True)
class Brisque:
    """The measure: features at two scales, brought to [-1, 1], through the regression. All in float64."""

    regression: Regression

    def __call__(self, pictures: Tensor) -> Tensor:
        """`[N, 3, H, W]` in [0, 1] -> `[N]`. Raises RunError for pictures that have no such statistics."""
        x = features(pictures)
        lowest, highest = (torch.tensor(values, dtype=x.dtype, device=x.device) for values in (LOWEST, HIGHEST))
        return self.regression(2 * (x - lowest) / (highest - lowest) - 1)


def features(pictures: Tensor) -> Tensor:
    """`[N, 3, H, W]` in [0, 1] -> `[N, 36]`: shape and variance of contrast-normalised brightness, and shape, mean and the
    variances of both sides for its products with four neighbours; once in full size and once in half of it."""
    height, width = pictures.shape[2:]
    if min(height, width) < SIDE:
        raise RunError(f"BRISQUE needs pictures of at least {SIDE}x{SIDE} pixels and this one has {width}x{height}.")
    red, green, blue = pictures.double().unbind(1)
    y = GREY[0] * red + GREY[1] * green + GREY[2] * blue
    return torch.cat([_statistics(y), _statistics(_halved(y))], 1)


def _statistics(y: Tensor) -> Tensor:
    """Brightness `[N, H, W]` -> `[N, 18]`"""
    x = _normalised(y)
    products = (
        x,
        x[:, :, :-1] * x[:, :, 1:],
        x[:, :-1] * x[:, 1:],
        x[:, :-1, :-1] * x[:, 1:, 1:],
        x[:, 1:, :-1] * x[:, :-1, 1:],
    )
    moments = [_moments(each.flatten(1)) for each in products]
    left, right, ratio = (torch.stack(each, 1) for each in zip(*moments, strict=True))  # [N, 5]
    if not bool((ratio > 0).all()):
        raise RunError("BRISQUE has no statistics of a picture that is all black or has no contrast; leave it out.")
    deviations = (left.sqrt(), right.sqrt())
    # R̂ = r̂ (γ³ + 1)(γ + 1)/(γ² + 1)² with γ = σ_l/σ_r, written so that neither side may be missing
    generalised = ratio * (deviations[0] ** 3 + deviations[1] ** 3) * (deviations[0] + deviations[1]) / (left + right) ** 2
    shape = _shape(generalised)
    one, two, three = (torch.lgamma(n / shape) for n in (1, 2, 3))
    means = (deviations[1] - deviations[0]) * (0.5 * (one - three) + two - one).exp()
    pairs = torch.stack([shape, means, left, right], 2)[:, 1:].flatten(1)
    return torch.cat([shape[:, :1], ((left + right) / 2)[:, :1], pairs], 1)


def _normalised(y: Tensor) -> Tensor:
    """(Y - μ)/(σ + 1/255) with μ and σ of a 7x7 Gaussian of width 7/6, black beyond the edges."""
    places = torch.arange(-3, 4, dtype=y.dtype, device=y.device)
    window = (-places.square() / (2 * (7 / 6) ** 2)).exp()
    window = window / window.sum()

    def blurred(x: Tensor) -> Tensor:
        x = F.conv2d(x[:, None], window[None, None, :, None], padding=(3, 0))
        return F.conv2d(x, window[None, None, None], padding=(0, 3))[:, 0]

    mean = blurred(y)
    variance = (mean.square() - blurred(y.square())).abs()
    return (y - mean) / (variance.clamp_min(1e-20).sqrt() + 1 / 255)  # the square root has no gradient at 0


def _halved(y: Tensor) -> Tensor:
    """`[N, H, W]` -> half the height and width, of which halves are rounded to even; the edges repeat."""
    window = torch.tensor(HALVING, dtype=y.dtype, device=y.device)
    for axis in (1, 2):
        y = y.transpose(1, axis)
        half = round(y.shape[1] / 2)
        padded = F.pad(y[:, None], (0, 0, 1, 3), mode="replicate")
        y = F.conv2d(padded, window[None, None, :, None], stride=(2, 1))[:, 0, :half].transpose(1, axis)
    return y


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values `[N, M]` -> mean square of those below 0, of the others (0 where there are none), and (mean |x|)²/mean x².

    What is 0 but for rounding, as in flat parts, counts as 0: its sign would depend on the order of sums.
    """
    squares, below = x.square(), x < -ZERO
    left = (squares * below).sum(1) / below.sum(1).clamp_min(1)
    right = (squares * ~below).sum(1) / (~below).sum(1).clamp_min(1)
    ratio = x.abs().mean(1).square() / squares.mean(1).clamp_min(1e-300)
    return left.clamp_min(1e-40), right.clamp_min(1e-40), ratio


def _shape(generalised: Tensor) -> Tensor:
    """α with ρ(α) = Γ(2/α)²/(Γ(1/α) Γ(3/α)) = R̂, in `SHAPES`; by bisection, with the gradient of the implicit function."""
    with torch.no_grad():
        low, high = (torch.full_like(generalised, end) for end in SHAPES)
        for _ in range(60):
            middle = (low + high) / 2
            one, two, three = (torch.lgamma(n / middle) for n in (1, 2, 3))
            under = (2 * two - one - three).exp() < generalised
            low, high = torch.where(under, middle, low), torch.where(under, high, middle)
        shape = (low + high) / 2
        one, two, three = (torch.digamma(n / shape) for n in (1, 2, 3))
        slope = generalised * (one - 4 * two + 3 * three) / shape.square()
        inside = (shape - SHAPES[0] > 1e-9) & (SHAPES[1] - shape > 1e-9)
    return shape + torch.where(inside, (generalised - generalised.detach()) / slope, 0.0)


def read_regression(path: Path) -> Regression:
    """A model file of libsvm, which is text. Raises CheckpointError for anything but an ε-SVR with a radial kernel on 36
    features."""
    try:
        head, _, body = path.read_text(encoding="ascii").partition("\nSV\n")
        said = dict(line.split(maxsplit=1) for line in head.splitlines())
        rows = list(_rows(body))
        found = Regression(
            torch.tensor([vector for _, vector in rows], dtype=torch.float64),
            torch.tensor([weight for weight, _ in rows], dtype=torch.float64),
            float(said["gamma"]),
            float(said["rho"]),
        )
        kind = (said["svm_type"], said["kernel_type"], int(said["total_sv"]), len(LOWEST))
    except (OSError, ValueError, LookupError) as error:
        raise CheckpointError(f"{path} is no model of libsvm ({reason(error)}); give a file like brisque's svm.txt.") from error
    if kind != ("epsilon_svr", "rbf", *found.vectors.shape):
        raise CheckpointError(
            f"{path} is no epsilon_svr with an rbf kernel on 36 features; give a file like brisque's svm.txt."
        )
    return found


def _rows(body: str) -> Iterator[tuple[float, list[float]]]:
    """Weight and vector per line; what a line leaves out is 0."""
    for line in body.splitlines():
        weight, *entries = line.split()
        vector = [0.0] * len(LOWEST)
        for index, value in (entry.split(":") for entry in entries):
            vector[int(index) - 1] = float(value)
        yield float(weight), vector


def _packaged() -> Path:
    """The regression in the package, which is not imported: that would want OpenCV."""
    try:
        return Path(str(metadata.distribution("brisque").locate_file("brisque/models/svm.txt")))
    except metadata.PackageNotFoundError:
        raise MissingExtraError("brisque", "quality", "the reward brisque") from None


def load(shelf: Shelf, *, weights: str = "") -> Reward:
    """weights: a model file of libsvm for the same features and ranges; the package's if left out.

    Raises MissingExtraError without either, CheckpointError for a file that is none.
    """
    path = Path(weights).expanduser() if weights else _packaged()
    regression = read_regression(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return Formula(
        Card(
            name="brisque",
            title="BRISQUE: distortion by the statistics of neighbouring pixels",
            range=(-math.inf, math.inf),  # mostly 0 to 100
            better="lower",
            licence="Apache-2.0",
            source="Mittal et al., 2012, IEEE TIP 21(12)",
            weights=path.name if weights else f"svm.txt of brisque {metadata.version('brisque')}",
            reads_prompt=False,
            differentiable=True,
            fingerprint=f"brisque-1-{digest}",
        ),
        Pixels.of(shelf),
        Brisque(regression.to(shelf.device)),
    )


REWARD = load
