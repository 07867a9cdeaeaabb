"""The matching step against its formula, and fields against maps that are known."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowalign.data.batch import Batch
from flowalign.data.records import key63
from flowalign.errors import DataError
from flowalign.flow.arrays import ArrayPairs
from flowalign.flow.field import FieldSettings
from flowalign.flow.matching import MatchingStep, same_context
from flowalign.flow.settings import Solve
from flowalign.flow.solve import guided, solve
from flowalign.rng import Keyed
from tests.flow.toys import train

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


class Known(nn.Module):
    """v = 2 s y + 1, plus 10 where the context is dropped."""

    def forward(self, s: Tensor, y: Tensor, context: Tensor | None, dropped: Tensor | None) -> Tensor:
        told = torch.zeros(len(y)) if dropped is None else 10.0 * dropped
        return 2 * s.view(-1, *[1] * (y.dim() - 1)) * y + 1 + told.view(-1, *[1] * (y.dim() - 1))


def step(**options: Any) -> MatchingStep:
    return MatchingStep(Known(), CPU, nullcontext, **options)


def batch(count: int = 5, shape: tuple[int, ...] = (2, 3), **options: Any) -> Batch:
    made = torch.Generator().manual_seed(0)
    pairs = ArrayPairs(*torch.randn(2, count, *shape, generator=made), torch.arange(count) // 2, **options)
    return pairs.batch(torch.arange(count), tuple(range(10, 10 + count)), tuple(range(count)))


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_the_loss_is_the_formula(sigma: float) -> None:
    given, rng = batch(weight=torch.arange(5) + 1.0), Keyed(3)
    loss, metrics = step(sigma=sigma)(given, rng)
    noise = rng.normal("flow-noise", given.ids, given.draws, (2, 3))
    times = rng.uniform("s", given.ids, given.draws)
    for row in range(5):
        chosen, rejected = given.mean[row].double()
        s = float(times[row])
        y = (1 - s) * rejected + s * chosen + sigma * noise[row]
        off = 2 * s * y + 1 - (chosen - rejected)
        assert float(loss[row]) == pytest.approx((row + 1) * float(off.square().mean()), rel=1e-5)
        assert float(metrics["flow/error"][row]) == pytest.approx(float(off.square().mean()), rel=1e-5)
        assert float(metrics["flow/power"][row]) == pytest.approx(float((chosen - rejected).square().mean()), rel=1e-5)


def test_what_a_pair_draws_is_its_own() -> None:
    """8 = 2 x 4 = any order."""
    whole, rng = batch(8), Keyed(1)
    together, _ = step(sigma=0.1, context_dropout=0.5)(whole, rng)
    pairs = ArrayPairs(whole.mean[:, 1], whole.mean[:, 0], torch.arange(8))
    order = torch.tensor([6, 1, 0, 7, 3, 2, 5, 4])
    apart = torch.empty(8)
    for part in order.split(4):
        draws = tuple(10 + int(place) for place in part)
        apart[part] = step(sigma=0.1, context_dropout=0.5)(pairs.batch(part, draws, draws), rng)[0]
    torch.testing.assert_close(apart, together)
    later, _ = step(sigma=0.1)(pairs.batch(torch.arange(8), (1,) * 8, (0,) * 8), rng)
    assert not torch.allclose(later, together)  # another draw


def test_groups_pair_up_and_ranked_lists_take_the_ends() -> None:
    made = torch.Generator().manual_seed(0)
    given = batch(3, (2,))
    group = Batch(**vars(given) | {"mean": torch.randn(3, 4, 2, generator=made)})
    two = step(num_chosen=2).pairs(group, Keyed(0))
    assert torch.equal(two.chosen.view(3, 2, 2), group.mean[:, :2])
    assert torch.equal(two.rejected.view(3, 2, 2), group.mean[:, 2:])
    assert two.keys == tuple(key63(each, place) for each in group.ids for place in range(2))
    ends = step().pairs(group, Keyed(0))
    assert torch.equal(ends.chosen, group.mean[:, 0])
    assert torch.equal(ends.rejected, group.mean[:, 3])
    loss, metrics = step(num_chosen=2)(group, Keyed(0))
    assert loss.shape == metrics["flow/error"].shape == (3,)
    with pytest.raises(DataError, match="4 pictures of which 3 are chosen"):
        step(num_chosen=3)(group, Keyed(0))


def test_a_vote_that_may_be_wrong_is_turned_as_often() -> None:
    given = batch(4000, (1,), preference=torch.full((4000,), 0.8))
    pairs = step().pairs(given, Keyed(0))
    turned = (pairs.chosen != given.mean[:, 0]).float().mean()
    assert float(turned) == pytest.approx(0.2, abs=4 * math.sqrt(0.16 / 4000))
    assert torch.equal(step().pairs(batch(50), Keyed(0)).chosen, batch(50).mean[:, 0])


def test_contexts_that_are_equal_are_one() -> None:
    tokens = torch.randn(4, 3, 2)[torch.tensor([0, 1, 0, 3])]
    found = same_context(tokens, 4)
    assert (found[:, None] == found[None]).tolist() == [[a == b for b in (0, 1, 0, 3)] for a in (0, 1, 0, 3)]
    assert same_context(None, 3).tolist() == [0, 0, 0]
    assert same_context(torch.tensor([5, -1]), 2).tolist() == [5, -1]


def test_ot_within_contexts_lowers_the_power_and_never_leaves_a_context() -> None:
    given = batch(64, (2,))
    told = Batch(**vars(given) | {"conditioning": type(given.conditioning)({"context": torch.arange(64) % 2})})
    power = {
        name: float(step(coupling=name)(told, Keyed(0))[1]["flow/power"].mean()) for name in ("paired", "ot", "ot_per_context")
    }
    assert power["ot"] < power["ot_per_context"] < power["paired"]


def test_a_constant_shift_is_learned_exactly(tmp_path: Path) -> None:
    """v = d everywhere: any solver with one step adds d."""
    start = torch.randn(512, 2, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([1.5, -0.5])
    settings = FieldSettings((2,), width=32, levels=2)
    field = train(tmp_path, ArrayPairs(start, start + shift), settings, sigma=0.1, steps=400, batch_size=48)
    fresh = torch.randn(200, 2, generator=torch.Generator().manual_seed(9))
    for how in (Solve(solver="euler", steps=1), Solve(steps=4), Solve(strength=0.5)):
        moved = solve(guided(field, None), fresh, how).end - fresh
        torch.testing.assert_close(moved, how.strength * shift.expand_as(moved), atol=0.05, rtol=0)


def test_the_map_between_gaussians_is_the_monotone_one(tmp_path: Path) -> None:
    """Of N(0, 1) to N(2, ½²) in one dimension, optimal transport is y -> 2 + y / 2: v(s, y) = 2 − ½ (y − 2 s) / (1 − s / 2)."""
    made = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 4096, 1, generator=made)
    pairs = ArrayPairs(start, 2 + end / 2)
    field = train(tmp_path, pairs, FieldSettings((1,), width=64, levels=3), coupling="ot", steps=450, batch_size=24)
    y = torch.linspace(-1.5, 1.5, 31)[:, None]
    found = solve(guided(field, None), y, Solve(solver="rk4", steps=16)).end
    torch.testing.assert_close(found, 2 + y / 2, atol=0.12, rtol=0)
    s = torch.full((31,), 0.5)
    place = 0.5 * 2 + (1 - 0.5 / 2) * y
    known = 2 - 0.5 * (place - 2 * 0.5) / (1 - 0.5 / 2)
    torch.testing.assert_close(field(s, place), known, atol=0.2, rtol=0)


def test_swapped_pairs_lead_the_other_way(tmp_path: Path) -> None:
    """What a learning test must notice."""
    shift = torch.tensor([1.0, 0.0])
    start = 0.1 * torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    moved = {}
    for name, pairs in {"right": ArrayPairs(start, start + shift), "swapped": ArrayPairs(start + shift, start)}.items():
        field = train(tmp_path / name, pairs, FieldSettings((2,), width=16, levels=2), steps=150)
        moved[name] = float((solve(guided(field, None), start, Solve()).end - start)[:, 0].mean())
    assert moved["right"] == pytest.approx(1, abs=0.1)
    assert moved["swapped"] == pytest.approx(-1, abs=0.3)


def test_a_tie_teaches_no_direction(tmp_path: Path) -> None:
    start = torch.zeros(256, 1)
    tied = ArrayPairs(start, start + 1, preference=torch.full((256,), 0.5))
    field = train(tmp_path, tied, FieldSettings((1,), width=32, levels=2), sigma=0.1, steps=200)
    middle = torch.full((64, 1), 0.5)
    assert float(field(torch.full((64,), 0.5), middle).detach().mean()) == pytest.approx(0, abs=0.15)


@pytest.mark.parametrize("kind", ["class", "vector", "tokens"])
def test_each_context_has_its_own_direction_and_guidance_its_scale(kind: str, tmp_path: Path) -> None:
    size = {"class": 2, "vector": 3, "tokens": 3}[kind]
    labels = torch.arange(512) % 2
    contexts = {
        "class": labels,
        "vector": torch.eye(3)[labels],
        "tokens": torch.eye(3)[labels][:, None].expand(-1, 4, -1).contiguous(),
    }[kind]
    ends = torch.where(labels[:, None] == 0, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    start = 0.1 * torch.randn(512, 2, generator=torch.Generator().manual_seed(0))
    pairs = ArrayPairs(start, start + ends, contexts)
    settings = FieldSettings((2,), kind, size, width=32, levels=2)
    field = train(tmp_path, pairs, settings, context_dropout=0.2, steps=400, sigma=0.1)
    here = torch.zeros(2, 2)
    for place in range(2):
        told = contexts[place].expand(2, *contexts[place].shape)
        moved = solve(guided(field, told), here, Solve()).end
        torch.testing.assert_close(moved, ends[place].expand(2, 2), atol=0.12, rtol=0)
        # Without context: half of each. Guidance 0 is that; guidance 2 goes from there through what is told, and as far again.
        nothing = field(torch.zeros(2), here)
        v = guided(field, told, 2.0)(torch.zeros(2), here)
        expected = 2 * field(torch.zeros(2), here, told) - nothing
        torch.testing.assert_close(v, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(guided(field, told, 0.0)(torch.zeros(2), here), nothing, atol=1e-5, rtol=0)


def test_best_against_worst_of_two_reaches_the_known_optimum(tmp_path: Path) -> None:
    """The optimum of one step is p₁(y) ∝ π_ref(y) · E P(y ≻ y'), see docs/flow.md; with a deterministic reward and two samples
    P(y ≻ y') = F(y), which makes p₁ = 2 F f: the law of the larger of two. Of N(0, 1) its mean is 1/√π and its variance
    1 − 1/π. Training pairs are (smaller, larger); what is moved to it are samples of the smaller."""
    drawn = torch.randn(8192, 2, generator=torch.Generator().manual_seed(0))
    pairs = ArrayPairs(drawn.min(1, keepdim=True).values, drawn.max(1, keepdim=True).values)
    field = train(tmp_path, pairs, FieldSettings((1,), width=64, levels=3), steps=600, batch_size=96)
    fresh = torch.randn(8192, 2, generator=torch.Generator().manual_seed(1)).min(1, keepdim=True).values
    moved = solve(guided(field, None), fresh, Solve(solver="rk4", steps=16)).end[:, 0]
    assert float(moved.mean()) == pytest.approx(1 / math.sqrt(math.pi), abs=0.06)
    assert float(moved.var()) == pytest.approx(1 - 1 / math.pi, abs=0.08)
    # Fractions below points, against F²: the whole law and not its moments alone.
    for point in (-0.5, 0.0, 0.5, 1.0, 1.5):
        below = 0.5 * (1 + math.erf(point / math.sqrt(2)))
        assert float((moved < point).float().mean()) == pytest.approx(below**2, abs=0.05)
