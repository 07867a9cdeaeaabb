from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

from flowalign.errors import DataError, RunError
from flowalign.evaluate.compare import compare, evaluate_folders, match, read_generation


def wins(base: np.ndarray, aligned: np.ndarray, axis: int = -1) -> np.ndarray:
    """Written out: win 1, tie ½, loss 0."""
    return np.where(aligned > base, 1.0, np.where(aligned == base, 0.5, 0.0)).mean(axis=axis)


def test_closed_form_win_rates() -> None:
    found = compare([0, 0, 0, 0, 0], [1, 2, -1, 0, 0])
    assert (found.wins, found.ties, found.losses, found.n, found.groups) == (2, 2, 1, 5, 5)
    assert found.win_rate.value == (2 + 0.5 * 2) / 5
    assert found.mean_difference.value == pytest.approx(0.4)
    assert found.median_difference.value == 0.0


def test_direction_and_antisymmetry() -> None:
    rng = np.random.default_rng(1)
    base, aligned = rng.normal(size=40), rng.normal(size=40) + 0.7
    forward, backward = compare(base, aligned), compare(aligned, base)
    assert forward.win_rate.value > 0.5
    assert forward.mean_difference.value > 0
    assert forward.win_rate.value + backward.win_rate.value == pytest.approx(1)
    assert forward.mean_difference.low == pytest.approx(-backward.mean_difference.high)
    assert forward.win_rate.low == pytest.approx(1 - backward.win_rate.high)
    assert forward.median_difference.value == pytest.approx(-backward.median_difference.value)


def test_ties_alone_are_no_win_and_have_no_spread() -> None:
    found = compare(np.ones(7), np.ones(7))
    assert found.win_rate.value == found.win_rate.low == found.win_rate.high == 0.5


@pytest.mark.parametrize("n", [24, 25])
def test_intervals_agree_with_scipy(n: int) -> None:
    rng = np.random.default_rng(n)
    base = rng.normal(size=n).round(1)
    aligned = (base + rng.normal(0.3, 1, size=n)).round(1)
    found = compare(base, aligned, resamples=20_000)
    statistics = {
        "win_rate": wins,
        "mean_difference": lambda b, a, axis=-1: (a - b).mean(axis=axis),
        "median_difference": lambda b, a, axis=-1: np.median(a - b, axis=axis),
    }
    for name, statistic in statistics.items():
        oracle = scipy.stats.bootstrap(
            (base, aligned), statistic, paired=True, method="percentile", n_resamples=20_000, rng=np.random.default_rng(9)
        ).confidence_interval
        ours = getattr(found, name)
        assert ours.value == pytest.approx(statistic(base, aligned))
        assert ours.low == pytest.approx(oracle.low, abs=0.05)
        assert ours.high == pytest.approx(oracle.high, abs=0.05)


def test_intervals_do_not_depend_on_how_resamples_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    base, aligned = rng.normal(size=(2, 30))
    whole = compare(base, aligned, resamples=500)
    monkeypatch.setattr("flowalign.evaluate.compare.CHUNK", 30 * 64)
    assert compare(base, aligned, resamples=500) == whole
    assert compare(base, aligned, resamples=500, seed=1) != whole


def test_copies_of_a_prompt_add_no_certainty() -> None:
    """Four identical pictures per prompt: resampling prompts gives the interval of one picture per prompt."""
    rng = np.random.default_rng(5)
    base, aligned = rng.normal(size=(2, 30))
    single = compare(base, aligned)
    prompts = [f"prompt {index}" for index in range(30)]
    copies = compare(np.tile(base, 4), np.tile(aligned, 4), groups=prompts * 4)
    naive = compare(np.tile(base, 4), np.tile(aligned, 4))
    assert copies.groups == 30
    assert copies.n == 120
    for name in ("win_rate", "mean_difference", "median_difference"):
        ours, one, small = getattr(copies, name), getattr(single, name), getattr(naive, name)
        assert (ours.value, ours.low, ours.high) == pytest.approx((one.value, one.low, one.high))
        assert small.high - small.low < 0.75 * (ours.high - ours.low)


