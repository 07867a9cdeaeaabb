from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flowalign import cli
from flowalign.data.images import decode
from flowalign.data.readers import open_comparisons
from flowalign.errors import DataError
from flowalign.evaluate.audit import Audit, audit
from flowalign.evaluate.checks.leaks import normal
from flowalign.evaluate.checks.votes import has_cycle
from flowalign.evaluate.compare import compare, mean_with_interval
from flowalign.scoring.rewards.base import Card
from flowalign.scoring.table import ScoreTable

PREFERENCES = "samples/emoji/preferences"


@pytest.fixture(scope="module")
def drawn(emoji: Path) -> list[bytes]:
    """Encoded emoji, no two alike: the same objects in both styles, in turn."""
    rows = pq.read_table(emoji / "emoji.parquet").slice(2000, 40).to_pylist()
    return [row["image"]["bytes"] for row in rows]


@pytest.fixture
def votes(tmp_path: Path, drawn: list[bytes]) -> Callable[..., Path]:
    """votes([row, ...], files) -> a .jsonl file; pictures are numbers of `drawn`, or names of `files` {name: bytes}."""

    def make(rows: list[dict[str, Any]], files: Mapping[str, bytes] | None = None, name: str = "votes.jsonl") -> Path:
        for place, data in [*enumerate(drawn), *(files or {}).items()]:
            file = tmp_path / (f"{place}.png" if isinstance(place, int) else place)
            file.write_bytes(data)

        def named(value: Any) -> Any:
            return (
                f"{value}.png"
                if isinstance(value, int)
                else [named(each) for each in value]
                if isinstance(value, list)
                else value
            )

        lines = [json.dumps({key: named(value) if key in SIDES else value for key, value in row.items()}) for row in rows]
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return path

    return make


SIDES = ("chosen", "rejected", "images")


def asked(path: Path, **settings: Any) -> Audit:
    return audit(open_comparisons(path), path.name, **settings)


def numbers(found: Audit, name: str) -> dict[str, Any]:
    (check,) = (check for check in found.checks if check.name == name)
    return {"verdict": check.verdict, "says": check.says, "drop": sorted(check.drop)} | dict(check.numbers)


