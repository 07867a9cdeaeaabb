"""What is unlike the training inputs: statistics against scikit-learn, and how strength falls."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from sklearn.covariance import LedoitWolf

from flowalign.errors import CheckpointError, DataError
from flowalign.flow.domain import features, fit_domain, load_domain, shrunk


def pictures(count: int = 400, seed: int = 0) -> torch.Tensor:
    """Smooth pictures of two channels."""
    made = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 2, 4, 4, generator=made)
    return torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear") + 0.05 * torch.randn(
        count, 2, 16, 16, generator=made
    )


@pytest.mark.parametrize("count", [5, 40, 2000])
def test_the_covariance_is_scikit_learns(count: int) -> None:
    made = torch.Generator().manual_seed(0)
    rows = torch.randn(count, 12, generator=made, dtype=torch.float64) @ torch.randn(
        12, 12, generator=made, dtype=torch.float64
    )
    mean, covariance = shrunk(rows)
    known = LedoitWolf().fit(rows.numpy())
    torch.testing.assert_close(mean, torch.from_numpy(known.location_))
    torch.testing.assert_close(covariance, torch.from_numpy(known.covariance_))


def test_distances_are_mahalanobis() -> None:
    made = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 3, generator=made, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1])
    domain = fit_domain(rows, 0.99, seed=0)
    precision = domain.whiten @ domain.whiten.T
    for row in rows[:5]:
        off = row - domain.mean
        assert float(domain.distance(row[None].float())) == pytest.approx(math.sqrt(float(off @ precision @ off) / 3), rel=1e-5)


def test_fresh_pictures_of_the_kind_keep_their_strength_and_others_lose_it() -> None:
    domain = fit_domain(features(pictures()), 0.99, seed=0)
    alike = domain.factor(domain.distance(pictures(seed=1)))
    assert float((alike == 1).double().mean()) > 0.95
    noise = torch.randn(8, 2, 16, 16, generator=torch.Generator().manual_seed(2))
    bright, flat = pictures(8, seed=3) + 4, torch.zeros(8, 2, 16, 16)
    for other in (noise, bright, flat):
        assert float(domain.factor(domain.distance(other)).max()) < 0.1


def test_strength_falls_smoothly_and_never_rises() -> None:
    domain = fit_domain(features(pictures()), 0.99, seed=0)
    distance = torch.linspace(0, domain.limit + 4 * domain.spread, 4001, dtype=torch.float64)
    factor = domain.factor(distance)
    assert float(factor[0]) == 1
    assert float(domain.factor(torch.tensor([domain.limit]))) == 1
    assert float(domain.factor(torch.tensor([domain.limit + domain.spread], dtype=torch.float64))) == pytest.approx(
        math.exp(-0.5)
    )
    slope = factor.diff() / distance.diff()
    assert bool((slope <= 0).all())
    assert float(slope.diff().abs().max()) < 0.01 * float(slope.abs().max())  # no corner, at the limit neither


def test_a_quantile_is_held_out_and_a_distance_is_a_pictures_own(tmp_path: Path) -> None:
    found = features(pictures())
    loose, tight = fit_domain(found, 0.99, seed=0), fit_domain(found, 0.8, seed=0)
    assert tight.limit < loose.limit
    few = pictures(4, seed=7)
    assert torch.equal(loose.distance(few), torch.cat([loose.distance(each[None]) for each in few]))
    loose.save(tmp_path)
    again = load_domain(tmp_path)
    assert again is not None
    assert torch.equal(again.distance(few), loose.distance(few))
    assert (again.limit, again.spread) == (loose.limit, loose.spread)
    assert load_domain(tmp_path / "elsewhere") is None
    (tmp_path / "domain.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_domain(tmp_path)


def test_vectors_have_features_too_and_too_few_are_refused() -> None:
    assert features(torch.rand(3, 10)).shape == (3, 10)
    assert features(torch.rand(3, 2000)).shape == (3, 512)
    with pytest.raises(DataError, match="5 training pictures, too few"):
        fit_domain(torch.rand(5, 3, dtype=torch.float64), 0.99, seed=0)
