"""The reproduction of multi-sample preference optimisation: its pure functions, its files, and its settings."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.papers import groups, multi_sample, multi_sample_page, tones
from benchmarks.papers.style import write_between
from flowalign import config
from flowalign.data.readers import open_comparisons
from flowalign.setup import load_objective


@pytest.mark.parametrize(
    ("labels", "index", "nats"),
    [
        ("aaaaa", 0.0, 0.0),
        ("abcde", 0.8, math.log(5)),
        ("aaabc", 1 - (9 + 1 + 1) / 25, 0.6 * math.log(5 / 3) + 0.4 * math.log(5)),
        ("aabb", 0.5, math.log(2)),
        ("a", 0.0, 0.0),
    ],
)
def test_index_and_entropy(labels: str, index: float, nats: float) -> None:
    assert groups.simpson(labels) == pytest.approx(index)
    assert groups.entropy(labels) == pytest.approx(nats)


def test_the_more_diverse_group_is_preferred_and_equal_ones_are_a_tie() -> None:
    assert groups.by_index((0, 1, 2), (0, 0, 1)) == ((0, 1, 2), (0, 0, 1))
    assert groups.by_index((0, 0, 1), (0, 1, 2)) == ((0, 1, 2), (0, 0, 1))
    assert groups.by_index((0, 0, 1), (3, 4, 3)) is None


@pytest.mark.parametrize("k", [3, 5])
def test_chosen_groups_are_more_diverse_and_drawn_by_the_law(k: int) -> None:
    votes = groups.diversity_votes((0.6, 0.2, 0.2), k, 400, 0, "a prompt")
    assert len(votes) == 400
    for chosen, rejected in votes:
        assert len(chosen) == len(rejected) == k
        assert groups.simpson(chosen) > groups.simpson(rejected)
    light = [sum(vote[side].count(0) for vote in votes) / (400 * k) for side in (0, 1)]
    assert light[0] < 0.55 < 0.65 < light[1]
    assert votes[:8] == groups.diversity_votes((0.6, 0.2, 0.2), k, 8, 0, "a prompt")
    assert votes[:8] != groups.diversity_votes((0.6, 0.2, 0.2), k, 8, 0, "another prompt")


def test_pairs_are_made_of_the_groups_own_pictures() -> None:
    assert groups.matched_pairs([((4, 1), (0, 3)), ((2, 5), (3, 4))]) == [
        ((4,), (0,)),
        ((1,), (3,)),
        ((2,), (3,)),
        ((5,), (4,)),
    ]


def test_rings_use_every_pair_alike() -> None:
    assert list(groups.rings(5, 1)) == [(0,), (1,), (2,), (3,), (4,)]
    assert list(groups.rings(5, 3)) == [(0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 0), (4, 0, 1)]
    assert list(groups.rings(5, 5)) == [(0, 1, 2, 3, 4)]


def test_votes_are_flipped_at_their_rate_and_stay_flipped_at_higher_ones() -> None:
    at = {rate: {name for name in range(4000) if groups.flipped(rate, 0, "prompt", name)} for rate in (0.0, 0.1, 0.3, 1.0)}
    assert at[0.0] < at[0.1] < at[0.3] < at[1.0]
    assert [len(at[rate]) / 4000 for rate in at] == pytest.approx([0, 0.1, 0.3, 1], abs=0.03)  # 4 standard deviations
    assert at[0.3] != {name for name in range(4000) if groups.flipped(0.3, 1, "prompt", name)}


POOL = [(prompt, [(f"{prompt}{place}-fluent", f"{prompt}{place}-noto") for place in range(5)]) for prompt in "xyz"]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_style_votes(k: int) -> None:
    clean = multi_sample.style_votes(POOL, k, 0.0, 0, False)
    assert len(clean) == 3 * (1 if k == 5 else 5)
    assert all(name.endswith("-fluent") for row in clean for name in row["chosen"])
    assert {len(row["chosen"]) for row in clean} == {len(row["rejected"]) for row in clean} == {k}
    shown = Counter(name for row in clean for name in row["chosen"])
    assert set(shown.values()) == {3 if k == 3 else 1}

    noisy = multi_sample.style_votes(POOL, k, 0.4, 0, False)
    turned = {name for row in noisy for name in row["chosen"] if name.endswith("-noto")}
    assert turned == {
        f"{prompt}{place}-noto" for prompt in "xyz" for place in range(5) if groups.flipped(0.4, 0, prompt, place)
    }
    for row in multi_sample.style_votes(POOL, k, 0.4, 0, True):
        assert len({name.partition("-")[2] for name in row["chosen"]}) == 1  # a group is turned as a whole


def test_comparison_files_of_tones(tmp_path: Path) -> None:
    tone = {str(Path(tones.SAMPLES, each.place).resolve()): each.tone for each in multi_sample.known() if each.voted_on}
    for k, path in multi_sample.tone_votes(tmp_path, multi_sample.QUICK, 0).items():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert 2 * k * len(rows) == 3 * 60  # pictures named: the same for every k
        read = open_comparisons(str(path))[len(rows) - 1]
        assert (read.prompt, len(read.images), read.num_chosen) == (rows[-1]["prompt"], 2 * k, k)
        for row in rows:
            chosen, rejected = ([tone[name] for name in row[side]] for side in ("chosen", "rejected"))
            assert k == 1 or groups.simpson(chosen) > groups.simpson(rejected)


@pytest.mark.parametrize("arm", multi_sample.DEBIAS, ids=lambda arm: arm.name)
def test_arms_are_configurations_that_see_as_many_pictures(arm: multi_sample.Arm, tmp_path: Path) -> None:
    tree = multi_sample.settings("samples/emoji/tiny-sd", tmp_path / "rows.jsonl", arm, 60, 0, tmp_path)
    parsed = config.parse(tree)
    assert 2 * arm.k * parsed.train.batch_size == multi_sample.PICTURES
    objective, knobs = load_objective(parsed)
    knob = multi_sample.knob(arm.objective["name"])
    assert knobs[knob] == multi_sample.STRENGTHS[arm.objective["name"]] in multi_sample.TRIED[knob]
    assert objective.takes == ("pairs" if arm.k == 1 else "groups")


def test_the_biased_base_is_shown_mostly_light_skin() -> None:
    shown = Counter(tones.TONES[tone] for row in multi_sample.BIASED for tone in row)
    assert [shown[name] / 10 for name in tones.TONES[:5]] == list(multi_sample.LAW)
    assert shown == {"light": 6, "medium-light": 1, "medium": 1, "medium-dark": 1, "dark": 1}


def test_drawings_of_people_are_complete() -> None:
    known = multi_sample.known()
    assert Counter(each.tone for each in known) == dict.fromkeys(range(6), 281)
    assert len({each.caption for each in known if each.split == "held_out"}) == 45


def test_colours_are_shares() -> None:
    from PIL import Image

    half = Image.new("RGB", (4, 4), "white")
    half.paste((255, 0, 0), (0, 0, 2, 4))
    (found,) = tones.colours([half])
    white, red = 15, 15 * 16 + 15  # no saturation and full value, hue 0 with both full
    assert {int(place): found[place] for place in found.nonzero()[0]} == pytest.approx({white: 0.5**0.5, red: 0.5**0.5})


def test_the_judge_sees_no_concept_that_votes_are_about() -> None:
    voted = {each.caption for each in multi_sample.known() if each.voted_on}
    assert 100 < len(voted) < 140
    held_out = set(multi_sample.people(multi_sample.FULL))
    tuning = set(multi_sample.for_tuning(multi_sample.FULL))
    assert (len(held_out), len(tuning)) == (45, 30)
    assert not voted & held_out
    assert not voted & tuning
    assert not held_out & tuning


def test_what_is_kept_is_made_anew_for_other_settings(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, int]:
        made.append(1)
        return {"calls": len(made)}

    path = tmp_path / "figures.json"
    assert multi_sample.kept(path, {"steps": 3}, make) == {"calls": 1}
    assert multi_sample.kept(path, {"steps": 3}, make) == {"calls": 1}
    assert multi_sample.kept(path, {"steps": 4}, make) == {"calls": 2}


def test_tables_replace_themselves(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x -->\nold\n<!-- end of x -->\nafter\n")
    for lines in (["new"], ["newer", "still"]):
        write_between(page, "x", lines)
        assert page.read_text() == "\n".join(["before", "<!-- x -->", *lines, "<!-- end of x -->", "after", ""])
    with pytest.raises(SystemExit, match="end of y"):
        write_between(page, "y", ["new"])


def test_tables_say_what_was_judged() -> None:
    def arm(shown: list[int]) -> dict:
        return {"tones": shown, "caption_match": [0.3] * 4, "learned": {"train/rewards/margins": 1.5}}

    arms = {"base": [arm([0, 0, 0, 5])], "dpo": [arm([0, 1, 0, 0])], "mdpo-5": [arm([0, 1, 2, 3])]}
    rows = multi_sample_page.debias_rows({"arms": arms, "draws": 2})
    assert [row["index"].value for row in rows.values()] == pytest.approx([0.25, 0.25, 0.5])
    assert [row["light"] for row in rows.values()] == [0.75, 0.75, 0.25]
    assert (rows["base"]["yellow"], rows["mdpo-5"]["over_dpo"].value) == (0.25, pytest.approx(0.25))
    assert "| mdpo-5 | 0.500 [0.500, 0.500] | +0.250 [" in multi_sample_page.debias_table(rows)

    style = {"style": [0.9, 0.2], "caption_match": [0.3, 0.1], "learned": {"eval/rewards/accuracies": 0.75}}
    runs = [{"k": 1, "rate": rate, "whole": False} | style for rate in (0.0, 0.4)]
    noise = multi_sample_page.noise_rows({"base": style, "runs": runs})
    assert noise[1, False][0.4]["share"].value == 0.5
    assert "| k = 1 | 0.75 | 0.75 |" in multi_sample_page.noise_table(noise)


def test_the_command_line() -> None:
    options = multi_sample.parser().parse_args(["--quick", "--seeds", "1", "2", "--only", "noise"])
    assert (options.quick, options.seeds, options.only, options.work) == (True, [1, 2], ["noise"], Path("runs/multi_sample"))


@pytest.mark.slow
def test_the_smoke_test_runs_and_goes_on_where_it_was(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setattr("sys.argv", ["multi_sample", "--quick", "--work", str(tmp_path)])
    multi_sample.main()
    folder = tmp_path / "quick"
    page = (folder / "multi_sample.md").read_text()
    assert all(f"| {arm.name} | 0." in page for arm in multi_sample.DEBIAS)
    written = {path: path.stat().st_mtime_ns for name in ("figures.json", "held_out.json") for path in folder.rglob(name)}
    assert len(written) == 1 + 8 + 17
    monkeypatch.setattr(multi_sample, "align", None)  # nothing is left to train
    multi_sample.main()
    assert {path: path.stat().st_mtime_ns for path in written} == written
