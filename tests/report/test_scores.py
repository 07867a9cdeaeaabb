from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy import stats

from flowalign.data.readers import open_comparisons
from flowalign.errors import DataError
from flowalign.report import gallery
from flowalign.report.diagrams import histogram, wilson
from flowalign.report.gallery import orders, worth_showing
from flowalign.report.scores import write_scores_page
from flowalign.scoring.calibration import calibrate
from flowalign.scoring.labelled import match
from flowalign.scoring.rewards.base import Card
from flowalign.scoring.table import ScoreTable
from tests.browser import CHROMIUM, chromium
from tests.report import html

NASTY = "</script><script>alert(1)</script> & <img src=x onerror=alert(2)> \"quoted\" 'too'"
QUALITY = {"accuracy": [0.71, 0.66, 0.76], "log_loss": 0.55, "brier": 0.19, "ece": [0.021, 0.01, 0.05]}


def card(name: str, better: str = "higher") -> Card:
    return Card(
        name,
        f"{name} & more",
        (-math.inf, math.inf),
        better,
        "MIT",
        "formula",
        "none",
        False,
        False,
        "1",  # type: ignore[arg-type]
    )


def table(
    paths: Sequence[str],
    prompts: Sequence[str | None],
    scores: Mapping[str, Sequence[float]],
    lower: Sequence[str] = (),
    **more: Any,
) -> ScoreTable:
    count = len(paths)
    columns: dict[str, Any] = {
        "image": [hashlib.sha256(path.encode()).hexdigest() for path in paths],
        "path": list(paths),
        "prompt": pa.array(list(prompts), pa.string()),
        "generator": pa.array(["tiny-sd"] * count, pa.string()),
        "seed": list(range(count)),
    }
    for name, values in scores.items():
        columns[f"raw.{name}"] = pa.array(np.asarray(values, dtype=float), from_pandas=True)
        columns[f"why.{name}"] = pa.array(
            [f"{name} failed: <cut> short" if math.isnan(value) else None for value in values], pa.string()
        )
    cards = {name: card(name, "lower" if name in lower else "higher") for name in scores}
    return ScoreTable(pa.table(columns | more), cards)


@pytest.fixture(scope="module")
def scored(emoji: Path) -> ScoreTable:
    """Twelve emoji of six prompts; `bytes` is the size of the file, of which less is better; `clip` failed once."""
    rows = pq.read_table(emoji / "emoji.parquet").slice(0, 12).to_pylist()
    sizes = [float(len(row["image"]["bytes"])) for row in rows]
    clip = [0.1 * place for place in range(12)]
    clip[4] = math.nan
    prompts = [row["caption"] for row in rows]
    prompts[2] = prompts[3] = NASTY
    return table([f"{emoji}/emoji.parquet#{place}" for place in range(12)], prompts, {"clip": clip, "bytes": sizes}, ["bytes"])