def pair(chosen: Any, rejected: Any, prompt: str = "a thing", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | more


def encoded(picture: Image.Image, form: str, **settings: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, form, **settings)
    return out.getvalue()


def test_sound_comparisons_are_ok(votes: Callable[..., Path]) -> None:
    found = asked(votes([pair(place, place + 1, f"thing {place}") for place in range(0, 40, 2)]))
    assert {check.name: check.verdict for check in found.checks if check.verdict != "ok"} == {}
    assert found.verdict == "ok"
    assert found.drop == {}
    assert set(found.unasked) == {"agreement", "gaps", "unsafe", "prompt_leakage", "picture_leakage"}
    json.dumps(found.about(), allow_nan=False)


def test_rows_and_pictures_that_are_broken_are_listed_and_never_fatal(votes: Callable[..., Path], drawn: list[bytes]) -> None:
    rows = [pair(0, 1), pair(2, "gone.png"), pair("cut.png", 3), pair(4, 5, prompt=""), pair(6, "bomb.png"), pair(8, 9)]
    path = votes(rows, {"cut.png": drawn[10][:90], "bomb.png": b""})
    with path.open("a") as file:
        file.write("{no json\n")
    found = asked(path)
    assert numbers(found, "rows") == numbers(found, "rows") | {"verdict": "bad", "drop": [3, 6], "bad": 2}
    assert numbers(found, "pictures") == numbers(found, "pictures") | {"verdict": "bad", "drop": [1, 2, 4], "damaged": 3}
    assert "cannot read picture" in found.drop[1]["pictures"]
    assert "not a readable picture" in found.drop[2]["pictures"]
    assert found.survey.rows == 7


def test_nothing_to_read_is_refused(votes: Callable[..., Path]) -> None:
    with pytest.raises(
        DataError, match=r"none of the 2 comparisons of votes.jsonl can be read: votes.jsonl:1: the prompt is ''"
    ):
        asked(votes([pair(0, 1, prompt=""), pair(0, 1, prompt=" ")]))


def test_the_same_picture_on_both_sides_is_told_by_its_bytes(votes: Callable[..., Path], drawn: list[bytes]) -> None:
    found = asked(votes([pair(0, "copy.png"), pair(2, 3, "b")], {"copy.png": drawn[0]}))
    assert numbers(found, "same_picture") == numbers(found, "same_picture") | {"drop": [0], "share": 0.5, "verdict": "bad"}
    assert numbers(found, "duplicates")["copies"] == 1


def test_repeats_are_the_same_vote_of_the_same_annotator(votes: Callable[..., Path], drawn: list[bytes]) -> None:
    rows = [pair(0, 1), pair("again.png", 1), pair(1, 0), pair(0, 1, "other"), pair(0, 2)]
    found = asked(votes(rows, {"again.png": drawn[0]}))
    assert numbers(found, "repeated")["drop"] == [1]  # by content: another name does not hide it
    assert found.drop[1]["repeated"] == "repeats votes.jsonl:1"
    by = [pair(0, 1, annotator="a"), pair(0, 1, annotator="b"), pair(0, 1, annotator="a")]
    assert numbers(asked(votes(by)), "repeated")["drop"] == [2]
    ties = [pair(0, 1, preference=0.5), pair(1, 0, preference=0.5), pair(0, 1)]
    assert numbers(asked(votes(ties)), "repeated")["drop"] == [1]


def test_votes_under_other_weights_of_objectives_neither_repeat_nor_contradict(votes: Callable[..., Path]) -> None:
    weights = [{"clip": x, "style": 1 - x} for x in (0.25, 0.75)]
    rows = [pair(0, 1, objective_weights=weights[0]), pair(1, 0, objective_weights=weights[1])]
    found = asked(votes([*rows, pair(0, 1, objective_weights=weights[1]), pair(0, 1, objective_weights=weights[1])]))
    assert numbers(found, "repeated")["drop"] == [3]
    assert numbers(found, "contradictions") == numbers(found, "contradictions") | {"pairs": 2, "both_ways": 1}
    assert numbers(found, "cycles")["with_cycle"] == 1
    assert numbers(asked(votes(rows)), "cycles")["with_cycle"] == 0


def test_contradictions_and_ties_are_counted(votes: Callable[..., Path]) -> None:
    rows = [pair(0, 1), pair(1, 0), pair(0, 1, "other"), pair(2, 3), pair(3, 2, preference=0.5), pair(4, 5, preference=0.2)]
    found = asked(votes(rows))
    assert numbers(found, "contradictions") == numbers(found, "contradictions") | {"pairs": 4, "both_ways": 1}
    assert numbers(found, "ties")["ties"] == 1
    assert "was voted both ways" in numbers(found, "contradictions")["says"]
    turned = found.survey.votes[5]
    assert turned.preference == 0.8  # and the sides are exchanged
    assert found.survey.refs[turned.chosen[0]].name == "5.png"


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ([], False),
        ([(0, 1)], False),
        ([(0, 1), (1, 0)], True),
        ([(0, 1), (1, 2), (0, 2)], False),
        ([(0, 1), (1, 2), (2, 0)], True),
        ([(0, 1), (0, 2), (1, 3), (2, 3)], False),
        ([(0, 1), (2, 3), (3, 4), (4, 2)], True),
        ([(0, 0)], True),
        ([(4, 3), (3, 2), (2, 1), (1, 0), (4, 0)], False),
        ([(4, 3), (3, 2), (2, 1), (1, 0), (0, 4)], True),
    ],
)
def test_cycles_of_hand_made_graphs(edges: list[tuple[int, int]], expected: bool) -> None:
    graph: dict[int, set[int]] = {}
    for winner, loser in edges:
        graph.setdefault(winner, set()).add(loser)
    assert has_cycle(graph) is expected


