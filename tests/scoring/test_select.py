"""From scores to comparisons: every picker is its rule, and what is written is what align reads."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import zscore as scipy_zscore

from flowalign import cli, runs
from flowalign.data.readers import open_comparisons
from flowalign.errors import ConfigError, DataError
from flowalign.scoring.calibration import calibrate
from flowalign.scoring.comparisons import pick
from flowalign.scoring.order import histogram_weights, order, potential, zscore
from flowalign.scoring.select import PICKERS, Pool, accepted, best_worst, dominates, frs, intersection, majority, margin
from flowalign.scoring.table import ScoreTable
from tests.scoring.pixels import encoded, picture
from tests.scoring.tables import table_of


def pool(rewards: object, score: object = None, seed: int = 0, prompt: str = "a thing") -> Pool:
    rewards = np.asarray(rewards, dtype=np.float64)
    one = rewards.mean(1) if score is None else np.asarray(score, dtype=np.float64)
    return Pool(prompt, np.arange(len(rewards)), rewards, one, seed)


def cases(count: int, seed: int = 0) -> list[np.ndarray]:
    """Small score matrices with many equal numbers in them."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, rng.integers(2, 6), (rng.integers(1, 8), rng.integers(1, 4))) / 5 for _ in range(count)]


# ------------------------------------------------------------------------------------------------ rejection sampling
def test_pictures_are_accepted_with_probability_exp_of_r_less_the_best_over_beta() -> None:
    """One turn, and all but the sure one left out: of two pictures the second is there by its own chance."""
    beta, gap, draws = 0.5, 0.4, 4000
    seen = [accepted(np.array([1.0, 1.0 - gap]), 1, beta, np.random.default_rng(seed)) for seed in range(draws)]
    # The worse one is first in half of the turns, and then taken with e^(−gap/β); the best one is always taken when met.
    chance = 0.5 * np.exp(-gap / beta)
    assert sum(one == [1] for one in seen) / draws == pytest.approx(chance, abs=4 * np.sqrt(chance * (1 - chance) / draws))


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_few_of_many_are_draws_of_the_policy_times_exp_of_r_over_beta(beta: float) -> None:
    levels, count = np.array([0.0, 0.5, 1.0]), 2000
    score = np.repeat(levels, 40_000)
    kept = score[accepted(score, count, beta, np.random.default_rng(0))]
    weight = np.exp(levels / beta)
    for level, share in zip(levels, weight / weight.sum(), strict=True):
        assert (kept == level).mean() == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / count))


def test_a_turn_whose_best_was_accepted_goes_by_the_best_that_is_left() -> None:
    """With a small β the turns take the pictures by rank; with a large one any, and all there are at most."""
    score = np.array([0.1, 0.9, 0.5, 0.7])
    assert accepted(score, 4, 1e-6, np.random.default_rng(0)) == [1, 3, 2, 0]
    assert sorted(accepted(score, 9, 1e9, np.random.default_rng(0))) == [0, 1, 2, 3]
    firsts = [accepted(score, 1, 1e9, np.random.default_rng(seed))[0] for seed in range(2000)]
    assert np.bincount(firsts) / 2000 == pytest.approx(0.25, abs=0.04)


def test_rso_pairs_what_it_accepted_and_belongs_to_prompt_and_seed() -> None:
    rewards = np.random.default_rng(0).random((12, 1))
    found = PICKERS["rso"](pool(rewards, seed=3))
    assert found == PICKERS["rso"](pool(rewards, seed=3))
    assert len(found) == 3
    assert len({place for pair in found for place in pair}) == 6
    assert all(rewards[a] >= rewards[b] for a, b in found)
    assert len({tuple(PICKERS["rso"](pool(rewards, seed=seed, prompt=p))) for seed in range(3) for p in "ab"}) > 3
    cold = replace(pool(rewards), temperature=1e-9)
    best = set(np.argsort(-rewards[:, 0])[:6].tolist())
    assert {place for pair in PICKERS["rso"](cold) for place in pair} == best