def test_clusters_of_unequal_size_match_brute_force() -> None:
    rng = np.random.default_rng(7)
    groups = np.repeat(np.arange(12), rng.integers(1, 5, 12))
    difference = rng.normal(size=12)[groups] + 0.3 * rng.normal(size=groups.size)
    found = compare(np.zeros(groups.size), difference, groups=groups.tolist(), resamples=20_000)
    means, medians = [], []
    for _ in range(4000):
        drawn = np.concatenate([difference[groups == group] for group in rng.integers(0, 12, 12)])
        means.append(drawn.mean())
        medians.append(np.median(drawn))
    for ours, resampled in ((found.mean_difference, means), (found.median_difference, medians)):
        low, high = np.quantile(resampled, [0.025, 0.975])
        assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.06)


@pytest.mark.parametrize(
    ("base", "aligned", "groups", "says"),
    [
        ([1.0, 2.0], [1.0], None, "shapes"),
        ([], [], None, "at least 1"),
        ([1.0, float("nan")], [1.0, 2.0], None, "NaN"),
        ([1.0, 2.0], [1.0, 2.0], ["a"], "1 groups for 2 pairs"),
    ],
)
def test_bad_scores_are_refused(base: list[float], aligned: list[float], groups: list[str] | None, says: str) -> None:
    with pytest.raises(DataError, match=says):
        compare(base, aligned, groups=groups)


def write_generation(folder: Path, greys: dict[tuple[str, int], int], **changes: object) -> Path:
    """One plain grey picture per (prompt, seed)."""
    folder.mkdir()
    lines = []
    for index, ((prompt, seed), grey) in enumerate(greys.items()):
        Image.new("RGB", (8, 8), (grey, grey, grey)).save(folder / f"{index}.png")
        row = {"file_name": f"{index}.png", "prompt": prompt, "seed": seed, "sampler": "ddim", "steps": 20, "guidance": 3.0}
        row |= {"height": 8, "width": 8, "generator": folder.name, "note": "ignored"}
        lines.append(json.dumps(row | changes))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


KEYS = [("cat", 0), ("cat", 1), ("dog", 0), ("dog", 1)]


def test_match_pairs_by_prompt_and_seed_whatever_the_order(tmp_path: Path) -> None:
    base = write_generation(tmp_path / "base", dict(zip(KEYS, (10, 20, 30, 40), strict=True)))
    aligned = write_generation(tmp_path / "aligned", dict(zip(KEYS[::-1], (41, 31, 21, 11), strict=True)))
    for left, right in match(read_generation(base), read_generation(aligned)):
        assert (left.prompt, left.seed) == (right.prompt, right.seed)
        assert np.asarray(Image.open(right.path))[0, 0, 0] == np.asarray(Image.open(left.path))[0, 0, 0] + 1


def test_lines_end_at_newlines_and_nowhere_else(tmp_path: Path) -> None:
    """As any of our tables is written, with a prompt that holds other characters which may end a line."""
    odd = "one\u2028two\u2029three\x85four"
    folder = write_generation(tmp_path / "base", {(odd, 0): 10, ("dog", 0): 20})
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().split("\n")[:-1]]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    assert [each.prompt for each in read_generation(folder)] == [odd, "dog"]


@pytest.mark.parametrize(
    ("key", "value"), [("sampler", "euler"), ("steps", 21), ("guidance", 3.5), ("height", 16), ("width", 16)]
)
def test_different_sampler_settings_are_refused(tmp_path: Path, key: str, value: object) -> None:
    greys = dict.fromkeys(KEYS, 5)
    base, aligned = write_generation(tmp_path / "base", greys), write_generation(tmp_path / "aligned", greys, **{key: value})
    with pytest.raises(DataError, match=rf"{key} is .* but {value!r} in the aligned folder"):
        match(read_generation(base), read_generation(aligned))


