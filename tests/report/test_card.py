from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from diffusers import DiffusionPipeline
from PIL import Image

from flowalign import runs
from flowalign.config import dump, parse
from flowalign.errors import CheckpointError, ConfigError
from flowalign.report.card import literal, write_card
from flowalign.settings import Config
from tests.families.conftest import qwen_image

NASTY = "a `tick` | a pipe\nand <b>tags</b>"


def write_samples(run: Path, step: int, prompts: list[str], colour: tuple[int, int, int], side: int = 16) -> None:
    folder = run / "samples" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    rows = []
    for index, prompt in enumerate(prompts):
        name = f"{index:05d}-{index}.png"
        Image.new("RGB", (side, side), colour).save(folder / name)
        row = {"file_name": name, "prompt": prompt, "seed": index, "sampler": "default", "steps": 7, "guidance": 3.0}
        rows.append(json.dumps(row | {"height": side, "width": side, "generator": "x"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    (run / "weights").mkdir(parents=True)
    tree = {
        "model": {"checkpoint": "somebody/sd"},
        "data": {"train": "pairs|mine.jsonl"},
        "objective": {"name": "dpo", "beta": 5000},
        "trainable": {"rank": 8, "alpha": 4},
        "train": {"batch_size": 16, "accumulation": 8, "learning_rate": 3e-4, "warmup_steps": 20},
    }
    (run / "config.yaml").write_text(dump(parse(tree)))
    counts = {"comparisons": 1358, "prompts": 1354, "pictures": 2716, "ties": 12}
    sources = {"train": "pairs|mine.jsonl", "validation": "5% of the prompts of train"}
    data = {"train": counts, "held_out": None, "bad_rows": 3, "resolution": 64, "sources": sources}
    (run / "data.json").write_text(json.dumps(data))
    lines = [
        {"step": 0, "eval/rewards/accuracies": 0.5, "eval/error/chosen": 0.0},
        {"step": 10, "train/loss": 0.6},
        {"step": 150, "eval/rewards/accuracies": 0.931, "eval/error/chosen": -0.0042},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_the_card_says_what_the_run_was(run: Path) -> None:
    path = write_card(run)
    assert path == run / "weights" / "README.md"
    text = path.read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["base_model"] == "somebody/sd"
    assert values["base_model_relation"] == "adapter"
    assert values["library_name"] == "diffusers"
    assert {"dpo", "lora"} <= set(values["tags"])
    for row in (
        "| `beta` | 5,000 |",
        "| `label_smoothing` | 0 |",  # a default that config.yaml does not write out
        "| trained | LoRA, rank 8, alpha 4 |",
        "| optimizer steps | 1,000 |",
        "| pairs a step | 128 per process |",
        "| learning rate | 0.0003, 20 steps of warm-up, then constant |",
        "| train | 1,358 | 1,354 | 2,716 | 12 | `pairs\\|mine.jsonl` |",
        "| pairs ranked right | 0.5 | 0.931 |",
        "| error of chosen, policy − reference | 0 | -0.0042 |",
    ):
        assert row in body, row
    assert "`beta_dpo` 5000 in Diffusion-DPO's code and 2500 in diffusers' Stable Diffusion 1.5 script" in body
    assert "3 rows could not be used" in body
    assert "samples.png" not in body


def test_a_base_on_this_disk_is_no_hub_name(run: Path) -> None:
    tree = {"model": {"checkpoint": str(run)}, "data": {"train": "x.jsonl"}, "trainable": {"kind": "full"}}
    (run / "config.yaml").write_text(dump(parse(tree)))
    text = write_card(run).read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n", 2)[1])
    assert "base_model" not in front
    assert "lora" not in front["tags"]


def test_the_picture_has_before_above_after(run: Path) -> None:
    prompts = [NASTY, *(f"prompt {index}" for index in range(10))]
    write_samples(run, 0, prompts, (200, 0, 0))
    write_samples(run, 75, prompts, (0, 200, 0))
    write_samples(run, 150, prompts, (0, 0, 200))
    text = write_card(run).read_text(encoding="utf-8")
    assert "![the same prompts and seeds before and after](samples.png)" in text
    assert "1. `` a `tick` | a pipe and <b>tags</b> ``\n2. `prompt 0`" in text
    assert "7 steps, guidance 3" in text
    with Image.open(run / "weights" / "samples.png") as picture:
        assert picture.format == "PNG"
        side, gap, label = 128, 8, 18
        row = side + gap + label
        assert picture.size == (8 * (side + gap) + gap, 2 * (2 * row + 2 * gap))
        found = [
            [
                picture.getpixel((gap + column * (side + gap) + side // 2, gap + label + side // 2 + line))
                for column in (0, 2, 7)
            ]
            for line in (0, row, 2 * row + 2 * gap)
        ]
    red, blue, white = (200, 0, 0), (0, 0, 200), (255, 255, 255)
    assert found == [[red] * 3, [blue] * 3, [red, red, white]]  # eleven prompts: eight, then three


def test_steps_that_drew_something_else_are_no_comparison(run: Path) -> None:
    write_samples(run, 0, ["a", "b"], (0, 0, 0))
    write_samples(run, 150, ["a"], (0, 0, 0))
    assert "samples.png" not in write_card(run).read_text(encoding="utf-8")


def test_an_unfinished_run_has_no_card(run: Path) -> None:
    (run / "weights").rmdir()
    with pytest.raises(CheckpointError, match="has no weights to describe; finish the run"):
        write_card(run)
    (run / "weights").mkdir()
    (run / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="does not exist"):
        write_card(run)
    assert list((run / "weights").iterdir()) == []


@pytest.mark.parametrize("text", ["plain", "`", "a ``b`` c", "``` fence", "x`"])
def test_code_spans_end_where_they_should(text: str) -> None:
    span = literal(text)
    fence = re.match("`+", span)[0]  # type: ignore[index]
    assert span.endswith(fence)
    inner = span.removeprefix(fence).removesuffix(fence)
    assert fence not in re.findall("`+", inner)  # CommonMark: the span ends at the next run of as many ticks
    assert inner.strip() == text


def drawn_by_the_card(run: Path) -> dict[str, object]:
    """What the code in a run's card leaves behind."""
    code = write_card(run).read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(code.replace("the name of a user", "ann"), names)
    return names


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_code_in_the_card_runs(kind: str, settings: Callable[..., Config], tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = [f"trainable.kind={kind}", "train.steps=2", "train.batch_size=4"]
    assert runs.align(settings(run, *overrides), progress=False)["finished"]
    names = drawn_by_the_card(run)
    assert names["image"].size == (32, 32)  # type: ignore[attr-defined]
    if kind == "lora":
        assert names["pipe"].get_active_adapters() == ["default_0"]  # type: ignore[attr-defined]
    with Image.open(run / "weights" / "samples.png") as picture:
        assert picture.size == (128 + 2 * 8, 2 * (128 + 8 + 18) + 2 * 8)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_code_in_the_card_runs_for_a_flow_without_all_its_encoders(
    kind: str, settings: Callable[..., Config], emoji: Path, tmp_path: Path
) -> None:
    run, checkpoint = tmp_path / "run", emoji / "tiny-sd3"
    assert runs.align(
        settings(run, f"trainable.kind={kind}", f"model.checkpoint={checkpoint}", "train.steps=2"),
        progress=False,
    )["finished"]
    names = drawn_by_the_card(run)  # the text encoders' files are float16
    assert names["image"].size == (64, 64)  # type: ignore[attr-defined]
    assert json.loads((run / "model.json").read_text())["absent"] == ["text_encoder_3", "tokenizer_3"]
    assert names["pipe"].text_encoder_3 is None  # type: ignore[attr-defined]


def test_a_card_asks_for_guidance_as_the_family_does(settings: Callable[..., Config], tmp_path: Path) -> None:
    run = tmp_path / "run"
    qwen_image().save_pretrained(tmp_path / "qwen")
    (run / "weights").mkdir(parents=True)
    config = settings(run, f"model.checkpoint={tmp_path / 'qwen'}", "sample.steps=2")
    (run / "config.yaml").write_text(dump(config))
    (run / "model.json").write_text('{"pipeline": "QwenImagePipeline", "absent": []}')
    text = write_card(run).read_text(encoding="utf-8")
    assert 'true_cfg_scale=5, negative_prompt=[""]).images[0]' in text
    call = text.split("pipe(")[1].split(").images")[0]
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "qwen")
    assert eval(f"pipe({call}, height=32, width=32)", {"pipe": pipe}).images[0].size == (32, 32)


def test_the_card_of_a_single_file_opens_it_by_its_class(run: Path, tmp_path: Path) -> None:
    tree = {"model": {"checkpoint": "a/b.safetensors"}, "data": {"train": "x"}, "objective": {"name": "dpo", "beta": 5000}}
    (run / "config.yaml").write_text(dump(parse(tree)))
    assert "## Use" not in write_card(run).read_text(encoding="utf-8")  # of what class it is, nothing says
    (run / "model.json").write_text('{"pipeline": "StableDiffusionXLPipeline", "absent": []}')
    text = write_card(run).read_text(encoding="utf-8")
    assert 'pipe = StableDiffusionXLPipeline.from_single_file("a/b.safetensors", dtype=torch.bfloat16)' in text
    assert "from diffusers import StableDiffusionXLPipeline" in text
