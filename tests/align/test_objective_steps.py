"""Every objective in the real step: it starts where its formula says, and its gradient reaches what learns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flowalign import plugins
from flowalign.errors import ConfigError
from flowalign.rng import Keyed
from flowalign.setup import Prepared
from flowalign.train.trainable import trained

Make = Callable[..., Prepared]
MORE = {"mipo": ("objective.tau=50.0",), "ipo": ("objective.tau=50.0",)}


def table(votes: Path, folder: Path, group: int) -> Path:
    """The votes with scores and grades; `group` pictures on either side."""
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    lines = []
    for place in range(len(rows)):
        near = [rows[(place + step) % len(rows)] for step in range(group)]
        row = {side: [str(votes.parent / each[side]) for each in near] for side in ("chosen", "rejected")}
        grades = [float(2 * group - each) for each in range(2 * group)]
        lines.append(json.dumps({"prompt": rows[place]["prompt"], **row, "scores": {"a": grades}, "grades": grades}) + "\n")
    path = folder / f"{group}.jsonl"
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("name", plugins.names("objectives"))
def test_every_objective_starts_at_its_own_value_and_moves_what_learns(
    prepared: Make, votes: Path, tmp_path: Path, name: str
) -> None:
    takes = plugins.load("objectives", name).takes
    path = table(votes, tmp_path, 2 if takes in ("groups", "lists") else 1)
    ready = prepared(
        f"objective={{name: {name}}}",
        *MORE.get(name, ()),
        f"data.train={path}",
        f"data.validation={path}",
        "train.adam_eps=1e-20",
    )
    batch = ready.first_batch()
    assert ready.step.self_test(batch, Keyed(0)) == 0.0
    before = {key: parameter.detach().clone() for key, parameter in trained(ready.policy).items()}
    for step in (1, 2):
        loss, metrics = ready.step(batch, Keyed(0))
        assert loss.shape == (2,)
        assert loss.isfinite().all()
        assert all(value.shape == (2,) and value.isfinite().all() for value in metrics.values()), metrics
        loss.mean().backward()
        ready.optimizer.step()
        ready.optimizer.zero_grad()
        if ready.step.carried is not None:
            ready.step.carried.after(step)
    moved = [not torch.equal(before[key], parameter) for key, parameter in trained(ready.policy).items()]
    assert all(moved)


@pytest.mark.parametrize(
    ("name", "group", "said"),
    [
        ("mipo", 1, "'mipo' cannot be used with these data: mipo's unbiased estimator needs 2 pictures on either side"),
        ("nonesuch", 1, "'nonesuch' is not one of the objectives"),
    ],
)
def test_what_an_objective_cannot_use_is_one_sentence(
    prepared: Make, votes: Path, tmp_path: Path, name: str, group: int, said: str
) -> None:
    path = table(votes, tmp_path, group)
    with pytest.raises(ConfigError, match=said):
        prepared(f"objective={{name: {name}}}", f"data.train={path}", f"data.validation={path}")


def test_pairs_objectives_refuse_pictures_that_were_judged_alone(prepared: Make, votes: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    path = tmp_path / "alone.jsonl"
    pictures = [{"prompt": row["prompt"], "image": str(votes.parent / row["chosen"]), "label": True} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in pictures))
    with pytest.raises(ConfigError, match="'dpo' compares pictures, and in these data each was judged alone"):
        prepared(f"data.train={path}", f"data.validation={path}")
    ready = prepared("objective={name: kto}", f"data.train={path}", f"data.validation={path}")
    assert ready.step.self_test(ready.first_batch(), Keyed(0)) == 0.0
