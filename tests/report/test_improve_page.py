"""The page of an improvement loop, from figures and pictures that are made up here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowalign.report.improve import ROWS, verdict, write_improve_page

LOOK = {"sampler": "default", "steps": 2, "guidance": 1.0, "height": 32, "width": 32, "generator": "x"}


def estimate(value: float, wide: float = 0.1) -> dict[str, float]:
    return {"value": value, "low": value - wide, "high": value + wide}


def told(number: int, reward: float, judge: float, *, alarm: bool = False) -> dict[str, Any]:
    def measure(value: float, trained: bool) -> dict[str, Any]:
        return {"trained": trained, "mean": value, "calibrated": estimate(value), "win_rate": estimate(value)}

    signs = [{"name": "divergence/judge <b>", "alarm": alarm, "says": "It falls & <rises>.", "numbers": {}}]
    return {
        "round": number,
        "comparisons": 12,
        "staleness": number - 1 if number else 0,
        "measures": {"style": measure(reward, True), "judge <b>": measure(judge, False)},
        "combined": estimate(reward),
        "diversity": estimate(0.4),
        "signs": signs if number else [],
        "pictures": 30,
        "prompts": 15,
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A loop of two rounds, stopped after the second, with pictures of 15 prompts and two seeds."""
    rng = np.random.default_rng(0)
    for part in ("base", "00", "01"):
        folder = tmp_path / "rounds" / part / "evaluation" / "pictures"
        folder.mkdir(parents=True)
        lines = []
        for number in range(30):
            name = f"{number:05d}-{number % 2}.png"
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / name)
            lines.append(json.dumps({"file_name": name, "prompt": f"<i>{number // 2}</i>", "seed": number % 2, **LOOK}) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines))
    about = {
        "rounds": [told(1, 0.7, 0.6), told(2, 0.8, 0.3, alarm=True)],
        "base": told(0, 0.5, 0.5),
        "best": 1,
        "best_by": "combined",
        "stopped": "Round 2: it falls.",
        "weights": {"style": 1.0},
        "planned": 4,
        "drawing": "ahead",
        "checkpoint": "tiny",
        "selection": "frs",
        "objective": "dpo",
    }
    (tmp_path / "improve.json").write_text(json.dumps(about))
    return tmp_path


def test_the_page_shows_rounds_side_by_side(run: Path) -> None:
    text = write_improve_page(run).read_text()
    assert text.count('<img src="data:image/') == ROWS * 3
    assert text.count("<svg") == 3  # a reward, a judge, diversity
    assert ">round 1<br>kept<" in text
    assert "2 of 4" in text
    assert "ahead, by a policy one round older" in text
    assert "<strong>alarm</strong>: It falls &amp; &lt;rises&gt;." in text
    assert "1 alarm." in text
    assert "<b>" not in text
    assert "<i>" not in text
    assert "http" not in text.replace("http-equiv", "")


def test_the_verdict_is_about_the_round_that_is_kept(run: Path) -> None:
    about = json.loads((run / "improve.json").read_text())
    says = verdict(about)
    assert says.startswith("All rewards moved as asked, beyond chance, on held-out prompts. Round 1 is kept.")
    assert "style 70 % [60, 80]" in says
    assert "judges that nothing was trained on, judge <b> 60 % [50, 70]" in says
    assert says.endswith("The loop was stopped. Round 2: it falls.")
    about["rounds"][0]["measures"]["style"]["calibrated"] = estimate(0.55)
    assert verdict(about).startswith("None of the rewards moved as asked")
    about["rounds"][0]["measures"]["style"]["calibrated"] = estimate(0.3)
    assert verdict(about | {"weights": {"style": -1.0}}).startswith("All rewards moved as asked")
    assert verdict(about | {"rounds": [], "stopped": "Nothing."}) == "No round was finished. Nothing."


def test_several_rewards_have_a_hypervolume_without_being_steered(run: Path) -> None:
    about = json.loads((run / "improve.json").read_text())
    for place, each in enumerate((about["base"], *about["rounds"])):
        points = [[estimate(0.5 + place / 10), estimate(0.5)]]
        volume = estimate(0.1 + place / 10, 0.02)
        each["reach"] = {"objectives": ["a <b>", "c"], "under": [], "points": points, "hypervolume": volume}
    (run / "improve.json").write_text(json.dumps(about))
    text = write_improve_page(run).read_text()
    assert text.count("<svg") == 5
    assert 'aria-label="Hypervolume: policy from 0.1 [0.08, 0.12] to 0.3 [0.28, 0.32]"' in text
    assert "<title>rounds, round 2: a &lt;b&gt; 0.7 [0.6, 0.8], c 0.5 [0.4, 0.6]</title>" in text
    assert "from the base’s worst score by a &lt;b&gt; and c upwards" in text
    assert "across the weights" not in text
    assert "Spearman" not in text
    assert "Hypervolume 0.2 [0.18, 0.22], of the base 0.1." in text  # of the round that is kept