def test_a_tournament_has_a_cycle_unless_it_is_an_order() -> None:
    orders = 0
    edges = list(itertools.combinations(range(4), 2))
    for ways in itertools.product((False, True), repeat=6):
        graph: dict[int, set[int]] = {}
        for (a, b), turned in zip(edges, ways, strict=True):
            graph.setdefault(b if turned else a, set()).add(a if turned else b)
        orders += not has_cycle(graph)
    assert orders == 24  # 4! of the 64


def test_the_cycle_rate_counts_prompts_whose_votes_go_round(votes: Callable[..., Path]) -> None:
    rows = [pair(0, 1, "circle"), pair(1, 2, "circle"), pair(2, 0, "circle")]
    rows += [pair(0, 1, "order"), pair(1, 2, "order"), pair(0, 2, "order"), pair(0, 1, "one")]
    rows += [pair(0, 1, "tie"), pair(1, 2, "tie"), pair(2, 0, "tie", preference=0.5)]
    found = numbers(asked(votes(rows)), "cycles")
    assert found == found | {"prompts": 4, "with_cycle": 1, "possible": 2, "rate": 0.25, "rate_where_possible": 0.5}
    groups = [{"prompt": "g", "images": [0, 1, 2, 3], "num_chosen": 2}, {"prompt": "g", "images": [2, 0], "num_chosen": 1}]
    assert numbers(asked(votes(groups)), "cycles")["with_cycle"] == 1  # 0 over 2 in the group, 2 over 0 after it


def test_roles_are_told_by_content(votes: Callable[..., Path], drawn: list[bytes]) -> None:
    rows = [
        pair(0, 1),
        pair(1, 2),
        pair(3, 4, "b"),
        pair(5, "three.png", "c"),
        pair(6, 7, "d", preference=0.5),
        pair(7, 6, "e"),
    ]
    found = numbers(asked(votes(rows, {"three.png": drawn[3]})), "roles")
    assert found == found | {"pictures": 8, "both": 2, "across_prompts": 1}


def test_near_duplicates_inside_a_comparison_are_suggested_to_leave_out(votes: Callable[..., Path], drawn: list[bytes]) -> None:
    jpeg = encoded(decode(drawn[4]), "JPEG", quality=85)
    found = asked(votes([pair(4, "jpeg.jpg"), pair(6, 7, "b"), pair(8, 4, "c")], {"jpeg.jpg": jpeg}))
    told = numbers(found, "duplicates")
    assert told == told | {"near_pairs": 1, "near_pictures": 2, "comparisons": 1, "drop": [0], "copies": 0, "verdict": "bad"}