def test_labels_by_rates_are_half_the_gap_above_one_half(tmp_path: Path) -> None:
    table = table_of(["p"] * 3 + ["q"] * 3, {"r": [0.2, 0.9, 0.4, 0.5, 0.6, 0.1]})
    calibrate(table).apply(table).write(tmp_path / "table.parquet")
    out = tmp_path / "out.jsonl"
    runs.select(str(tmp_path / "table.parquet"), by="best_worst", out=out, labels="rates")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        won, lost = row["scores"]["combined"]
        assert row["preference"] == pytest.approx(0.5 + 0.5 * (won - lost))
        assert 0.5 < row["preference"] < 1
    runs.select(str(tmp_path / "table.parquet"), by="best_worst", out=out)
    assert all("preference" not in json.loads(line) for line in out.read_text().splitlines())
    wide = table_of(["p"] * 3, {"r": [1.0, 5.0, 9.0]})
    wide.write(tmp_path / "raw.parquet")
    with pytest.raises(DataError, match="a gap of 8; calibrate first"):
        runs.select(str(tmp_path / "raw.parquet"), by="best_worst", score="raw", out=out, labels="rates")
    with pytest.raises(DataError, match="labels are 'soft'; allowed: rates, votes"):
        runs.select(str(tmp_path / "table.parquet"), by="best_worst", out=out, labels="soft")
    with pytest.raises(ConfigError, match="temperature is 0; it must be above 0"):
        runs.select(str(tmp_path / "table.parquet"), by="rso", out=out, temperature=0.0)


# ------------------------------------------------------------------------------------------------ pickers
def front_pairs(rewards: list[list[float]]) -> set[tuple[int, int]]:
    """FRS by its words: fronts by peeling, pictures in both removed, pairs kept where x+ dominates x-."""

    def over(a: list[float], b: list[float]) -> bool:
        return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))

    every = range(len(rewards))
    upper = {i for i in every if not any(over(rewards[j], rewards[i]) for j in every)}
    lower = {i for i in every if not any(over(rewards[i], rewards[j]) for j in every)}
    both = upper & lower
    return {(i, j) for i, j in itertools.product(upper - both, lower - both) if over(rewards[i], rewards[j])}


def test_frs_is_its_definition_on_small_cases() -> None:
    fell_back = several = 0
    for rewards in cases(600):
        expected = front_pairs(rewards.tolist())
        found = frs(pool(rewards))
        if expected:
            assert set(found) == expected
            assert len(found) == len(expected)
            several += len(expected) > 1
            continue
        sums = rewards.sum(1).tolist()
        best, worst = sums.index(max(sums)), sums.index(min(sums))
        assert found == ([(best, worst)] if max(sums) > min(sums) else [])
        fell_back += bool(found)
    assert fell_back > 10
    assert several > 100


def test_a_chosen_picture_of_frs_is_nowhere_worse_and_best_against_worst_may_be() -> None:
    """The best by the sum wins by one huge reward; FRS does not let it stand against what beats it elsewhere."""
    rewards = np.array([[1.0, 0.2], [0.6, 0.5], [0.1, 0.3], [0.5, 0.1]])
    for better, worse in frs(pool(rewards)):
        assert (rewards[better] >= rewards[worse]).all()
    assert best_worst(pool(rewards))[0] == (0, 3) or (rewards[0] < rewards[best_worst(pool(rewards))[0][1]]).any()
    assert (0, 2) not in frs(pool(rewards))
    assert (1, 2) in frs(pool(rewards))
    assert dominates(rewards)[1, 2]


def test_best_and_worst_are_taken_from_both_ends() -> None:
    assert best_worst(pool([[0.1], [0.9], [0.5], [0.7], [0.3]])) == [(1, 0), (3, 4)]
    assert best_worst(pool([[0.4]])) == []


def test_margins_are_all_pairs_the_widest_first() -> None:
    for rewards in cases(50, seed=1):
        score = rewards.mean(1)
        found = margin(pool(rewards))
        assert {frozenset(pair) for pair in found} == {frozenset(p) for p in itertools.combinations(range(len(score)), 2)}
        gaps = [score[a] - score[b] for a, b in found]
        assert gaps == sorted(gaps, reverse=True)
        assert all(gap >= 0 for gap in gaps)