def test_a_missing_seed_is_named_with_its_side(tmp_path: Path) -> None:
    whole, part = dict.fromkeys(KEYS, 5), dict.fromkeys(KEYS[:3], 5)
    base, aligned = write_generation(tmp_path / "base", whole), write_generation(tmp_path / "aligned", part)
    with pytest.raises(DataError, match="the aligned folder has no picture of prompt 'dog' with seed 1"):
        match(read_generation(base), read_generation(aligned))
    with pytest.raises(DataError, match="the base folder has no picture of prompt 'dog' with seed 1"):
        match(read_generation(aligned), read_generation(base))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"file_name": "../secret.png"}, "outside its folder"),
        ({"file_name": "none.png"}, "does not exist"),
        ({"seed": 7, "prompt": "same"}, "line 2 repeats prompt 'same' with seed 7"),
    ],
)
def test_unusable_metadata_is_refused(tmp_path: Path, change: dict[str, object], says: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    with pytest.raises(DataError, match=says):
        read_generation(write_generation(tmp_path / "bad", dict.fromkeys(KEYS, 5), **change))


def test_a_missing_key_a_broken_line_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_generation(tmp_path / "nowhere")
    folder = write_generation(tmp_path / "bad", dict.fromkeys(KEYS, 5))
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text(lines[0].replace('"seed"', '"sead"'))
    with pytest.raises(DataError, match="line 1 has no key 'seed'"):
        read_generation(folder)
    (folder / "metadata.jsonl").write_text(lines[0] + "\n{oops\n")
    with pytest.raises(DataError, match="line 2 is not a JSON object"):
        read_generation(folder)


class Brightness:
    """A judge whose answers are known: mean grey level in [0, 1]."""

    name = "brightness"
    range = (0.0, 1.0)

    def score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        return torch.tensor([np.asarray(image).mean() / 255 for image in images], dtype=torch.float32)


class Broken(Brightness):
    def score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        return super().score(images, prompts).log() * 0 if prompts[0] == "dog" else super().score(images, prompts)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluate_folders_reports_what_the_pictures_are(tmp_path: Path, batch_size: int) -> None:
    base = write_generation(tmp_path / "base", dict(zip(KEYS, (0, 51, 102, 255), strict=True)))
    aligned = write_generation(tmp_path / "aligned", dict(zip(KEYS, (51, 51, 204, 204), strict=True)))
    found = evaluate_folders(base, aligned, [Brightness()], batch_size=batch_size)
    assert json.loads(json.dumps(found)) == found
    assert (found["pairs"], found["prompts"], found["generators"]) == (4, 2, {"base": ["base"], "aligned": ["aligned"]})
    assert found["settings"] == {"sampler": "ddim", "steps": 20, "guidance": 3.0, "height": 8, "width": 8}
    judge = found["judges"]["brightness"]
    assert judge["base"] == {"mean": pytest.approx(0.4), "share": 0.25}
    assert judge["aligned"] == {"mean": pytest.approx(0.5), "share": 0.5}
    assert (judge["wins"], judge["ties"], judge["losses"], judge["groups"]) == (2, 1, 1, 2)
    assert judge["win_rate"]["value"] == 0.625
    assert judge["mean_difference"]["value"] == pytest.approx(0.1)
    assert found["rows"][2]["scores"]["brightness"] == {"base": pytest.approx(0.4), "aligned": pytest.approx(0.8)}


def test_a_failed_score_is_never_silent(tmp_path: Path) -> None:
    greys = dict.fromkeys(KEYS, 0)
    base, aligned = write_generation(tmp_path / "base", greys), write_generation(tmp_path / "aligned", greys)
    with pytest.raises(RunError, match=r"'brightness' returned nan for .*2\.png"):
        evaluate_folders(base, aligned, [Broken()], batch_size=2)
