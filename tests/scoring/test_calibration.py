"""A calibration as a file and on tables: what it adds, what it refuses, which pairs it is fitted on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit

from flowalign import cli, runs
from flowalign.data.readers import open_comparisons
from flowalign.errors import DataError
from flowalign.runs.calibration import page
from flowalign.scoring.calibrate import win_rate
from flowalign.scoring.calibration import calibrate, read_calibration
from flowalign.scoring.labelled import Labelled, match
from flowalign.scoring.table import ScoreTable, read_table
from tests.scoring.pixels import encoded, picture
from tests.scoring.tables import table_of

PROMPTS, EACH = 40, 6


@cache
def world(seed: int = 0, temperature: float = 0.05) -> tuple[ScoreTable, Labelled]:
    """A reward on a small scale that judges go by, one where lower is better and judges go by a little, and one of noise."""
    rng = np.random.default_rng(seed)
    count = PROMPTS * EACH
    prompts = [f"prompt {row // EACH}" for row in range(count)]
    good, cost, noise = rng.normal(0.3, 0.1, count), rng.normal(500, 200, count), rng.normal(size=count)
    scores = {"good": good, "cost": cost, "noise": noise}
    table = table_of(prompts, scores, cards={"cost": {"better": "lower"}})
    first = np.repeat(np.arange(count), 2)
    second = first - first % EACH + (first + rng.integers(1, EACH, len(first))) % EACH
    utility = good / temperature - 0.002 * cost
    label = (rng.random(len(first)) < expit(utility[first] - utility[second])).astype(float)
    return table, Labelled(first, second, label, tuple(prompts[row] for row in first), len(first))


def write_pairs(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_temperatures_are_found_and_win_rates_are_theirs() -> None:
    table, labelled = world()
    found = calibrate(table, labelled, method="temperature")
    assert found.rewards["good"].link.temperature == pytest.approx(0.06, rel=0.4)
    assert found.rewards["cost"].link.slope > 0  # lower is better
    done = found.apply(table)
    for name in table.rewards:
        expected = np.concatenate([win_rate(table.oriented(name)[rows], found.rewards[name].link) for rows in _groups(table)])
        assert done.numbers(f"calibrated.{name}") == pytest.approx(expected)
    assert done.numbers("combined") == pytest.approx(done.calibrated().mean(1))
    assert done.numbers("disagreement") == pytest.approx(done.calibrated().std(1))
    low, high = done.calibrated().min(), done.calibrated().max()
    assert low >= 0
    assert high <= 1


def _groups(table: ScoreTable) -> list[np.ndarray]:
    return list(table.groups().values())


@pytest.mark.parametrize("method", ["temperature", "platt", "isotonic"])
def test_what_it_says_of_itself_is_better_after_than_before(method: str) -> None:
    table, labelled = world()
    good = calibrate(table, labelled, method=method).rewards["good"]
    assert good.before["log_loss"][0] > 0.6  # σ of a difference of 0.1 says nothing
    assert good.after["log_loss"][0] < good.before["log_loss"][0] - 0.1
    assert good.after["ece"][0] < 0.08 < good.before["ece"][0]
    assert good.after["accuracy"][0] == pytest.approx(good.before["accuracy"][0], abs=0.02)
    for measure in ("accuracy", "log_loss", "brier", "ece"):
        value, low, high = good.after[measure]
        assert low <= value <= high
    assert sum(dot["count"] for dot in good.after["reliability"]) == len(labelled)


def test_swapped_labels_are_told() -> None:
    table, labelled = world()
    swapped = Labelled(labelled.first, labelled.second, 1 - labelled.label, labelled.prompts, labelled.given)
    found = calibrate(table, swapped)
    assert found.rewards["good"].link.slope < 0
    assert found.rewards["good"].before["accuracy"][0] < 0.3
    assert any("contradict good" in line for line in page(found))
    assert not any("contradict good" in line for line in page(calibrate(table, labelled)))


def test_a_fusion_beats_its_rewards_and_combines_by_itself() -> None:
    table, labelled = world()
    found = calibrate(table, labelled, fuse=True)
    assert found.fusion is not None
    weight = dict(zip(found.fusion.rewards, found.fusion.weights, strict=True))
    assert weight["good"] > weight["cost"] > abs(weight["noise"])
    assert found.fused["log_loss"][0] < min(each.after["log_loss"][0] for each in found.rewards.values())
    done, utility = found.apply(table), found.fusion.utility(np.stack([table.oriented(n) for n in table.rewards], axis=1))
    rows = _groups(table)[3]
    assert done.numbers("combined")[rows] == pytest.approx(win_rate(utility[rows], expit))
    assert found.apply(table, by="mean").numbers("combined") == pytest.approx(done.calibrated().mean(1))


def test_a_base_generator_is_the_opponent() -> None:
    table, labelled = world()
    base = table.select(np.concatenate([rows[:2] for rows in _groups(table)[1:]]))  # it lacks the first prompt
    for found in (calibrate(table, labelled, fuse=True), calibrate(table)):
        done = found.apply(table, base=base)
        mine, theirs = _groups(table)[1], _groups(base)[0]
        link = found.rewards["cost"].link
        expected = win_rate(table.oriented("cost")[mine], link, base.oriented("cost")[theirs])
        assert done.numbers("calibrated.cost")[mine] == pytest.approx(expected)
        assert np.isnan(done.numbers("calibrated.cost")[_groups(table)[0]]).all()
        assert np.isnan(done.numbers("combined")[_groups(table)[0]]).all()
        assert not np.isnan(done.numbers("combined")[mine]).any()


def test_without_labels_temperatures_are_the_spread_within_prompts() -> None:
    """Rewards on scales of 0.1 and 200 come out alike, and the spread between prompts counts for nothing."""
    table, _ = world()
    shifted = table.having({"raw.good": table.raw("good") + np.repeat(np.arange(PROMPTS), EACH)})
    found = calibrate(shifted)
    tau = {name: each.link.temperature for name, each in found.rewards.items()}
    assert tau == pytest.approx({"good": 0.1 * math.sqrt(2), "cost": 200 * math.sqrt(2), "noise": math.sqrt(2)}, rel=0.15)
    spreads = found.apply(shifted).calibrated().std(0)
    assert spreads == pytest.approx(np.full(3, spreads.mean()), rel=0.1)
    assert found.method == "winrate"


def test_winrate_is_measured_where_there_are_labels() -> None:
    table, labelled = world()
    found = calibrate(table, labelled, method="winrate")
    assert found.rewards["good"].link == calibrate(table).rewards["good"].link
    assert found.rewards["good"].after["accuracy"][0] > 0.7


def test_laws_of_ties_stand_in_for_temperatures() -> None:
    table, labelled = world()
    close = np.abs(table.raw("good")[labelled.first] - table.raw("good")[labelled.second]) < 0.05
    tied = Labelled(labelled.first, labelled.second, np.where(close, 0.5, labelled.label), labelled.prompts, labelled.given)
    for kind in ("rao_kupper", "davidson"):
        found = calibrate(table, tied, ties=kind)
        law = found.rewards["good"].ties
        assert law is not None
        assert law.kind == kind
        assert law(0.0)[1] > 0.3
        rows = _groups(table)[0]
        expected = win_rate(table.oriented("good")[rows], law.preferred)
        assert found.apply(table).numbers("calibrated.good")[rows] == pytest.approx(expected)
    assert calibrate(table, labelled, ties="davidson").rewards["good"].ties is None  # no label is a tie
    with pytest.raises(DataError, match="'davidson' has a temperature of its own"):
        calibrate(table, tied, ties="davidson", method="platt")


def test_scores_that_are_missing_stay_missing() -> None:
    table, labelled = world()
    raw = table.raw("good").copy()
    raw[[0, 7]] = np.nan
    table = table.having({"raw.good": raw})
    done = calibrate(table, labelled, fuse=True).apply(table)
    assert np.flatnonzero(np.isnan(done.numbers("combined"))).tolist() == [0, 7]
    assert np.flatnonzero(np.isnan(done.numbers("disagreement"))).tolist() == [0, 7]
    assert not np.isnan(done.numbers("calibrated.cost")).any()


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    table, labelled = world()
    tied = Labelled(
        labelled.first, labelled.second, np.where(labelled.first % 5 == 0, 0.5, labelled.label), labelled.prompts, 9
    )
    for number, options in enumerate(({"method": "isotonic", "fuse": True}, {"ties": "rao_kupper"}, {"method": "platt"})):
        found = calibrate(table, tied, **options)  # type: ignore[arg-type]
        found.write(tmp_path / f"{number}.json")
        again = read_calibration(tmp_path / f"{number}.json")
        assert again == found
        assert again.apply(table).data.equals(found.apply(table).data)
    assert json.loads((tmp_path / "0.json").read_text())["version"] == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not a calibration"),
        ("[]", "is not a calibration"),
        ('{"flowalign": "calibration", "version": 1, "rewards": {"a": 3}}', "is not a calibration"),
        ('{"flowalign": "calibration", "version": 7}', "is a calibration of version 7; this flowalign reads version 1"),
        ('{"flowalign": "plan", "version": 1}', "is a plan of version 1"),
    ],
)
def test_other_files_are_refused_in_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(DataError, match=said):
        read_calibration(tmp_path / "c.json")
    with pytest.raises(DataError, match="is not a calibration"):
        read_calibration(tmp_path / "none.json")


def test_other_rewards_are_refused() -> None:
    table, labelled = world()
    found = calibrate(table, labelled, fuse=True)
    other = table_of([str(p) for p in table.texts("prompt")], {"good": table.raw("good")}, cards={"good": {"fingerprint": "x"}})
    with pytest.raises(DataError, match="'good' is not the one that was calibrated"):
        found.apply(other)
    unknown = table_of(["a", "a"], {"better": [1.0, 2.0]})
    with pytest.raises(DataError, match="'better' was not calibrated, only good, cost, noise"):
        found.apply(unknown)
    fewer = ScoreTable(table.data, {"good": table.cards["good"]})
    with pytest.raises(DataError, match="the table has no scores of 'cost'"):
        found.apply(fewer)
    with pytest.raises(DataError, match="the base table has no scores of 'cost'"):
        found.apply(table, base=fewer)
    assert calibrate(table, labelled).apply(fewer).numbers("combined") == pytest.approx(
        calibrate(table, labelled).apply(table).numbers("calibrated.good")
    )


def test_what_cannot_be_fitted_is_one_sentence() -> None:
    table, labelled = world()
    few = Labelled(labelled.first[:9], labelled.second[:9], labelled.label[:9], labelled.prompts[:9], 300)
    for call, said in (
        (lambda: calibrate(table, few), "of 300 labelled pairs only 9"),
        (lambda: calibrate(table, fuse=True), "a fusion is fitted on labelled pairs and there are none"),
        (lambda: calibrate(table, method="platt"), "method 'platt' is fitted on labelled pairs"),
        (lambda: calibrate(table, labelled, method="plat"), "did you mean 'platt'"),
        (lambda: calibrate(table, labelled, ties="draw"), "ties is 'draw'"),
        (lambda: calibrate(table).apply(table, by="fused"), "nothing was fused"),
    ):
        with pytest.raises(DataError, match=said):
            call()


# ------------------------------------------------------------------------------------------------ labelled pairs
@pytest.fixture
def drawn(tmp_path: Path) -> tuple[ScoreTable, Path]:
    """Eight pictures of two prompts as files, and their table."""
    files = [tmp_path / f"{number}.png" for number in range(8)]
    for number, file in enumerate(files):
        file.write_bytes(encoded(picture(number)))
    images = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    prompts = ["a"] * 4 + ["b"] * 4
    return table_of(prompts, {"r": range(8)}, paths=[str(file) for file in files], images=images), tmp_path


def test_pairs_are_found_by_path_else_by_content(drawn: tuple[ScoreTable, Path]) -> None:
    table, folder = drawn
    (folder / "copy").mkdir()
    for number in (2, 3):
        (folder / "copy" / f"c{number}.png").write_bytes(encoded(picture(number)))
    (folder / "new.png").write_bytes(encoded(picture(99)))
    rows = [
        {"prompt": "a", "chosen": "1.png", "rejected": "0.png"},
        {"prompt": "a", "chosen": "copy/c3.png", "rejected": "copy/c2.png"},
        {"prompt": "a", "chosen": "0.png", "rejected": "new.png"},  # not scored
        {"prompt": "b", "chosen": "1.png", "rejected": "0.png"},  # of another prompt
        {"prompt": "b", "chosen": "gone.png", "rejected": "4.png"},
        {"prompt": "b", "chosen": "5.png"},  # no pair
        {"prompt": "b", "chosen": "7.png", "rejected": "4.png", "preference": 0.7},
    ]
    found = match(table, open_comparisons(write_pairs(folder / "pairs.jsonl", rows)))
    assert found.given == 7
    assert _votes(found) == {(1, 0): 1.0, (3, 2): 1.0, (7, 4): 0.7}
    assert found.prompts == ("a", "a", "b")
    assert found.label.tolist() == [1.0, 0.0, 0.7]  # the second is turned around


def _votes(found: Labelled) -> dict[tuple[int, int], float]:
    """(better, worse) -> preference."""
    out = {}
    for a, b, label in zip(found.first.tolist(), found.second.tolist(), found.label.tolist(), strict=True):
        out[(a, b) if label >= 0.5 else (b, a)] = max(label, 1 - label)
    return out


def test_groups_and_ranked_lists_are_all_their_pairs(drawn: tuple[ScoreTable, Path]) -> None:
    table, folder = drawn
    rows = [
        {"prompt": "a", "images": ["0.png", "1.png", "2.png", "3.png"], "num_chosen": 2},
        {"prompt": "b", "images": ["4.png", "5.png", "6.png"], "grades": [2, 1, 1]},
    ]
    found = match(table, open_comparisons(write_pairs(folder / "groups.jsonl", rows)))
    assert set(_votes(found)) == {(0, 2), (0, 3), (1, 2), (1, 3), (4, 5), (4, 6)}
    assert found.given == 6


# ------------------------------------------------------------------------------------------------ the command
@pytest.fixture
def on_disk(tmp_path: Path) -> tuple[Path, Path]:
    """The table of `world` and a file of its labelled pairs."""
    table, labelled = world()
    table.write(tmp_path / "scores.parquet")
    paths, rows = table.texts("path"), []
    for a, b, label, prompt in zip(labelled.first, labelled.second, labelled.label, labelled.prompts, strict=True):
        two = (a, b) if label else (b, a)
        rows.append({"prompt": prompt, "chosen": paths[two[0]], "rejected": paths[two[1]]})
    rows.append({"prompt": "elsewhere", "chosen": "/no/1.png", "rejected": "/no/2.png"})
    return tmp_path / "scores.parquet", write_pairs(tmp_path / "pairs.jsonl", rows)


def test_the_command_fits_writes_and_applies(on_disk: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    table, pairs = on_disk
    file, again = table.with_name("c.json"), table.with_name("again.parquet")
    assert cli.main(["calibrate", str(table), "--pairs", str(pairs), "--fuse", "--out", str(file)]) == 0
    said = capsys.readouterr().out
    assert f"{2 * PROMPTS * EACH} of {2 * PROMPTS * EACH + 1} labelled pairs have both pictures in the table" in said
    rows = [line.split() for line in said.splitlines()]
    assert {tuple(row[:2]) for row in rows} >= {("good", "raw"), ("fused", "logistic")}
    assert cli.main(["calibrate", str(table), "--apply", str(file), "--out", str(again)]) == 0
    assert read_table(again).data.equals(read_table(table.with_name("scores-calibrated.parquet")).data)
    assert np.array_equal(read_table(again).raw("good"), read_table(table).raw("good"))
    assert sorted(path.name for path in table.parent.iterdir()) == [
        "again.parquet", "c.json", "pairs.jsonl", "scores-calibrated.parquet", "scores.parquet"
    ]  # fmt: skip


def test_what_is_not_named_lies_beside_the_table(on_disk: tuple[Path, Path]) -> None:
    table, _ = on_disk
    result = runs.calibrate(table)
    assert (result["table"], result["calibration"]) == tuple(
        str(table.with_name(f"scores-calibrated.{ending}")) for ending in ("parquet", "json")
    )
    result = runs.calibrate(table, out=table.with_name("other.parquet"))
    assert read_calibration(Path(result["calibration"])) == read_calibration(table.with_name("scores-calibrated.json"))


def test_the_command_combines_as_it_is_told(on_disk: tuple[Path, Path]) -> None:
    table, _ = on_disk
    out = table.with_name("t.parquet")
    runs.calibrate(table, out=out, by="sum", weights={"good": 2.0, "noise": 0.5})
    values = read_table(out)
    expected = 2 * values.numbers("calibrated.good") + 0.5 * values.numbers("calibrated.noise")
    assert values.numbers("combined") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--apply", "c.json", "--fuse"], "c.json is fitted already"),
        (["--apply", "none.json"], "none.json is not a calibration"),
        (["--by", "fused"], "nothing was fused"),
        (["--by", "sum", "--weights", "god=1"], "a weight is given for 'god'; did you mean 'good'"),
        (["--by", "min", "--weights", "good=1"], "weights good are for a weighted sum"),
        (["--out", "t.csv"], "out is t.csv; give the calibration, NAME.json, or the new table, NAME.parquet"),
        (["--apply", "c.json", "--out", "d.json"], "give the new table, NAME.parquet"),
        (["--pairs", "none.jsonl"], "none.jsonl"),
        (["--base", "none.parquet"], "none.parquet does not exist"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(
    on_disk: tuple[Path, Path], more: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table, _ = on_disk
    monkeypatch.chdir(table.parent)
    before = sorted(table.parent.iterdir())
    assert cli.main(["calibrate", str(table), *more]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert sorted(table.parent.iterdir()) == before


def test_a_result_is_json(on_disk: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    table, pairs = on_disk
    options = ["--pairs", str(pairs), "--method", "isotonic", "--out", str(table.with_name("c.json")), "--json"]
    assert cli.main(["calibrate", str(table), *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["matched_pairs"] == result["labelled_pairs"] - 1
    assert result["rewards"]["good"]["after"]["accuracy"][0] > 0.7