def test_sizes_and_shapes_and_whether_size_tells_the_vote(votes: Callable[..., Path], drawn: list[bytes]) -> None:
    def resized(place: int, width: int, height: int) -> bytes:
        return encoded(decode(drawn[place]).resize((width, height)), "PNG")

    files = {f"big{place}.png": resized(place, 96, 96) for place in range(0, 40, 2)}
    rows = [pair(f"big{place}.png", place + 1, f"thing {place}") for place in range(0, 40, 2)]
    told = numbers(asked(votes(rows, files)), "sizes")
    assert told == told | {"sizes_differ": 20, "shapes_differ": 0, "verdict": "bad"}
    assert told["chosen_is_larger"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    for row in rows[::2]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    told = numbers(asked(votes(rows, files)), "sizes")
    assert told["verdict"] == "look"
    assert told["chosen_is_larger"]["value"] == 0.5
    told = numbers(asked(votes([pair("wide.png", 1), pair(2, 3, "b")], {"wide.png": resized(0, 96, 64)})), "sizes")
    assert told == told | {"sizes_differ": 1, "shapes_differ": 1, "drop": []}


def test_prompts_are_compared_without_what_does_not_change_their_meaning() -> None:
    assert normal("A  Cat, sitting!") == normal("a cat sitting") == normal("“A cat” (sitting)")
    assert normal("ﬁsh") == normal("FISH")
    assert normal("keycap: #") != normal("keycap: *")
    assert normal("c++") != normal("c")
    assert normal("😀") != normal("😃")
    assert normal("?!") != normal("...")


def test_leaks_between_splits(votes: Callable[..., Path], drawn: list[bytes]) -> None:
    jpeg = encoded(decode(drawn[4]), "JPEG", quality=85)
    train = votes([pair(0, 1, "A cat!"), pair(2, 3, "a dog"), pair(4, 5, "a fox"), pair(6, 7, "an owl")])
    other = votes(
        [pair(20, 21, "a  CAT"), pair("three.png", 23, "a hen"), pair(24, "jpeg.jpg", "a pig")],
        {"three.png": drawn[3], "jpeg.jpg": jpeg},
        "held.jsonl",
    )
    found = asked(train, against=(open_comparisons(other), "held.jsonl"))
    told = numbers(found, "prompt_leakage")
    assert told == told | {"shared": 1, "prompts_against": 3, "share": 1 / 3, "drop": [0], "verdict": "bad"}
    told = numbers(found, "picture_leakage")
    assert told == told | {"equal": 1, "near": 1, "pictures": 8, "drop": [1, 2], "verdict": "bad"}
    assert "is also in held.jsonl" in found.drop[1]["picture_leakage"]
    assert "nearly" in found.drop[2]["picture_leakage"]
    clean = asked(votes([pair(6, 7, "an owl")]), against=(open_comparisons(other), "held.jsonl"))
    assert numbers(clean, "prompt_leakage")["verdict"] == numbers(clean, "picture_leakage")["verdict"] == "ok"


def card(name: str, better: str = "higher", reads_prompt: bool = True) -> Card:
    return Card(name, name, (0.0, 1.0), better, "MIT", "formula", "none", reads_prompt, False, "1")  # type: ignore[arg-type]


def table(pictures: list[bytes], prompts: list[str], cards: list[Card], scores: Mapping[str, list[float | None]]) -> ScoreTable:
    columns: dict[str, Any] = {
        "image": [hashlib.sha256(each).hexdigest() for each in pictures],
        "path": [f"/elsewhere/{place}.png" for place in range(len(pictures))],
        "prompt": prompts,
    }
    columns |= {f"raw.{name}": pa.array(values, pa.float64()) for name, values in scores.items()}
    return ScoreTable(pa.table(columns), {each.name: each for each in cards})


def test_agreement_is_the_share_of_votes_ties_half_with_an_interval_over_prompts(
    votes: Callable[..., Path], drawn: list[bytes]
) -> None:
    rng = np.random.default_rng(0)
    rows = [pair(place, place + 1, f"thing {place // 4}") for place in range(0, 40, 2)]
    scores = rng.integers(0, 3, 40).astype(float)
    prompts = [f"thing {place // 4}" for place in range(40)]
    cards = [card("up"), card("down", "lower"), card("with_failures")]
    failing = [None if place == 6 else value for place, value in enumerate(scores.tolist())]
    held = table(drawn, prompts, cards, {"up": scores.tolist(), "down": scores.tolist(), "with_failures": failing})
    found = numbers(asked(votes(rows), table=held), "agreement")["rewards"]
    chosen, rejected = scores[::2], scores[1::2]
    expected = compare(rejected, chosen, groups=[row["prompt"] for row in rows])
    assert found["up"]["value"] == pytest.approx(expected.win_rate.value)
    assert found["up"]["low"] == pytest.approx(expected.win_rate.low, abs=0.03)  # another number of resamples
    assert found["up"]["ties"] == expected.ties
    assert found["down"]["value"] == pytest.approx(1 - expected.win_rate.value)
    assert found["with_failures"]["pairs"] == 19


def test_votes_that_every_reward_contradicts_are_bad(votes: Callable[..., Path], drawn: list[bytes]) -> None:
    prompts = [f"thing {place - place % 2}" for place in range(40)]
    held = table(drawn, prompts, [card("quality")], {"quality": [float(place % 2) for place in range(40)]})
    rows = [pair(place, place + 1, f"thing {place}") for place in range(0, 40, 2)]
    swapped = numbers(asked(votes(rows), table=held), "agreement")
    assert swapped["verdict"] == "bad"
    assert "swapped" in swapped["says"]
    for row in rows:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    right = numbers(asked(votes(rows), table=held), "agreement")
    assert right["verdict"] == "ok"
    assert right["rewards"]["quality"]["value"] == 1 - swapped["rewards"]["quality"]["value"] == 1.0


def test_pictures_are_found_by_content_or_path_and_only_under_their_prompt_where_it_is_read(
    votes: Callable[..., Path], drawn: list[bytes], tmp_path: Path
) -> None:
    path = votes([pair(0, 1, "a"), pair(2, 3, "b")])
    other = ["a", "a", "elsewhere", "elsewhere"]
    held = table(
        drawn[:4], other, [card("reads"), card("blind", reads_prompt=False)], {"reads": [1, 0, 1, 0], "blind": [1, 0, 1, 0]}
    )
    found = numbers(asked(path, table=held), "agreement")["rewards"]
    assert (found["reads"]["pairs"], found["blind"]["pairs"]) == (1, 2)
    moved = held.having({"image": ["x"] * 4, "path": [str(tmp_path / f"{place}.png") for place in range(4)]})
    assert numbers(asked(path, table=moved), "agreement")["rewards"]["reads"]["pairs"] == 1
    none = numbers(asked(path, table=held.having({"image": ["x"] * 4})), "agreement")
    assert none["verdict"] == "look"
    assert "score the pictures" in none["says"]


def test_groups_compare_every_chosen_with_every_rejected_and_comparisons_may_carry_scores(votes: Callable[..., Path]) -> None:
    row = {"prompt": "g", "images": [0, 1, 2, 3], "num_chosen": 2, "scores": {"clip": [3.0, 1.0, 2.0, 0.0]}}
    found = asked(votes([row]))
    clip = numbers(found, "agreement")["rewards"]["clip"]
    assert (clip["pairs"], clip["value"]) == (4, 0.75)  # 3 > 2, 3 > 0, 1 < 2, 1 > 0
    gaps = numbers(found, "gaps")["rewards"]["clip"]
    sd = np.std([3, 1, 2, 0])
    assert gaps["median"] == pytest.approx(1 / sd)
    assert sum(gaps["counts"]) == 4
    turned = numbers(asked(votes([row | {"preference": 0.0}])), "agreement")["rewards"]["clip"]
    assert turned["value"] == 0.25


def test_small_gaps_are_counted_in_standard_deviations(votes: Callable[..., Path], drawn: list[bytes]) -> None:
    prompts = [f"thing {place - place % 2}" for place in range(40)]
    scores = [float(place // 2) + (0.01 if place % 2 else 0.0) for place in range(40)]
    rows = [pair(place, place + 1, f"thing {place}") for place in range(0, 40, 2)]
    found = numbers(asked(votes(rows), table=table(drawn, prompts, [card("fine")], {"fine": scores})), "gaps")
    assert found["rewards"]["fine"]["small"] == 1.0
    assert found["rewards"]["fine"]["median"] == pytest.approx(-0.01 / np.std(scores))
    assert found["verdict"] == "look"


def test_unsafe_pictures_are_flagged_whichever_way_the_reward_points(votes: Callable[..., Path], drawn: list[bytes]) -> None:
    path = votes([pair(0, 1), pair(2, 3), pair(4, 5)])
    for better, scores in (("lower", [0.1, 0.2, 0.9, 0.1, 0.5, 0.0]), ("higher", [0.9, 0.8, 0.1, 0.9, 0.5, 1.0])):
        held = table(drawn[:6], ["a thing"] * 6, [card("nsfw", better, False)], {"nsfw": scores})
        found = numbers(asked(path, table=held), "unsafe")
        assert found == found | {"unsafe": 1, "pictures": 6, "drop": [1], "verdict": "bad"}
        assert numbers(asked(path, table=held, unsafe_above=0.95), "unsafe")["unsafe"] == 0
    with pytest.raises(DataError, match="no reward 'nswf'; did you mean 'nsfw'"):
        asked(path, table=held, unsafe_reward="nswf")
    without = table(drawn[:6], ["a thing"] * 6, [card("clip")], {"clip": scores})
    assert asked(path, table=without).unasked == asked(path, table=without).unasked | {"unsafe": "a table with the reward nsfw"}


def test_the_interval_of_a_mean_is_that_of_the_win_rate() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 300))
    prompts = (np.arange(300) // 3).tolist()
    expected = compare(a, b, groups=prompts, resamples=2000).win_rate
    found = mean_with_interval(0.5 + 0.5 * np.sign(b - a), prompts)
    assert found == expected
    with pytest.raises(DataError, match="one group each"):
        mean_with_interval([1.0], [])


def test_the_bundled_comparisons_are_sound(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, held = (f"{root / PREFERENCES}/random-{split}.jsonl" for split in ("train", "held_out"))
    out = tmp_path / "audit"
    words = ["audit", train, "--against", held, "--limit", "300", "--out", str(out), "--json"]
    assert cli.main([*words, "--write-filtered", str(tmp_path / "f.jsonl")]) == 0
    result = json.loads(capsys.readouterr().out)
    about = json.loads((out / "audit.json").read_text())
    assert about["verdict"] == result["verdict"] == "look"
    checks = {check["name"]: check for check in about["checks"]}
    assert {name for name, check in checks.items() if check["verdict"] != "ok"} == {"duplicates", "picture_leakage"}
    assert checks["prompt_leakage"]["numbers"]["shared"] == 0
    assert checks["picture_leakage"]["numbers"]["equal"] == 0
    lines = [json.loads(line) for line in (out / "suggested_drop.jsonl").read_text().splitlines()]
    assert len(lines) == about["suggested_drop"] == checks["picture_leakage"]["suggested_drop"] > 0
    assert all(line["where"] == f"random-train.jsonl:{line['row'] + 1}" for line in lines)
    kept = open_comparisons(tmp_path / "f.jsonl")
    assert len(kept) == result["kept"] == 300 - len(lines)
    everything = open_comparisons(train)
    gone = {line["row"] for line in lines}
    for filtered, whole in zip(kept, (everything[place] for place in range(300) if place not in gone), strict=True):
        assert filtered.prompt == whole.prompt
        assert [image.read() for image in filtered.images] == [image.read() for image in whole.images]
    page = (out / "audit.html").read_text(encoding="utf-8")
    assert "Pictures in both splits" in page
    assert page.count("data:image/webp") >= 2


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--drop", "rows", "--write-filtered", "x.parquet"], "does not end with .jsonl"),
        (["--table", "none.parquet"], "none.parquet does not exist"),
        (["--against", "none.jsonl"], "none.jsonl"),
        (["--columns", "prompt=words"], "words"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(
    votes: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    assert cli.main(["audit", str(votes([pair(0, 1)])), "--out", str(tmp_path / "out"), *words]) == 2
    err = capsys.readouterr().err
    assert part in err
    assert [line for line in err.splitlines() if line.startswith("error: ")]


def test_filtering_by_some_checks_only(votes: Callable[..., Path], drawn: list[bytes], tmp_path: Path) -> None:
    path = votes([pair(0, "copy.png"), pair(2, 3), pair(2, 3), pair(4, 5, prompt="")], {"copy.png": drawn[0]})
    words = ["audit", str(path), "--out", str(tmp_path / "out"), "--write-filtered", str(tmp_path / "f.jsonl")]
    assert cli.main([*words, "--drop", "repeated"]) == 0
    assert len(open_comparisons(tmp_path / "f.jsonl")) == 2  # what cannot be read is never written
    assert cli.main(words) == 0
    assert len(open_comparisons(tmp_path / "f.jsonl")) == 1
