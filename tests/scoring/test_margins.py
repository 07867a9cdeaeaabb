"""Implicit margins: the formula over a fixed panel, whatever the batch, the order and the kills."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign import cli, runs
from flowalign.align.margins import Panel, implicit_margins, panel_errors
from flowalign.data.batch import Batch
from flowalign.data.readers import open_comparisons
from flowalign.errors import NonFiniteError
from flowalign.families.loading import open_family
from flowalign.rng import key
from flowalign.settings import Config

PAIRS = 5


@pytest.fixture(scope="module")
def pairs(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few of the bundled comparisons, the last of them twice, with a tie and a column of their own."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = (emoji / "preferences" / "fluent_over_noto-held_out.jsonl").read_text().splitlines()[: PAIRS - 1]
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row |= {side: str((emoji / "preferences" / row[side].partition("#")[0]).resolve()) + "#" + row[side].partition("#")[2]
                for side in ("chosen", "rejected")}  # fmt: skip
    rows[1] |= {"preference": 0.5, "margin": 0.25, "scores": {"r": [2.0, 1.0]}}
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[-1]]))
    return folder / "pairs.jsonl"


@pytest.fixture(scope="module")
def model(emoji: Path) -> str:
    return str(emoji / "tiny-sd")


def margins(model: str, pairs: Path, out: Path, **more: Any) -> list[dict[str, Any]]:
    options: dict[str, Any] = dict(draws=2, batch_size=2, device="cpu", progress=False)
    runs.margins(model, str(pairs), out=out, **options | more)
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def found(model: str, pairs: Path) -> list[dict[str, Any]]:
    return margins(model, pairs, pairs.with_name("found.jsonl"))


def test_a_margin_is_half_the_difference_of_errors_over_the_panel(model: str, pairs: Path, found: list[dict[str, Any]]) -> None:
    """Computed once more, picture by picture, from the family's parts alone."""
    import io

    import numpy as np
    from PIL import Image

    family = open_family(model)
    times = [0.25, 0.75]
    for place in (0, 1):
        comparison, error = open_comparisons(pairs)[place], []
        conditioning = family.encode_prompts([comparison.prompt])
        for image in comparison.images:
            pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(image.read())).convert("RGB"))).permute(2, 0, 1)
            assert pixels.shape[1:] == (family.resolution, family.resolution)
            x0, each = family.encode_images(pixels[None].float() / 255).mean, []
            for draw, t in enumerate(times):
                noise = torch.randn(*x0.shape[1:], generator=torch.Generator().manual_seed(key(0, "panel", 0, draw)))
                x_t, target = family.noisy(x0, noise[None], torch.tensor([t]))
                with torch.no_grad():
                    prediction = family.predict(family.denoiser, x_t, torch.tensor([t]), conditioning)
                each.append(float((prediction - target).square().mean()))
            error.append(sum(each) / 2)
        chosen, rejected = error
        assert abs(chosen - rejected) > 1e-3
        assert found[place]["implicit_margin"] == pytest.approx(-0.5 * chosen + 0.5 * rejected, abs=2e-5)


def test_rows_keep_what_they_had(pairs: Path, found: list[dict[str, Any]]) -> None:
    given = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert len(found) == PAIRS
    for before, after in zip(given, found, strict=True):
        assert {name: after[name] for name in before if name not in ("chosen", "rejected")} == {
            name: before[name] for name in before if name not in ("chosen", "rejected")
        }
    there = open_comparisons(pairs.with_name("found.jsonl"))
    for before, after in zip(open_comparisons(pairs)[:], there[:], strict=True):
        assert [image.read() for image in after.images] == [image.read() for image in before.images]
    assert found[-1]["implicit_margin"] == found[-2]["implicit_margin"]


def test_exchanged_pictures_turn_the_sign_around(model: str, pairs: Path, found: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in pairs.read_text().splitlines()][::-1]
    (tmp_path / "turned.jsonl").write_text(
        "".join(json.dumps(row | {"chosen": row["rejected"], "rejected": row["chosen"]}) + "\n" for row in rows)
    )
    turned = margins(model, tmp_path / "turned.jsonl", tmp_path / "out.jsonl", batch_size=3)
    expected = [-row["implicit_margin"] for row in found[::-1]]
    assert [row["implicit_margin"] for row in turned] == pytest.approx(expected, abs=1e-6)