class Page(html.Page):
    """A page of scores."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.read_text(encoding="utf-8"))
        assert self.open == []

    def column(self, key: int) -> list[float]:
        """Values in the gallery by which it can be sorted, in its order; NaN where there is none."""
        found = re.findall(rf'<data data-key="{key}" value="([^"]*)"', self.part("pictures"))
        return [float(value) if value else math.nan for value in found]


def test_nothing_is_loaded_from_elsewhere_and_only_its_own_script_runs(scored: ScoreTable, tmp_path: Path) -> None:
    page = Page(write_scores_page(scored, tmp_path / "scores.html"))
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert name not in ("xlink:href", "srcset", "action", "style")
            assert not name.startswith("on")
            assert name != "href" or value.startswith("#")
            assert name != "src" or value.startswith("data:image/webp;base64,")
    (script,) = (text for tag, text in page.texts if tag == "script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = (meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert "http://" not in page.html
    assert "https://" not in page.html
    assert {link["href"][1:] for link in page.all("a")} == {section["id"] for section in page.all("section")}


def test_text_is_escaped_and_pictures_are_described(scored: ScoreTable, tmp_path: Path) -> None:
    page = Page(write_scores_page(scored, tmp_path / "scores.html"))
    assert page.text().count(NASTY) >= 2
    assert not any("alert" in text for tag, text in page.texts if tag == "script")
    assert all(image["alt"] for image in page.all("img"))
    assert f"picture for: {NASTY}" in {image["alt"] for image in page.all("img")}
    assert all(svg["aria-label"] for svg in page.all("svg"))


def test_without_a_script_the_gallery_is_in_the_default_order(scored: ScoreTable, tmp_path: Path) -> None:
    page = Page(write_scores_page(scored, tmp_path / "scores.html"))
    clip, size = scored.raw("clip"), scored.raw("bytes")
    standard = [(each - np.nanmean(each)) / np.nanstd(each) for each in (clip, -size)]
    expected = np.nanmean(np.stack(standard), axis=0)
    assert page.column(0) == pytest.approx(sorted(expected, reverse=True))
    order = np.argsort(-expected)
    assert page.column(1) == pytest.approx(clip[order], nan_ok=True)
    assert page.column(2) == pytest.approx(size[order])
    combined = scored.having({"combined": size / 1e4})
    assert Page(write_scores_page(combined, tmp_path / "b.html")).column(0) == pytest.approx(sorted(size / 1e4, reverse=True))


def test_inlined_pictures_are_those_of_the_table(scored: ScoreTable, emoji: Path, tmp_path: Path) -> None:
    page = Page(write_scores_page(scored, tmp_path / "scores.html"))
    first = int(np.nanargmax(scored.raw("clip")))
    cards = page.part("pictures").split('<li class="scored">')[1:]
    (card_of,) = (text for text in cards if f'value="{float(scored.raw("clip")[first])!r}"' in text)
    data = re.search(r'src="data:image/webp;base64,([^"]+)"', card_of)
    with Image.open(io.BytesIO(base64.b64decode(data[1]))) as shown:  # type: ignore[index]
        row = pq.read_table(emoji / "emoji.parquet").slice(first, 1).to_pylist()[0]
        with Image.open(io.BytesIO(row["image"]["bytes"])) as source:
            expected = Image.alpha_composite(Image.new("RGBA", source.size, "white"), source.convert("RGBA")).convert("RGB")
            assert np.array_equal(np.asarray(shown.convert("RGB")), np.asarray(expected))


def test_a_page_of_many_large_pictures_stays_small_and_says_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, count = np.random.default_rng(0), 300
    for place in range(10):
        Image.fromarray(rng.integers(0, 256, (400, 600, 3), dtype=np.uint8)).save(tmp_path / f"{place}.png")
    scores = rng.standard_normal(count)
    long = table([f"{tmp_path}/{place % 10}.png" for place in range(count)], ["word " * 2000] * count, {"noise": scores})
    path = write_scores_page(long, tmp_path / "scores.html", limit=30)
    page = Page(path)
    assert len(page.column(0)) == 30
    assert f"Shown are 30 of {count} pictures" in page.text()
    assert {scores.max(), scores.min()} <= set(page.column(0))
    assert path.stat().st_size < 1_500_000
    sizes = {(image["width"], image["height"]) for image in page.all("img")}
    assert sizes == {("600", "400")}  # its own size is told, a thumbnail is shown
    monkeypatch.setattr(gallery, "BUDGET", 1)
    assert f"Shown are 1 of {count} pictures" in Page(write_scores_page(long, path)).text()


def test_the_best_and_worst_by_every_reward_are_among_those_shown(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    values = {name: rng.standard_normal(5000) for name in ("a", "b", "c")}
    values["b"][17] = math.nan
    big = table(["x"] * 5000, ["p"] * 5000, values)
    by = orders(big)
    rows = worth_showing(by, 5000, 90)
    assert len(rows) == len(set(rows)) == 90
    for order in by:
        best = order.best_first()
        known = best[: int((~np.isnan(order.values)).sum())]
        assert set(known[:5]) | set(known[-5:]) <= set(rows)
        assert (17 in known) is (order.title != "b, raw")
    places = {row: place for place, row in enumerate(by[0].best_first())}
    assert [places[row] for row in rows] == sorted(places[row] for row in rows)
    spread = np.diff(sorted(places[row] for row in rows))
    assert spread.max() < 5000 / 20  # the even sample leaves no large part out
    assert list(worth_showing(by, 5000, 5000)) == list(by[0].best_first())


def test_lower_is_better_where_the_card_says_so(scored: ScoreTable) -> None:
    raw = next(order for order in orders(scored) if order.title == "bytes, raw")
    assert raw.best_first()[0] == int(np.argmin(scored.raw("bytes")))
    clip = next(order for order in orders(scored) if order.title == "clip, raw")
    assert clip.best_first()[0] == 11
    assert clip.best_first()[-1] == 4  # the failed one


def test_distributions_state_median_and_failures(scored: ScoreTable, tmp_path: Path) -> None:
    part = Page(write_scores_page(scored, tmp_path / "scores.html")).part("distributions")
    assert "clip, raw" in part
    assert "11 scored, 1 failed; higher is better" in part
    assert "12 scored, 0 failed; lower is better" in part
    assert f"median {np.nanmedian(scored.raw('clip')):.3g}" in part


def test_a_histogram_counts_what_numpy_counts() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.standard_normal(500), [math.nan] * 3])
    svg = histogram("x", "", values)
    counts = [int(each) for each in re.findall(r": (\d+) pictures</title>", svg)]
    assert counts == [each for each in np.histogram(values[:500], bins=30)[0] if each]
    assert histogram("x", "", [2.0, 2.0]).count("<rect") == 1
    assert "No value" in histogram("x", "", [math.nan])


def test_the_agreement_is_that_of_scipy_both_pooled_and_within_prompts(scored: ScoreTable, tmp_path: Path) -> None:
    labels = re.findall(r'aria-label="([^"]+)"', Page(write_scores_page(scored, tmp_path / "scores.html")).part("agreement"))
    known = ~np.isnan(scored.raw("clip"))
    clip, size = scored.raw("clip"), -scored.raw("bytes")
    pooled = stats.spearmanr(clip[known], size[known]).statistic
    pairs = [(clip[rows], size[rows]) for rows in scored.groups().values() if known[rows].all()]
    within = np.mean([stats.spearmanr(*each).statistic for each in pairs])
    said = [f"clip and bytes {value:.2f}".replace("-", "−") for value in (pooled, within)]
    assert labels == [f"Over all pictures: {said[0]}", f"Within prompts: {said[1]}"]
    assert "mean over 5 prompts" in Page(tmp_path / "scores.html").part("agreement")


def test_the_worst_disagreements_are_those_where_scores_lie_furthest_apart(scored: ScoreTable, tmp_path: Path) -> None:
    fake = scored.having({"raw.clip": np.linspace(0, 1, 12), "raw.bytes": [5.0] * 11 + [50.0]})  # lower bytes are better
    part = Page(write_scores_page(fake, tmp_path / "scores.html")).part("disagreements")
    first = part.split('<li class="scored">')[1]
    assert "seed 11" in first  # the best by clip and by far the worst by bytes
    assert ">50<" in first
    assert re.search(r'aria-label="clip: \+[\d.]+ sd".*circle class="up"', first)
    assert re.search(r'aria-label="bytes: −[\d.]+ sd".*circle class="down"', first)
    told = fake.having(
        {"calibrated.clip": [0.5] * 12, "calibrated.bytes": [0.5] * 12, "disagreement": [0.0] * 6 + [0.4] + [0.0] * 5}
    )
    part = Page(write_scores_page(told, tmp_path / "scores.html")).part("disagreements")
    assert part.count('<li class="scored">') == 1
    assert "seed 6" in part


def test_one_reward_alone_has_nothing_to_disagree_with(tmp_path: Path) -> None:
    page = Page(write_scores_page(table(["gone.png"], ["p"], {"a": [1.0]}), tmp_path / "scores.html"))
    assert [section["id"] for section in page.all("section")] == ["pictures", "distributions", "rewards"]
    assert "not readable" in page.text()  # the picture is not where it lay


def test_failures_are_listed_with_their_reasons(scored: ScoreTable, tmp_path: Path) -> None:
    page = Page(write_scores_page(scored, tmp_path / "scores.html"))
    assert "(clip, bytes); 1 lacks a score." in page.text()
    part = page.part("failures")
    assert "emoji.parquet#4" in part
    assert "clip failed: &lt;cut&gt; short" in part
    assert "all 1 missing" in part
    many = table([f"{place}.png" for place in range(400)], ["p"] * 400, {"a": [math.nan] * 400})
    part = Page(write_scores_page(many, tmp_path / "scores.html")).part("failures")
    assert "400 × a: a failed" in part
    assert "the first 100 of 400" in part
    assert part.count("<tr>") == 101


def test_reliability_shows_what_the_calibration_measured(scored: ScoreTable, tmp_path: Path) -> None:
    dots = [
        {"predicted": 0.2, "observed": 0.25, "count": 40},
        {"predicted": 0.8, "observed": 0.7, "count": 60, "low": 0.6, "high": 0.8},
    ]
    calibration = {
        "pairs": 100,
        "rewards": {"clip": {"before": {}, "after": QUALITY | {"reliability": dots}}, "bytes": {"before": {}, "after": {}}},
        "fused": {},
    }
    part = Page(write_scores_page(scored, tmp_path / "a.html", calibration=calibration)).part("reliability")
    assert "said 20 %, was 25 % of 40 pairs" in part
    assert "0.710 [0.660, 0.760]" in part
    assert "ECE 0.021 [0.010, 0.050]" in part
    assert "bytes" not in part
    whiskers = re.findall(r'class="whisker one thin" x1="[\d.]+" x2="[\d.]+" y1="([\d.]+)" y2="([\d.]+)"', part)
    lengths = [float(low) - float(high) for low, high in whiskers]
    low, high = wilson(0.25, 40)
    assert lengths[0] / lengths[1] == pytest.approx((high - low) / 0.2, rel=0.01)
    assert "reliability" not in [
        section["id"] for section in Page(write_scores_page(scored, tmp_path / "b.html")).all("section")
    ]


def test_wilsons_interval_is_that_of_scipy() -> None:
    expected = stats.binomtest(10, 40).proportion_ci(method="wilson")
    assert wilson(0.25, 40) == pytest.approx((expected.low, expected.high))


def test_what_cannot_be_shown_is_refused(scored: ScoreTable, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 rows and 2 rewards"):
        write_scores_page(scored.select([]), tmp_path / "scores.html")
    with pytest.raises(DataError, match="limit is 0"):
        write_scores_page(scored, tmp_path / "scores.html", limit=0)
    assert not (tmp_path / "scores.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_gallery_is_sorted_and_filtered_in_a_real_browser(scored: ScoreTable, tmp_path: Path) -> None:
    path = write_scores_page(scored, tmp_path / "scores.html")

    def shown(key: int) -> list[str]:
        cards = "document.querySelectorAll('#gallery .scored:not([hidden])')"
        return browser.ask(f"Array.from({cards}, card => card.querySelector('data[data-key=\"{key}\"]').value)")

    clip, size = scored.raw("clip"), scored.raw("bytes")
    with chromium() as browser:
        browser.open(path)
        assert [float(each) for each in shown(0)] == Page(path).column(0)
        browser.ask("document.getElementById('key').focus()")
        browser.press("ArrowDown", 40)  # clip, raw
        found = shown(1)
        assert found[-1] == ""  # the one that failed stands last
        assert [float(each) for each in found[:-1]] == sorted(clip[~np.isnan(clip)], reverse=True)
        browser.press("ArrowDown", 40)  # bytes, raw: lower is better, so that the smallest come first
        assert [float(each) for each in shown(2)] == sorted(size)
        browser.press("Tab", 9)
        browser.press("ArrowUp", 38)
        assert [float(each) for each in shown(2)] == sorted(size, reverse=True)
        assert browser.ask("document.activeElement.id") == "way"
        browser.click("#find")
        for letter in "quoted":
            browser.press(letter, ord(letter.upper()), letter)
        assert sorted(float(each) for each in shown(2)) == sorted(size[2:4])
        assert browser.ask("document.getElementById('said').textContent") == "2 pictures"
        assert browser.ask("document.querySelectorAll('img').length") > 0
        assert browser.ask("Array.from(document.images).every(image => image.complete && image.naturalWidth > 0)")
        assert browser.problems == []


def test_it_reads_what_a_calibration_is_written_as(emoji: Path, tmp_path: Path) -> None:
    rng, count = np.random.default_rng(0), 60
    paths = [f"{emoji}/emoji.parquet#{place}:image" for place in range(count)]
    prompts = [f"prompt {place // 2}" for place in range(count)]
    better = np.tile([1.0, 0.0], count // 2)
    held = table(paths, prompts, {name: better + rng.standard_normal(count) for name in ("clip", "style")})
    rows = [{"prompt": prompts[place], "images": paths[place : place + 2]} for place in range(0, count, 2)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fitted = calibrate(held, match(held, open_comparisons(tmp_path / "pairs.jsonl")), fuse=True)
    fitted.write(tmp_path / "calibration.json")
    about = json.loads((tmp_path / "calibration.json").read_text())
    part = Page(write_scores_page(fitted.apply(held), tmp_path / "scores.html", calibration=about)).part("reliability")
    measured = [about["rewards"]["clip"]["after"], about["rewards"]["style"]["after"], about["fused"]]
    for told in measured:
        for value, low, high in (told[measure] for measure in ("accuracy", "log_loss", "brier", "ece")):
            assert f"{value:.3f} [{low:.3f}, {high:.3f}]" in part
    assert part.count('<circle class="dot one"') == sum(len(told["reliability"]) for told in measured)
    assert "of 30 labelled pairs" in part
