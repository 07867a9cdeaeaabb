"""The page on what a flow is worth."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flowalign.evaluate.worth import Scored, Seconds, arms
from flowalign.report.worth import verdict, write_worth
from flowalign.runs.flows import write_pictures


def test_the_page_begins_with_the_verdict_and_shows_both_sides(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    prompts, seeds = ["a red <heart>", "a blue star", "a cat"], [3, 4]
    told, keys = [prompt for prompt in prompts for _ in seeds], seeds * 3
    for side, colour in (("before", "red"), ("after", "blue")):
        write_pictures(tmp_path / side, [Image.new("RGB", (8, 8), colour)] * 6, told, keys, [{}] * 6, side)
    judged = {name: rng.uniform(size=(2, 6)).tolist() for name in ("style", "caption_match")}
    arrays = {name: tuple(np.array(side).reshape(3, 2) for side in sides) for name, sides in judged.items()}
    scored = Scored(arrays, {"liking": arrays["style"]}, Seconds(1.0, 0.5, 0.1))  # type: ignore[arg-type]
    compared = arms(scored)
    estimate = {"value": 0.9, "low": 0.8, "high": 1.0}
    found: dict[str, Any] = {
        "prompts": prompts,
        "seeds": seeds,
        "judged": judged,
        "seconds": {"draw": 1.0, "flow": 0.5, "choose": 0.1},
        "evaluations": 16,
        "identity": estimate,
        "drift": estimate,
        "variety": {"before": 0.5, "after": 0.6, "difference": estimate},
    }
    found["verdict"] = verdict(compared, found)
    page = write_worth(tmp_path, found, compared, title="Worth it?", how="Measured & told.").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", "", page)
    assert text.index("For one call of the generator") < text.index("Before and after") < text.index("Quality against cost")
    assert page.count("data:image/webp") == 6  # the first seed of each caption, two sides
    assert "a red &lt;heart&gt;" in page
    assert "seed 3" in page
    assert "seed 4" not in page
    assert page.count("<tr>") == 1 + len(compared)
    assert "best of 2 by liking, then flow" in page
    assert "Measured &amp; told." in page
    assert "seconds for a picture that is kept" in page
    assert "optimizer step" not in page