def test_a_run_that_was_killed_goes_on_and_ends_as_if_it_never_had_been(
    model: str, pairs: Path, found: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    own = panel_errors

    def counted(family: Any, denoiser: Any, batch: Batch, *rest: Any) -> torch.Tensor:
        if len(asked) == 1 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise KeyboardInterrupt
        asked.append(len(batch))
        return own(family, denoiser, batch, *rest)

    monkeypatch.setattr("flowalign.runs.implicit.panel_errors", counted)
    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        margins(model, pairs, out)
    assert not out.exists()
    part = tmp_path / ".out.jsonl.part"
    part.write_text(part.read_text() + '["cut", 0.')  # as a kill in the middle of writing leaves it
    again = margins(model, pairs, out)
    assert [row["implicit_margin"] for row in again] == [row["implicit_margin"] for row in found]
    assert asked == [2, 2]  # four distinct comparisons, two at a time
    assert not part.exists()
    (tmp_path / "killed").unlink()
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        margins(model, pairs, out)
    margins(model, pairs, out, seed=1)  # another panel: what is there is not taken
    assert asked == [2, 2, 2]


def test_another_panel_gives_other_margins(model: str, pairs: Path, found: list[dict[str, Any]], tmp_path: Path) -> None:
    (other,) = margins(model, pairs, tmp_path / "out.jsonl", seed=5, limit=1)
    assert other["implicit_margin"] != pytest.approx(found[0]["implicit_margin"], abs=1e-5)


def test_a_lora_run_is_asked_with_its_lora(settings: Callable[..., Config], votes: Path, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", "train.steps=3", "train.learning_rate=0.05")
    runs.align(config, progress=False)
    base = margins(config.model.checkpoint, votes, tmp_path / "base.jsonl", resolution=16, draws=3)
    own = margins(str(tmp_path / "run"), votes, tmp_path / "own.jsonl", resolution=16, draws=3)
    gaps = [abs(a["implicit_margin"] - b["implicit_margin"]) for a, b in zip(base, own, strict=True)]
    assert len(gaps) == 12
    assert min(gaps) > 1e-6


def test_the_panel_covers_all_times_and_keeps_its_noise() -> None:
    assert Panel(4).times.tolist() == pytest.approx([0.125, 0.375, 0.625, 0.875])
    noise = Panel(8, seed=3).noise(2, (4, 5, 6))
    assert torch.equal(noise, Panel(64, seed=3).noise(2, (4, 5, 6)))
    assert not torch.equal(noise, Panel(8, seed=4).noise(2, (4, 5, 6)))


def test_groups_are_means_over_the_chosen_and_the_rejected() -> None:
    errors = torch.rand(3, 4, 6)
    value, spread = implicit_margins(errors, 2)
    per_draw = [[sum(-0.5 * e[n][k] for n in (0, 1)) / 2 - sum(-0.5 * e[n][k] for n in (2, 3)) / 2 for k in range(6)]
                for e in errors.tolist()]  # fmt: skip
    assert value.tolist() == pytest.approx([sum(row) / 6 for row in per_draw], abs=1e-6)
    expected = [(sum((x - sum(row) / 6) ** 2 for x in row) / 5 / 6) ** 0.5 for row in per_draw]
    assert spread.tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(NonFiniteError):
        implicit_margins(torch.full((1, 2, 3), torch.nan), 1)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "image": "x.png", "label": 1}, "judged alone, which have no margin"),
        ({"prompt": "a", "chosen": "gone.png", "rejected": "gone.png"}, "none of the 1 comparisons can be used"),
    ],
)
def test_mistakes_are_one_sentence(
    model: str, tmp_path: Path, row: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    arguments = [str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "out.jsonl"), "--device", "cpu"]
    assert cli.main(["margins", model, *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
