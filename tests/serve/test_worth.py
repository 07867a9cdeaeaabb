"""A fitted flow in the real proxy, in front of the real generator, each a process of its own; and what is measured there."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from flowalign import config, runs
from flowalign.demo import held_out_captions
from flowalign.errors import RunError
from flowalign.evaluate.worth import arms
from flowalign.flow.settings import FlowConfig
from flowalign.report.worth import write_worth
from flowalign.runs.worth import Setting, measure_worth, scored
from flowalign.serve.child import serving

SEEDS = [5, 6]


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match="--strength is 2; it goes with --flow RUN"),
        serving("--generator", "nowhere", "--strength", "2", log=tmp_path / "log"),
    ):
        pass


@pytest.mark.slow
def test_a_fitted_flow_behind_http_is_measured(tmp_path: Path, emoji: Path) -> None:
    wanted = ["data.resolution=32", "field.width=32", "field.levels=2", "train.steps=40", "train.learning_rate=3e-3"]
    settings = [f"output={tmp_path / 'flow'}", "solve.steps=1", "train.ema=null", "data.limit=64", *wanted]
    fitted = runs.fit_flow(config.load_tree(FlowConfig, Path("configs/emoji-flow.yaml"), settings), progress=False)
    assert fitted["finished"]
    captions, out = held_out_captions(3), tmp_path / "out"
    drawing = ["--generator", str(emoji / "tiny-sd"), "--steps", "10", "--guidance", "3"]
    with (
        serving(*drawing, log=tmp_path / "upstream.log") as upstream,
        serving("--upstream", f"{upstream}/v1", "--flow", str(tmp_path / "flow"), log=tmp_path / "proxy.log") as proxy,
        serving("--upstream", f"{upstream}/v1", log=tmp_path / "bare.log") as bare,
    ):
        setting = Setting(f"{upstream}/v1", f"{proxy}/v1", str(tmp_path / "flow"))
        found = measure_worth(setting, captions, SEEDS, out=out)
        with pytest.raises(RunError, match="the proxy moved 0 of 6 pictures"):
            measure_worth(Setting(f"{upstream}/v1", f"{bare}/v1", setting.flow), captions, SEEDS, out=tmp_path / "bare")
    assert found["evaluations"] == 2
    assert found["judged"].keys() == {"style", "caption_match"}
    assert found["rewards"].keys() == {"style", "emoji_clip"}
    assert all(len(side) == 6 for pair in found["judged"].values() for side in pair)
    assert found["judged"]["style"][0] != found["judged"]["style"][1]
    assert found["seconds"]["draw"] > 0
    assert found["verdict"].startswith("For one call of the generator")
    sides = [[Image.open(out / side / f"{row:05d}-{SEEDS[row % 2]}.png") for row in range(6)] for side in ("before", "after")]
    assert all(left.size == right.size for left, right in zip(*sides, strict=True))
    moved = sum(left.tobytes() != right.tobytes() for left, right in zip(*sides, strict=True))
    assert moved >= 5  # one that is unlike all drawings may be left as it is
    page = write_worth(out, found, arms(scored(found)), title="Worth", how="A test.").read_text(encoding="utf-8")
    assert page.count("data:image/webp") == 2 * len(captions)
