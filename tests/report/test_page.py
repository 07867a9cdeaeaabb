from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowalign.errors import CheckpointError
from flowalign.evaluate.compare import evaluate_folders
from flowalign.report.page import write_report
from tests.report.html import Page

NASTY = "</script><script>alert(1)</script> & <img src=x onerror=alert(2)> \"quoted\" 'too'"
PROMPTS = ["cat face", "dog face", NASTY]


class Brightness:
    name = "brightness"
    range = (0.0, 1.0)

    def score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        return torch.tensor([np.asarray(image).mean() / 255 for image in images], dtype=torch.float32)


def write_run(run: Path, side: int = 8, seeds: int = 2) -> Path:
    """A complete small run folder; every picture has its own grey level."""
    grey = 0
    for name in ("base", "aligned"):
        folder = run / "evaluation" / name
        folder.mkdir(parents=True)
        lines = []
        for index, (prompt, seed) in enumerate((prompt, seed) for prompt in PROMPTS for seed in range(seeds)):
            grey += 7
            Image.new("RGB", (side, side), (grey, grey, grey)).save(folder / f"{index}.png")
            row = {"file_name": f"{index}.png", "prompt": prompt, "seed": seed, "sampler": "ddim", "steps": 20, "guidance": 3.0}
            lines.append(json.dumps(row | {"height": side, "width": side, "generator": name}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    evaluation = evaluate_folders(run / "evaluation" / "base", run / "evaluation" / "aligned", [Brightness()], resamples=200)
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    (run / "config.yaml").write_text(
        f"model: {{checkpoint: /models/tiny}}\nobjective: {{name: dpo, beta: 2000.0}}\noutput: {json.dumps(NASTY)}\n"
    )
    (run / "environment.json").write_text(json.dumps({"device": "cpu", "packages": {"torch": "2.14.1"}}))
    (run / "data.json").write_text(json.dumps({"comparisons": 1358, "bad_rows": 3, "warnings": [NASTY]}))
    (run / "metrics.json").write_text(json.dumps({"verdict": f"Better. {NASTY}"}))
    lines = [{"step": 0, "eval/loss": 0.693, "eval/error/chosen": 0.0, "eval/error/rejected": 0.0, "eval/rewards/margins": 0.0}]
    for step in range(1, 31):
        lines.append({"step": step, "train/loss": 0.693 - 0.01 * step, "train/rewards/accuracies": 0.5 + step / 100})
    lines.append(
        {"step": 30, "eval/loss": 0.4, "eval/error/chosen": -0.1, "eval/error/rejected": 0.2, "eval/rewards/margins": 30.0}
    )
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + '\n{"step": 31, "tra')
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def page_of(run: Path) -> Page:
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def numbers(value: object) -> Iterator[float]:
    if isinstance(value, dict):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield float(value)


def test_nothing_is_loaded_from_elsewhere(run: Path) -> None:
    page = page_of(run)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for key, value in attributes.items():
            assert key not in ("href", "xlink:href", "srcset", "action", "style")
            assert not key.startswith("on")
            if key == "src":
                assert value.startswith("data:image/webp;base64,")
    styles = "".join(text for tag, text in page.texts if tag == "style")
    assert "url(" not in styles
    assert "@import" not in styles
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "http://" not in (text := (run / "report.html").read_text(encoding="utf-8"))
    assert "https://" not in text


def test_every_picture_is_inlined_once_losslessly_and_described(run: Path) -> None:
    images = page_of(run).all("img")
    assert len(images) == 12
    found = []
    for image in images:
        with Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))) as picture:
            assert picture.size == (8, 8)
            found.append(picture.convert("RGB").getpixel((0, 0))[0])  # type: ignore[index]
    assert found == [grey for index in range(1, 7) for grey in (7 * index, 7 * (index + 6))]  # base, aligned, base, …
    assert [image["alt"] for image in images[-2:]] == [f"base model: {NASTY}", f"aligned model: {NASTY}"]


def test_large_pictures_become_thumbnails(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", side=520, seeds=1)
    for image in page_of(run).all("img"):
        assert image["width"] == image["height"] == "520"
        with Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))) as picture:
            assert picture.size == (512, 512)


def test_text_is_escaped(run: Path) -> None:
    page = page_of(run)
    assert len(page.all("script")) == 1
    assert not any("alert" in text for tag, text in page.texts if tag == "script")
    assert page.text().count(NASTY) >= 5  # verdict, two captions, settings, data: shown as it was written


def test_numbers_are_those_of_the_evaluation(run: Path) -> None:
    page = page_of(run)
    evaluation = json.loads((run / "evaluation" / "evaluation.json").read_text())
    shown = [float(data["value"]) for data in page.all("data")]
    judge = evaluation["judges"]["brightness"]
    table = {key: judge[key] for key in ("base", "aligned", "mean_difference", "median_difference", "wins", "ties", "losses")}
    assert shown[-len(list(numbers(table))) :] == list(numbers(table))
    scores = [value for row in evaluation["rows"] for value in numbers(row["scores"])]
    assert shown[: len(scores)] == scores
    rate = judge["win_rate"]
    assert f"{100 * rate['value']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]" in page.text()


def test_pictures_come_first_and_missing_parts_are_left_out(run: Path) -> None:
    def sections() -> list[str]:
        return [attributes["id"] for attributes in page_of(run).all("section")]

    assert sections() == ["pictures", "results", "training", "settings", "data", "environment"]
    (run / "metrics.jsonl").unlink()
    (run / "data.json").unlink()
    assert sections() == ["pictures", "results", "settings", "environment"]
    (run / "evaluation").rename(run / "elsewhere")
    assert sections() == ["settings", "environment"]
    assert "Better." in page_of(run).text()


def test_a_run_without_a_verdict_gets_one_from_its_win_rates(run: Path) -> None:
    (run / "metrics.json").unlink()
    assert "By brightness, the aligned model wins (win rate of the aligned model 100 %" in page_of(run).text()


def test_only_the_first_pairs_are_inlined_and_the_page_says_so(run: Path) -> None:
    page = Page(write_report(run, limit=2).read_text(encoding="utf-8"))
    assert len(page.all("img")) == 4
    assert "the first 2 of 6 pairs" in page.text()
    assert "all 6 pairs" not in page.text()
    assert "all 6 pairs" in page_of(run).text()


def test_training_curves_are_drawn_from_the_metrics(run: Path) -> None:
    labels = [svg["aria-label"] for svg in page_of(run).all("svg")]
    assert any("chosen, validation from 0 to -0.1; rejected, validation from 0 to 0.2" in label for label in labels)
    assert any(label.startswith("Preference accuracy: train from 0.51 to 0.8") for label in labels)
    assert any(label.startswith("Loss: train from 0.683 to 0.393; validation from 0.693 to 0.4") for label in labels)


def test_a_folder_without_a_run_or_with_a_broken_file_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(CheckpointError, match="holds nothing to report"):
        write_report(tmp_path)
    (run / "metrics.jsonl").write_text('{"step": 1, "tra\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match=r"metrics.jsonl line 1 is not JSON"):
        write_report(run)
    (run / "metrics.jsonl").unlink()
    (run / "data.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"data.json does not hold named values"):
        write_report(run)
