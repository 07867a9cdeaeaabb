"""What an objective carries from step to step, and what it reads of the comparisons themselves, from the file to the loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowalign import plugins, runs
from flowalign.align.terms import Terms, carries, needs
from flowalign.errors import ConfigError
from flowalign.rng import Keyed
from flowalign.settings import Config
from flowalign.setup import Prepared


def start(*, gain: float) -> dict[str, float]:
    return {"level": gain}


def observe(terms: Terms, carried: Mapping[str, Tensor], *, gain: float) -> dict[str, Tensor]:
    return {"error": terms.policy_error[:, 0].detach() * carried["level"]}


def advance(carried: Mapping[str, Tensor], means: Mapping[str, Tensor], *, gain: float) -> dict[str, Tensor]:
    return {"level": 0.5 * carried["level"] + means["error"]}


@needs("reference")
@carries(start=start, observe=observe, advance=advance)
def following_level(terms: Terms, carried: Mapping[str, Tensor], *, gain: float = 3.0) -> Tensor:
    """level · e of the chosen."""
    return carried["level"] * terms.policy_error[:, 0]


@needs("scores", "grades")
def worth(terms: Terms, *, beta: float = 1.0) -> Tensor:
    """e · (score + 10 grade) of every picture, summed."""
    return (terms.policy_error * (terms.given("scores") + 10 * terms.given("grades"))).sum(1)


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    known = plugins.load
    own = {"following_level": following_level, "worth": worth}
    monkeypatch.setattr(plugins, "load", lambda kind, name: own[name] if name in own else known(kind, name))


@pytest.mark.usefixtures("third_party")
def test_scalars_advance_once_a_step_by_the_mean_over_all_its_comparisons(prepared: Callable[..., Prepared]) -> None:
    ready = prepared("objective={name: following_level, gain: 2.0}")
    carried = ready.step.carried
    assert carried is not None
    level, stream = 2.0, ready.batches(0)
    for step in (1, 2):
        errors = []
        for _ in range(2):  # accumulation
            batch = next(stream)
            loss, metrics = ready.step(batch, Keyed(0))
            error = ready.step.terms(batch, Keyed(0)).policy_error[:, 0]
            torch.testing.assert_close(loss, level * error)
            assert metrics["carried/level"].tolist() == pytest.approx([level] * len(batch))
            errors += (level * error).tolist()
            with torch.no_grad():
                ready.step(batch, Keyed(7))  # validation teaches nothing
        carried.after(step)
        level = 0.5 * level + sum(errors) / len(errors)
        assert carried.scalars["level"].item() == pytest.approx(level, rel=1e-5)


@pytest.mark.usefixtures("third_party")
def test_a_stopped_run_goes_on_with_the_scalars_it_had(settings: Callable[..., Config], tmp_path: Path) -> None:
    common = ("objective={name: following_level, gain: 2.0}", "train.save_every=2")
    runs.align(settings(tmp_path / "whole", *common, "train.steps=4"), progress=False)
    runs.align(settings(tmp_path / "parts", *common, "train.steps=2"), progress=False)
    runs.align(settings(tmp_path / "parts", *common, "train.steps=4"), resume=True, progress=False)
    levels = [
        [json.loads(line).get("train/carried/level") for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    found = [[level for level in each if level is not None] for each in levels]
    assert found[0] == found[1]
    assert len(set(found[0])) == 4


def rated(votes: Path, folder: Path, **more: object) -> Path:
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    for place, row in enumerate(rows):
        row |= {side: str(votes.parent / row[side]) for side in ("chosen", "rejected")}
        row |= {"scores": {"a": [place, 1.0], "b": [2.0, place]}, "grades": [2, 1]} | more
    path = folder / "rated.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.usefixtures("third_party")
def test_scores_and_grades_reach_the_objective(prepared: Callable[..., Prepared], votes: Path, tmp_path: Path) -> None:
    path = rated(votes, tmp_path)
    data = (f"data.train={path}", f"data.validation={path}")
    ready = prepared("objective={name: worth}", *data, "data.rewards={a: 1.0, b: 0.5}")
    batch = ready.first_batch()
    terms = ready.step.terms(batch, Keyed(0))
    places = [list(ready.train.cached.ids).index(each) for each in batch.ids]
    assert terms.scores is not None
    assert terms.scores.tolist() == [[place + 1.0, 1.0 + 0.5 * place] for place in places]
    loss, _ = ready.step(batch, Keyed(0))
    by_hand = [
        first * (place + 1.0 + 20) + second * (1.0 + 0.5 * place + 10)
        for place, (first, second) in zip(places, terms.policy_error.tolist(), strict=True)
    ]
    assert loss.tolist() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.usefixtures("third_party")
@pytest.mark.parametrize(
    ("changed", "rewards", "said"),
    [
        ({"grades": None}, "{a: 1.0}", "reads grades, and 24 comparisons have none; give every row grades"),
        ({}, "{}", "reads scores, and 24 comparisons have none, or several rewards: name those that count in data.rewards"),
        ({}, "{c: 1.0}", "reads scores, and 24 comparisons have none"),
    ],
)
def test_missing_scores_and_grades_are_refused(
    prepared: Callable[..., Prepared], votes: Path, tmp_path: Path, changed: dict[str, object], rewards: str, said: str
) -> None:
    path = rated(votes, tmp_path, **changed)
    with pytest.raises(ConfigError, match=said):
        prepared("objective={name: worth}", f"data.train={path}", f"data.validation={path}", f"data.rewards={rewards}")


def test_one_reward_needs_no_name(prepared: Callable[..., Prepared], votes: Path, tmp_path: Path) -> None:
    path = rated(votes, tmp_path, scores={"only": [3.0, 1.0]})
    ready = prepared(f"data.train={path}", f"data.validation={path}")
    assert ready.first_batch().scores.tolist() == [[3.0, 1.0]] * 2


@pytest.mark.parametrize("swapped", [False, True])
def test_pictures_that_were_judged_alone_go_where_their_labels_say(
    prepared: Callable[..., Prepared], votes: Path, tmp_path: Path, swapped: bool
) -> None:
    """On one batch, at the same draws: the wanted become easier to denoise than the reference finds them, the others harder."""
    pictures = [
        {"prompt": row["prompt"], "image": str(votes.parent / row[side]), "label": (side == "chosen") is not swapped}
        for row in map(json.loads, votes.read_text().splitlines())
        for side in ("chosen", "rejected")
    ]
    path = tmp_path / "alone.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pictures))
    ready = prepared(
        "objective={name: kto, beta: 500.0}", f"data.train={path}", f"data.validation={path}", "train.batch_size=4"
    )
    batch = next(batch for batch in ready.batches(0) if 0 < batch.preference.sum() < 4)
    for step in range(1, 41):
        loss, metrics = ready.step(batch, Keyed(0))
        loss.mean().backward()
        ready.optimizer.step()
        ready.optimizer.zero_grad()
        ready.step.carried.after(step)
    assert "error/chosen" not in metrics
    wanted = batch.preference == 1
    assert wanted.tolist() == [(int(each) in liked(ready, swapped)) for each in batch.ids]
    rewards = metrics["rewards/all"]
    assert rewards[wanted].mean() > 0.02 + rewards[~wanted].mean()
    assert metrics["rewards/margins"].mean() > 0.02


def liked(ready: Prepared, swapped: bool) -> set[int]:
    """Ids of the pictures whose label is true, by their place in the file: chosen and rejected take turns."""
    return {int(each) for place, each in enumerate(ready.train.cached.ids) if (place % 2 == 0) is not swapped}
