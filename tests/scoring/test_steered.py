"""Pairs of one pool under drawn weights: the winner is that of w·R, and w is a Dirichlet's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import dirichlet, kstest

from flowalign import cli, runs
from flowalign.align.objectives.dpo import dpo
from flowalign.align.terms import Terms
from flowalign.data.readers import open_comparisons
from flowalign.errors import ConfigError, DataError
from flowalign.scoring.comparisons import rows_of
from flowalign.scoring.steered import drawn_weights, steered
from flowalign.scoring.table import ScoreTable
from tests.scoring.pixels import encoded, picture
from tests.scoring.tables import table_of

PROMPTS = [f"thing {place // 4}" for place in range(20)] + ["alone"]


def table(paths: list[str] | None = None) -> ScoreTable:
    rng = np.random.default_rng(3)
    scores = rng.random((len(PROMPTS), 3))
    scores[5, 1] = np.nan  # a picture that one reward could not score
    raw = {name: scores[:, place] * 10**place for place, name in enumerate(("clip", "style", "size"))}
    calibrated = {f"calibrated.{name}": scores[:, place] for place, name in enumerate(("clip", "style", "size"))}
    return table_of(PROMPTS, raw, paths=paths, more={"seed": list(range(len(PROMPTS)))}).having(calibrated)


@pytest.mark.parametrize("objectives", [(), ("clip", "style"), ("size", "clip")])
def test_the_winner_is_that_of_the_weighed_scores(objectives: tuple[str, ...]) -> None:
    names = objectives or ("clip", "style", "size")
    scores = table()
    found = steered(scores, objectives, alpha=0.7, draws=5, seed=2)
    values = {name: scores.numbers(f"calibrated.{name}") for name in names}
    place = iter(found)
    for number in range(5):
        rows = [row for row in range(4 * number, 4 * number + 4) if not ("style" in names and row == 5)]
        for draw in range(5):
            weights = drawn_weights(len(names), 0.7, f"thing {number}", draw, seed=2)
            total = {row: sum(w * values[name][row] for w, name in zip(weights, names, strict=True)) for row in rows}
            pair = next(place)
            assert pair.better == max(total, key=lambda row: total[row])
            assert pair.worse == min(total, key=lambda row: total[row])
            assert pair.gap == pytest.approx(max(total.values()) - min(total.values()))
            assert pair.weights == pytest.approx(dict(zip(names, weights, strict=True)))
    assert next(place, None) is None
    assert len({(pair.better, pair.worse) for pair in found}) > 5  # weights matter


def test_a_mixture_is_each_objective_voting_for_itself_with_its_weight() -> None:
    """dpo on the label is Σ_k w_k L_dpo^(k), where L^(k) takes for the better picture what is better by objective k."""
    scores, names = table(), ("clip", "style")
    votes, found = (steered(scores, names, draws=5, labels=labels) for labels in ("votes", "mixture"))
    assert [pair.label for pair in votes] == [None] * len(votes)
    values = {name: scores.numbers(f"calibrated.{name}") for name in names}
    seen = set()
    for pair, vote in zip(found, votes, strict=True):
        assert (pair.better, pair.worse, pair.weights) == (vote.better, vote.worse, vote.weights)
        assert pair.label is not None
        assert pair.weights is not None
        margin = torch.tensor([0.37])
        terms = Terms(-margin[:, None] * torch.tensor([[1.0, -1.0]]), torch.zeros(1, 2), None, torch.tensor([pair.label]))
        parts = [values[name][pair.better] > values[name][pair.worse] for name in names]
        signs = torch.tensor([1.0 if part else -1.0 for part in parts])
        weights = torch.tensor([pair.weights[name] for name in names])
        expected = -(weights * torch.log(torch.sigmoid(signs * 2.0 * terms.margin))).sum()
        torch.testing.assert_close(dpo(terms, beta=2.0)[0], expected.float(), rtol=1e-5, atol=1e-6)
        seen.add(tuple(parts))
    assert len(seen) > 1


def test_what_a_mixture_says_is_written(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{place}.png") for place in range(len(PROMPTS))]
    for number, path in enumerate(paths):
        Path(path).write_bytes(encoded(picture(number)))
    table(paths).write(tmp_path / "scores.parquet")
    out = tmp_path / "pairs.jsonl"
    common = ["select", str(tmp_path / "scores.parquet"), "--by", "steered", "--out", str(out)]
    assert cli.main([*common, "--labels", "mixture"]) == 0
    comparisons = open_comparisons(str(out))
    labels = [comparisons[place].preference for place in range(len(comparisons))]
    assert 0 < min(labels) < 1
    assert len(set(labels)) > 3


@pytest.mark.parametrize(("by", "labels"), [("steered", "rates"), ("best_worst", "mixture")])
def test_labels_that_a_way_of_picking_does_not_have_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], by: str, labels: str
) -> None:
    table().write(tmp_path / "scores.parquet")
    command = ["select", str(tmp_path / "scores.parquet"), "--by", by, "--labels", labels, "--out", str(tmp_path / "p.jsonl")]
    assert cli.main(command) == 2
    assert f"labels are '{labels}'" in capsys.readouterr().err


def test_a_pairs_one_score_is_that_of_its_weights() -> None:
    scores = table().having({"combined": np.linspace(0, 1, len(PROMPTS))})
    for pair, row in zip(found := steered(scores, draws=2), rows_of(scores, found, "combined"), strict=True):
        better, worse = row["scores"]["combined"]
        assert better - worse == pytest.approx(pair.gap)
        assert pair.weights is not None
        assert better == pytest.approx(sum(w * row["scores"][name][0] for name, w in pair.weights.items()))
    (plain,) = rows_of(scores, [replace(found[0], weights=None)], "combined")
    assert plain["scores"]["combined"] == scores.numbers("combined")[[found[0].better, found[0].worse]].tolist()


def test_corners_are_the_best_and_worst_of_one_reward() -> None:
    scores = table()
    for pair in steered(scores, ("clip", "size"), alpha=1e-3, draws=8):
        assert pair.weights is not None
        name = max(pair.weights, key=lambda each: pair.weights[each])  # type: ignore[index]
        rows = scores.groups()[PROMPTS[pair.better]]
        values = scores.numbers(f"calibrated.{name}")
        assert (pair.better, pair.worse) == (rows[values[rows].argmax()], rows[values[rows].argmin()])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_weights_are_drawn_from_the_dirichlet(alpha: float) -> None:
    drawn = np.stack([drawn_weights(3, alpha, f"prompt {place}", draw) for place in range(500) for draw in range(4)])
    law = dirichlet([alpha] * 3)
    np.testing.assert_allclose(drawn.sum(1), 1)
    np.testing.assert_allclose(drawn.mean(0), law.mean(), atol=0.03)
    np.testing.assert_allclose(np.cov(drawn.T), law.cov(), atol=0.02)
    from scipy.stats import beta

    assert kstest(drawn[:, 0], beta(alpha, 2 * alpha).cdf).pvalue > 1e-3  # each is a Beta's


def test_pictures_drawn_under_weights_are_judged_by_the_same_and_no_others() -> None:
    scores = table()
    told = [{"clip": 0.9, "size": 0.1}, {"clip": 0.1, "size": 0.9}]
    under = [told[row % 2] for row in range(len(PROMPTS))]
    found = steered(scores, ("clip", "size"), under=under)
    values = {name: scores.numbers(f"calibrated.{name}") for name in ("clip", "size")}
    expected = []
    for number in range(5):
        for side in (0, 1):
            total = {
                row: sum(told[side][name] * values[name][row] for name in values)
                for row in range(4 * number + side, 4 * number + 4, 2)
            }
            expected.append((max(total, key=total.get), min(total, key=total.get), told[side]))  # type: ignore[arg-type]
    assert [(pair.better, pair.worse) for pair in found] == [each[:2] for each in expected]
    assert [pair.weights for pair in found] == [pytest.approx(each[2]) for each in expected]

    turned = steered(scores, ("clip", "size"), under=[told[1 - row % 2] for row in range(len(PROMPTS))])
    both = [{(pair.better, pair.worse) for pair in each} for each in (found, turned)]
    assert any((worse, better) in both[1] for better, worse in both[0])  # the same pictures, the other way round
    assert steered(scores, ("clip", "size"), under=[told[0]] * len(PROMPTS), least=10.0) == []
    with pytest.raises(DataError, match="weighs 'style', no objective"):
        steered(scores, ("clip", "size"), under=[{"style": 1.0}] * len(PROMPTS))


def test_a_plan_is_read_whatever_its_prompts_hold(tmp_path: Path) -> None:
    prompts = ["one\u2028two"] * 2 + ["three\u2029four\x85five"] * 2
    rows = [{"prompt": prompt, "seed": row, "weights": {"clip": 0.2, "style": 0.8}} for row, prompt in enumerate(prompts)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "plan.jsonl").write_text(text, encoding="utf-8")
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for number, path in enumerate(paths):
        path.write_bytes(encoded(picture(number)))
    raw = {"clip": np.arange(4.0), "style": np.arange(4.0)}
    scores = table_of(
        prompts, raw, paths=[str(tmp_path / f"{number}.png") for number in range(4)], more={"seed": list(range(4))}
    )
    scores.having({f"calibrated.{name}": values for name, values in raw.items()}).write(tmp_path / "table.parquet")
    out, plan = tmp_path / "pairs.jsonl", tmp_path / "plan.jsonl"
    runs.select(str(tmp_path / "table.parquet"), by="steered", out=out, objectives=("clip", "style"), plan=plan)
    assert [comparison.prompt for comparison in open_comparisons(out)] == [prompts[0], prompts[2]]


def test_weights_belong_to_seed_prompt_and_draw() -> None:
    one = drawn_weights(2, 1.0, "a", 0, 0)
    assert np.array_equal(one, drawn_weights(2, 1.0, "a", 0, 0))
    others = [drawn_weights(2, 1.0, prompt, draw, seed) for prompt, draw, seed in (("b", 0, 0), ("a", 1, 0), ("a", 0, 1))]
    assert len({tuple(each) for each in (one, *others)}) == 4
    assert steered(table(), draws=3)[:3] == steered(table(), draws=6)[:3]  # more draws leave the first ones as they are


def test_what_cannot_be_weighed_is_refused() -> None:
    with pytest.raises(DataError, match="objectives names 'stile', which the table has not scored; did you mean 'style'"):
        steered(table(), ("clip", "stile"))
    with pytest.raises(DataError, match="objectives are clip; weights need two different rewards or more"):
        steered(table(), ("clip",))
    with pytest.raises(DataError, match="weights need two different rewards"):
        steered(table(), ("clip", "clip"))
    with pytest.raises(DataError, match=r"clip is not calibrated.*run flowalign calibrate first"):
        steered(table_of(["a", "a"], {"clip": [0.1, 0.2], "style": [0.1, 0.2]}))
    for alpha in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ConfigError, match="alpha is"):
            steered(table(), alpha=alpha)


def test_the_command_writes_comparisons_that_hold_their_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(len(PROMPTS))]
    for number, path in enumerate(paths):
        path.write_bytes(encoded(picture(number)))
    scores = table([str(path) for path in paths])
    scores.write(tmp_path / "table.parquet")
    words = ["--by", "steered", "--objectives", "clip", "style", "--alpha", "0.5", "--draws", "3", "--seed", "4"]
    assert cli.main(["select", str(tmp_path / "table.parquet"), *words, "--out", str(tmp_path / "pairs.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["count"] == 15
    expected = steered(scores, ("clip", "style"), alpha=0.5, draws=3, seed=4)
    for pair, comparison in zip(expected, open_comparisons(tmp_path / "pairs.jsonl"), strict=True):
        assert comparison.objective_weights == pytest.approx(dict(pair.weights or {}))
        assert [Path(image.name).name for image in comparison.images] == [f"{pair.better}.png", f"{pair.worse}.png"]
        assert comparison.margin == pytest.approx(pair.gap)

    rows = [{"prompt": prompt, "seed": row, "weights": {"clip": 0.2, "style": 0.8}} for row, prompt in enumerate(PROMPTS)]
    (tmp_path / "plan.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--by", "steered", "--objectives", "clip", "style", "--plan", str(tmp_path / "plan.jsonl")]
    command = ["select", str(tmp_path / "table.parquet"), *words, "--out", str(tmp_path / "planned.jsonl")]
    assert cli.main(command) == 0
    planned = list(open_comparisons(tmp_path / "planned.jsonl"))
    assert len(planned) == 5
    for comparison in planned:
        assert comparison.objective_weights == pytest.approx({"clip": 0.2, "style": 0.8})
    for text, what in (("", "has no weights for the picture of 'thing 0' and seed 0"), ("{", "is not a plan of pictures")):
        (tmp_path / "plan.jsonl").write_text(text)
        assert cli.main(command) == 2
        assert what in capsys.readouterr().err