def test_an_intersection_is_better_by_every_reward() -> None:
    rewards = [[0.9, 0.8], [0.8, 0.1], [0.2, 0.7], [0.1, 0.2]]
    assert intersection(pool(rewards)) == [(0, 3)]
    assert intersection(pool([[0.5, 0.5]] * 4)) == []  # equal scores are in both halves
    assert intersection(pool([[0.9, 0.1], [0.1, 0.9]])) == []
    for case in cases(300, seed=2):
        for better, worse in intersection(pool(case)):
            assert (case[better] >= case[worse]).all()
            assert (case[better] > case[worse]).any()


def test_a_majority_asks_how_many_and_not_how_much() -> None:
    rewards = np.array([[0.6, 0.6, 0.0], [0.5, 0.5, 1.0], [0.4, 0.4, 0.5]])
    assert majority(pool(rewards)) == [(0, 2)]
    assert best_worst(pool(rewards))[0] == (1, 0)  # by the mean, the one with the huge reward
    assert majority(pool(rewards * [1, 1, 1000])) == [(0, 2)]
    assert majority(pool([[0.1, 0.9], [0.9, 0.1]])) == []
    for case in cases(200, seed=3):
        net = [sum(np.sign(np.sign(case[i] - other).sum()) for other in case) for i in range(len(case))]
        expected = [(net.index(max(net)), net.index(min(net)))] if max(net) > min(net) else []
        assert majority(pool(case)) == expected


def test_a_lot_belongs_to_prompt_and_seed() -> None:
    rewards = np.random.default_rng(0).random((9, 1))
    one = PICKERS["random"](pool(rewards, seed=3))
    assert one == PICKERS["random"](pool(rewards, seed=3))
    others = [PICKERS["random"](pool(rewards, seed=seed, prompt=p)) for seed in (3, 4) for p in ("a", "b")]
    assert len({tuple(each) for each in others}) == 4
    assert all(rewards[a] >= rewards[b] for each in others for a, b in each)
    firsts = [PICKERS["random"](pool(rewards, seed=seed))[0] for seed in range(400)]
    counts = np.bincount([each for pair in firsts for each in pair], minlength=9)
    assert counts.min() > 50  # every picture has its turn: 800 / 9 = 89


# ------------------------------------------------------------------------------------------------ orders
def test_alignment_potential_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    explicit, implicit = rng.normal(2, 3, 50), rng.normal(0, 0.01, 50)
    expected = scipy_zscore(explicit) - 2.5 * scipy_zscore(np.abs(implicit))
    assert potential(explicit, implicit, 2.5) == pytest.approx(expected)
    assert order("potential", explicit, implicit, [""] * 50, weight=2.5).tolist() == np.argsort(-expected).tolist()
    assert order("potential", explicit, implicit, [""] * 50, weight=0).tolist() == np.argsort(-explicit).tolist()


def test_the_implicit_margin_counts_by_its_size() -> None:
    """A model that is sure, of the right picture or of the wrong one, has less to learn than one that is not."""
    implicit = np.array([-3.0, 0.1, 2.0, -0.5])
    assert order("implicit", implicit, implicit, [""] * 4).tolist() == [1, 3, 2, 0]
    assert order("potential", np.ones(4), implicit, [""] * 4).tolist() == [1, 3, 2, 0]
    assert order("potential", np.ones(4), -implicit, [""] * 4).tolist() == [1, 3, 2, 0]
    assert order("explicit", implicit, implicit, [""] * 4).tolist() == [2, 1, 3, 0]


def test_a_random_order_belongs_to_the_comparisons() -> None:
    names = [f"p{k}" for k in range(40)]
    none = np.full(40, np.nan)
    one = [names[place] for place in order("random", none, none, names, seed=1)]
    assert one == [names[::-1][place] for place in order("random", none, none, names[::-1], seed=1)]
    assert one != [names[place] for place in order("random", none, none, names, seed=2)]


