"""What a round draws and trains on."""

from __future__ import annotations

import pytest

from flowalign.data.drawing import Row, in_turn, mixed, parted, rows_of_round
from flowalign.errors import ConfigError

PROMPTS = [f"prompt {number}" for number in range(10)]


def test_a_seed_belongs_to_the_round_the_prompt_and_the_place() -> None:
    rows = rows_of_round(PROMPTS, 3, 5, 1)
    assert [row.prompt for row in rows] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert len({row.seed for row in rows}) == 30
    assert rows_of_round(PROMPTS[4:6], 3, 5, 1) == rows[12:18]  # whatever else is drawn
    assert rows_of_round(PROMPTS[:1], 4, 5, 1)[:3] == rows[:3]
    for other in (rows_of_round(PROMPTS, 3, 5, 2), rows_of_round(PROMPTS, 3, 6, 1)):
        assert not {row.seed for row in other} & {row.seed for row in rows}


def test_each_weight_of_a_prompt_has_as_many_rows() -> None:
    rows = rows_of_round(PROMPTS[:2], 2, 5, 1, lambda prompt: [{prompt: 0.25}, {prompt: 0.75}])
    assert [row.weights for row in rows] == [{prompt: value} for prompt in PROMPTS[:2] for value in (0.25, 0.25, 0.75, 0.75)]
    assert [row.seed for row in rows] == [row.seed for row in rows_of_round(PROMPTS[:2], 4, 5, 1)]


def test_rounds_take_prompts_in_turn_and_begin_again() -> None:
    rounds = [in_turn(PROMPTS, 4, 0, number) for number in range(5)]
    assert sorted(prompt for each in rounds for prompt in each) == sorted(2 * PROMPTS)  # 5 x 4 = 2 x 10
    assert len({*rounds[0], *rounds[1]}) == 8
    assert rounds[0][:2] == rounds[2][2:]
    assert sorted(in_turn(PROMPTS, None, 0, 3)) == sorted(PROMPTS) == sorted(in_turn(PROMPTS, 99, 0, 3))


def test_held_out_prompts_are_not_trained_on() -> None:
    train, held = parted([*PROMPTS, *PROMPTS], 3, 0)
    assert len(held) == 3
    assert sorted(train + held) == sorted(PROMPTS)
    assert parted(PROMPTS[::-1], 3, 0)[1] == held[::-1]  # by prompt, wherever it stands
    with pytest.raises(ConfigError, match="hold fewer out"):
        parted(PROMPTS, 10, 0)


def test_replayed_rows_are_the_share_that_was_asked_for() -> None:
    now, before = [{"now": number} for number in range(9)], [{"before": number} for number in range(50)]
    rows = mixed(now, before, 0.25, 0, 2)
    assert rows[:9] == now
    assert len(rows) == 12  # 3 / 12
    assert mixed(now, before, 0.25, 0, 2) == rows != mixed(now, before, 0.25, 0, 3)
    assert mixed(now, before[:1], 0.5, 0, 2) == [*now, before[0]]
    assert mixed(now, before, 0.0, 0, 2) == now


def test_a_row_may_carry_weights() -> None:
    assert Row("a", 1).line() == {"prompt": "a", "seed": 1}
    assert Row("a", 1, {"style": 0.3}).line() == {"prompt": "a", "seed": 1, "weights": {"style": 0.3}}