def test_what_an_order_reads_must_be_there() -> None:
    some, none = np.array([1.0, 2.0, 3.0]), np.array([1.0, np.nan, 2.0])
    with pytest.raises(DataError, match="1 of 3 comparisons have no implicit_margin, which potential reads"):
        order("potential", some, none, [""] * 3)
    with pytest.raises(DataError, match="1 of 3 comparisons have no margin, which explicit reads"):
        order("explicit", none, some, [""] * 3)
    with pytest.raises(DataError, match="did you mean 'implicit'"):
        order("implict", some, some, [""] * 3)


def test_zscores_of_equal_values_are_0() -> None:
    assert zscore(np.array([3.0, 3.0])).tolist() == [0.0, 0.0]


def test_rare_gaps_weigh_more() -> None:
    gaps = np.array([0.01] * 90 + [0.99] * 10)
    weights = histogram_weights(gaps, bins=2, power=0.5)
    assert weights.mean() == pytest.approx(1)
    assert weights[-1] / weights[0] == pytest.approx(3)  # √(0.9 / 0.1)
    assert histogram_weights(gaps, power=0.0) == pytest.approx(np.ones(100))
    assert histogram_weights(np.full(4, 0.3)).tolist() == [1.0] * 4
    assert len(histogram_weights(np.array([]))) == 0


# ------------------------------------------------------------------------------------------------ tables and files
def scored(paths: list[str] | None = None) -> ScoreTable:
    """Three prompts: one of five pictures, one of two equal ones, one of a single one; one picture lacks a score."""
    prompts = ["a"] * 6 + ["b"] * 2 + ["c"]
    scores = {"match": [0.1, 0.2, 0.3, 0.4, 0.5, np.nan, 0.2, 0.2, 0.3], "size": [9, 1, 5, 3, 2, 4, 7, 7, 1]}
    more = {"generator": ["g"] * 8 + [None], "seed": list(range(9))}
    return table_of(prompts, scores, paths=paths, cards={"size": {"better": "lower"}}, more=more)


def calibrated(paths: list[str] | None = None) -> ScoreTable:
    table = scored(paths)
    return calibrate(table).apply(table)


def test_pairs_are_picked_prompt_by_prompt() -> None:
    table = calibrated()
    one = table.numbers("combined")
    picked = pick(table, "best_worst")
    assert [(each.better, each.worse) for each in picked] == [(int(np.nanargmax(one)), int(np.nanargmin(one[:6])))]
    assert picked[0].gap == pytest.approx(one[picked[0].better] - one[picked[0].worse])
    assert all(5 not in (each.better, each.worse) for each in pick(table, "margin", least=0.0))


def test_ties_are_dropped_or_kept_as_ties() -> None:
    table = calibrated()
    kept = pick(table, "best_worst", ties="keep")
    assert [each.tie for each in kept] == [False, True]
    assert {kept[1].better, kept[1].worse} == {6, 7}
    wide = pick(table, "margin", ties="keep", tie_width=0.2, least=0.3)
    one = table.numbers("combined")
    assert all(abs(one[each.better] - one[each.worse]) <= 0.2 for each in wide if each.tie)
    assert all(each.gap >= 0.3 for each in wide if not each.tie)
    assert {each.tie for each in wide} == {True, False}


def test_prompts_have_a_cap_and_gaps_a_floor() -> None:
    table = calibrated()
    every = pick(table, "margin", least=0.0)
    assert len(every) == 10
    assert pick(table, "margin", least=0.0, most=3) == every[:3]
    floor = every[4].gap
    assert pick(table, "margin", least=floor) == [each for each in every if each.gap >= floor]


def test_one_reward_or_the_plain_sum_may_order() -> None:
    table = calibrated()
    (by_match,) = pick(table, "best_worst", score="match")
    assert (by_match.better, by_match.worse) == (4, 0)
    (by_size,) = pick(table, "best_worst", score="size")
    assert (by_size.better, by_size.worse) == (1, 0)  # lower is better
    (by_sum,) = pick(scored(), "best_worst", score="raw")
    assert (by_sum.better, by_sum.worse) == (1, 0)  # size is on the larger scale, so it decides
    assert by_sum.gap == pytest.approx((0.2 - 1) - (0.1 - 9))
    with pytest.raises(DataError, match="no calibrated scores of match, size; run flowalign calibrate"):
        pick(scored(), "frs")
    with pytest.raises(DataError, match="score is 'mach'; did you mean 'match'"):
        pick(table, "best_worst", score="mach")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A calibrated table whose pictures are files."""
    (tmp_path / "in").mkdir()
    paths = [tmp_path / "in" / f"{number}.png" for number in range(9)]
    for number, path in enumerate(paths):
        path.write_bytes(encoded(picture(number)))
    calibrated([str(path) for path in paths]).write(tmp_path / "in" / "table.parquet")
    return tmp_path


@pytest.mark.parametrize("by", [*PICKERS, "explicit"])
def test_what_is_written_is_read_as_comparisons(written: Path, by: str) -> None:
    out = written / "out" / "pairs.jsonl"
    result = runs.select(str(written / "in" / "table.parquet"), by=by, out=out)
    found = open_comparisons(out)
    assert len(found) == result["count"] >= 1
    table = calibrated()
    for row, comparison in zip(out.read_text().splitlines(), found[:], strict=True):
        assert all(name.startswith("../in/") for name in json.loads(row)["images"])
        places = [int(Path(image.name).stem) for image in comparison.images]
        assert [image.read() for image in comparison.images] == [encoded(picture(place)) for place in places]
        assert comparison.prompt == table.texts("prompt")[places[0]] == table.texts("prompt")[places[1]]
        assert comparison.seed == tuple(places)
        assert comparison.generator == ("g", "g")
        assert comparison.scores is not None
        for name in ("match", "size"):
            assert comparison.scores[name] == pytest.approx(table.numbers(f"calibrated.{name}")[places])
        one = table.numbers("combined")[places]
        assert comparison.scores["combined"] == pytest.approx(one)
        assert comparison.margin == pytest.approx(one[0] - one[1])
        assert comparison.preference == 1.0


def test_ties_and_weights_are_written(written: Path) -> None:
    out = written / "pairs.jsonl"
    runs.select(str(written / "in" / "table.parquet"), by="margin", out=out, ties="keep", weights="histogram", least=0.0)
    found = open_comparisons(out)[:]
    assert [each.is_tie for each in found] == [False] * 10 + [True]
    weights = [each.weight for each in found]
    assert np.mean(weights) == pytest.approx(1)
    assert weights == pytest.approx(histogram_weights(np.array([each.margin for each in found])).tolist())


def test_a_tie_that_is_kept_stays_one_whatever_the_labels(tmp_path: Path) -> None:
    table = calibrated([f"{tmp_path}/{number}.png" for number in range(9)])
    table.having({"combined": [0.9, 0.8, 0.1, *[None] * 3, 0.5, 0.5, 0.4]}).write(tmp_path / "table.parquet")
    out = tmp_path / "out.jsonl"
    runs.select(tmp_path / "table.parquet", by="margin", out=out, least=0.0, ties="keep", tie_width=0.2, labels="rates")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["preference"] for row in rows] == pytest.approx([0.9, 0.85, 0.5, 0.5])


def written_of(calls: Sequence[dict[str, object]], source: Path, out: Path) -> list[str]:
    """What is written by each of these calls."""
    found = []
    for call in calls:
        runs.select(source, out=out, **call)  # type: ignore[arg-type]
        found.append(out.read_text())
    return found


GIVEN: dict[str, object] = {
    "score": "combined",
    "most": 2,
    "least": 0.0,
    "ties": "drop",
    "tie_width": 0.0,
    "labels": "votes",
    "temperature": 0.5,
    "objectives": ["match", "size"],
    "alpha": 1.0,
    "draws": 4,
    "potential_weight": 1.0,
}
"""Every option that not all ways read, as it is unless told otherwise, but for most."""


@pytest.mark.parametrize("by", [*PICKERS, "steered", "explicit"])
def test_options_that_a_way_does_not_read_are_refused(written: Path, by: str) -> None:
    source, out = written / "in" / "table.parquet", written / "out.jsonl"
    steering, ties = {"objectives", "alpha", "draws"}, {"ties", "tie_width"}
    refused = {"potential_weight"} | ({"score", "most"} | ties if by == "steered" else steering)
    refused |= ({"temperature"} if by != "rso" else set()) | (ties if by in ("frs", "intersection", "majority") else set())
    for name, value in GIVEN.items():
        refusal = pytest.raises(ConfigError, match=f"{name} is given, which {by} does not read, only ")
        with refusal if name in refused else nullcontext():
            runs.select(source, by=by, out=out, **{name: value})  # type: ignore[arg-type]
    usual = {name: value for name, value in GIVEN.items() if name not in {*refused, "most", "least"}}
    plain, told = written_of([{"by": by}, {"by": by, **usual}], source, out)
    assert plain == told  # what is not given is as usual


@pytest.mark.parametrize("by", ["explicit", "implicit", "potential", "random"])
def test_comparisons_are_picked_already(tmp_path: Path, by: str) -> None:
    source, out = comparisons(tmp_path), tmp_path / "out.jsonl"
    for name, value in (GIVEN | {"plan": tmp_path / "plan.jsonl"}).items():
        if name == "potential_weight" and by == "potential":
            plain, told = written_of([{"by": by}, {"by": by, name: value}], source, out)
            assert plain == told
            continue
        with pytest.raises(ConfigError, match=f"{name} is given, which"):
            runs.select(source, by=by, out=out, **{name: value})  # type: ignore[arg-type]


def test_a_plan_has_its_weights_already(written: Path) -> None:
    how = {"by": "steered", "plan": written / "plan.jsonl", "out": written / "out.jsonl", "draws": 2}
    with pytest.raises(ConfigError, match="draws is given beside a plan"):
        runs.select(written / "in" / "table.parquet", **how)  # type: ignore[arg-type]


def test_cells_of_parquet_are_named_and_members_of_archives_are_refused(tmp_path: Path) -> None:
    cells = [f"{tmp_path}/pictures.parquet#{row}:image" for row in range(9)]
    calibrated(cells).write(tmp_path / "table.parquet")
    runs.select(str(tmp_path / "table.parquet"), by="best_worst", out=tmp_path / "sub" / "pairs.jsonl")
    row = json.loads((tmp_path / "sub" / "pairs.jsonl").read_text().splitlines()[0])
    assert row["images"][1] == "../pictures.parquet#0:image"
    calibrated([f"shard.tar:{row}" for row in range(9)]).write(tmp_path / "table.parquet")
    with pytest.raises(DataError, match="lies in an archive"):
        runs.select(str(tmp_path / "table.parquet"), by="best_worst", out=tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


def test_pictures_without_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    """They belong together no more than any others."""
    table = calibrated([f"{tmp_path}/{number}.png" for number in range(9)])
    table.having({"prompt": pa.array(["a"] * 4 + [None] * 3 + [" "] * 2)}).write(tmp_path / "some.parquet")
    how = {"by": "margin", "least": 0.0, "ties": "keep"}
    result = runs.select(str(tmp_path / "some.parquet"), out=tmp_path / "pairs.jsonl", **how)  # type: ignore[arg-type]
    found = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in found] == ["a"] * 6
    assert result["without_prompt"] == 5
    assert "5 pictures without a prompt were left out" in result["summary"]
    table.having({"prompt": pa.nulls(9, pa.string())}).write(tmp_path / "none.parquet")
    with pytest.raises(DataError, match=r"no picture of the table has a prompt.*--prompt TEXT"):
        runs.select(str(tmp_path / "none.parquet"), by="margin", out=tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


def comparisons(folder: Path, count: int = 10) -> Path:
    """Pairs with margins that fall and implicit margins that rise in size, with alternating signs."""
    lines = []
    for number in range(count):
        row = {"prompt": f"p{number}", "chosen": f"{number}.png", "rejected": f"{number + 1}.png", "margin": 1 - number / count}
        lines.append(row | {"implicit_margin": (-1) ** number * number / 100, "concept": f"c{number}", "weight": 0.5})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "pairs.jsonl"


@pytest.mark.parametrize("by", ["potential", "explicit", "implicit"])
def test_comparisons_are_thinned_out_and_else_left_as_they_were(tmp_path: Path, by: str) -> None:
    out = tmp_path / "other" / "kept.jsonl"
    result = runs.select(str(comparisons(tmp_path)), by=by, out=out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [f"p{number}" for number in range(4)]  # 40 % of 10
    assert result["summary"].startswith("4 of 10 comparisons")
    first = json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])
    kept = {name: value for name, value in first.items() if name not in ("chosen", "rejected")}
    assert rows[0] == kept | {"images": ["../0.png", "../1.png"], "num_chosen": 1}
    runs.select(str(comparisons(tmp_path)), by=by, out=out, ratio=1.0)
    assert len(out.read_text().splitlines()) == 10


def test_groups_ranked_lists_and_votes_stay_what_they_are(tmp_path: Path) -> None:
    rows = [
        {"prompt": "g", "images": ["1.png", "2.png", "3.png", "4.png"], "num_chosen": 2, "scores": {"r": [4, 3, 2, 1]}},
        {"prompt": "l", "images": ["1.png", "2.png", "3.png"], "grades": [2, 1, 0], "annotator": "me"},
        {"prompt": "t", "images": ["1.png", "2.png"], "preference": 0.5, "mask": ["m.png", "m.png"], "seed": [3, 4]},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, row in enumerate(rows):  # one kind a file
        (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
        runs.select(str(tmp_path / "in.jsonl"), by="random", out=tmp_path / f"{number}.jsonl", ratio=1.0)
        before, after = open_comparisons(tmp_path / "in.jsonl")[0], open_comparisons(tmp_path / f"{number}.jsonl")[0]
        assert [image.path.name for image in after.images] == [image.path.name for image in before.images]
        for name in ("prompt", "num_chosen", "scores", "grades", "preference", "seed", "annotator", "weight"):
            assert getattr(after, name) == getattr(before, name)
        assert (after.mask is None) == (before.mask is None)


def test_bad_rows_are_counted(tmp_path: Path) -> None:
    path = comparisons(tmp_path)
    path.write_text(path.read_text() + '{"prompt": "", "chosen": "1.png", "rejected": "2.png"}\n')
    result = runs.select(str(path), by="explicit", out=tmp_path / "kept.jsonl")
    assert (result["given"], result["bad_rows"], result["count"]) == (11, 1, 4)


@pytest.mark.parametrize(
    ("make", "arguments", "said"),
    [
        ("table", ["--by", "potential"], "reads what flowalign margins adds to comparisons"),
        ("pairs", ["--by", "frs"], "picks pairs from a score table"),
        ("table", ["--by", "margin", "--least", "7"], "margin selects nothing from"),
        ("table", ["--by", "best_worst", "--ratio", "2"], "ratio is 2.0; it is a share"),
        ("table", ["--by", "best_worst", "--score", "mach"], "did you mean 'match'"),
        ("none", ["--by", "frs"], "none.parquet does not exist"),
        ("table", ["--by", "best_worst", "--temperature", "0.5"], "best_worst does not read, only rso"),
        ("pairs", ["--by", "potential", "--ties", "keep"], "ties is given, which a score table's pairs are picked with"),
    ],
)
def test_mistakes_are_one_sentence(
    written: Path, make: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    makers: dict[str, Callable[[], Path]] = {
        "table": lambda: written / "in" / "table.parquet",
        "pairs": lambda: comparisons(written),
        "none": lambda: written / "none.parquet",
    }
    out = written / "out.jsonl"
    assert cli.main(["select", str(makers[make]()), *arguments, "--out", str(out)]) == (1 if "nothing" in said else 2)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not out.exists()
