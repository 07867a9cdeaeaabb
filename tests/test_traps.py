"""Mistakes that published training code made: whole runs here, single steps where the table of docs/traps.md says."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from flowalign import config, runs
from flowalign.evaluate.guard import TIMES
from flowalign.rng import Keyed
from flowalign.runs import training
from flowalign.settings import Config
from flowalign.setup import Prepared
from flowalign.watch import validation
from tests.conftest import schedulers, tiny_pipeline
from tests.families.conftest import sdxl

Make = Callable[..., Prepared]
ROOT = Path(__file__).resolve().parents[1]


def test_every_trap_of_the_table_has_tests_that_exist() -> None:
    text = (ROOT / "docs" / "traps.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| [^|]+ \| ([^|]+) \|$", text, re.MULTILINE)
    assert [int(number) for number, _ in rows] == sorted({int(number) for number, _ in rows})
    assert {1, 2, 3, 4, 5, 7, 13, 14, 15, 16, 17, 23} <= {int(number) for number, _ in rows}
    for number, names in rows:
        found = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", names)
        assert found, f"trap {number} names no test"
        for path, name in found:
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}::{name}"


def test_the_shipped_rate_goes_with_one_over_beta() -> None:
    """The authors' code steps at 1e-8 times the pairs of a step at beta 5000; their paper prints a thousandth of it."""
    settings = config.load(ROOT / "configs" / "sd15-pickapic.yaml")
    pairs = settings.train.batch_size * settings.train.accumulation
    assert pairs == 2048
    assert settings.train.learning_rate * settings.objective.knobs["beta"] == pytest.approx(1e-8 * pairs * 5000)
    comment = (ROOT / "configs" / "sd15-pickapic.yaml").read_text(encoding="utf-8")
    (rate,) = re.findall(r"beta 2000 use (\S+)\. With", comment)
    assert float(rate) * 2000 == pytest.approx(settings.train.learning_rate * settings.objective.knobs["beta"])


def scene(width: int, height: int) -> Image.Image:
    """A smooth drawing whose centre square is the same at every size and shape."""
    side = min(width, height)
    x, y = ((np.arange(length) - (length - 1) / 2) / side for length in (width, height))
    waves = [np.sin(3 * x[None, :] + k) * np.cos(4 * y[:, None] - k) for k in range(3)]
    return Image.fromarray((127 + 120 * np.stack(waves, -1)).astype(np.uint8))


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """Pairs of the same drawing at different sizes and shapes; a side of 1023 is one that bfloat16 does not have."""
    sizes = [((1023, 769), (256, 384)), ((300, 300), (641, 513))]
    rows = []
    for place, pair in enumerate(sizes):
        for side, (width, height) in zip(("chosen", "rejected"), pair, strict=True):
            scene(width, height).save(tmp_path / f"{place}-{side}.png")
        names = {side: f"{place}-{side}.png" for side in ("chosen", "rejected")}
        rows.append(json.dumps({"prompt": f"{'ab'[place]} thing", **names}) + "\n")
    (tmp_path / "uneven.jsonl").write_text("".join(rows))
    return tmp_path / "uneven.jsonl"


def test_a_step_tells_each_picture_of_a_pair_its_own_size_and_crop(prepared: Make, uneven: Path, tmp_path: Path) -> None:
    """From files to the arguments of both denoisers, in bfloat16: one row a picture, chosen and rejected in turn."""
    torch.manual_seed(0)
    sdxl().save_pretrained(tmp_path / "sdxl")
    ready = prepared(
        f"model.checkpoint={tmp_path / 'sdxl'}",
        f"data.train={uneven}",
        f"data.validation={uneven}",
        "data.resolution=64",
        "train.precision=bf16",
    )
    batch = ready.first_batch()
    seen: list[Tensor] = []
    for module in (ready.policy, ready.step.reference):
        module.register_forward_pre_hook(
            lambda _, inputs, options: seen.append(options["added_cond_kwargs"]["time_ids"]), with_kwargs=True
        )
    ready.step(batch, Keyed(0))
    own = {
        "a thing": [[769, 1023, 0, 10, 64, 64], [384, 256, 16, 0, 64, 64]],
        "b thing": [[300, 300, 0, 0, 64, 64], [513, 641, 0, 7, 64, 64]],
    }
    order = [ready.train.cached.prompts[ready.train.cached.prompt[list(ready.train.cached.ids).index(i)]] for i in batch.ids]
    assert sorted(order) == ["a thing", "b thing"]
    expected = torch.tensor([row for prompt in order for row in own[prompt]], dtype=torch.float32)
    assert len(seen) == 2
    assert all(ids.dtype == torch.float32 and torch.equal(ids, expected) for ids in seen)


def test_pictures_of_different_sizes_keep_their_shape_and_lie_on_each_other(prepared: Make, uneven: Path) -> None:
    """The same drawing in both places, so nothing may be preferred; stretched to a square it would be another drawing."""
    ready = prepared(f"data.train={uneven}", f"data.validation={uneven}", "train.caption_dropout=0")
    chosen, rejected = ready.first_batch().mean.unbind(1)
    alike = (chosen - rejected).abs().mean(dim=(1, 2, 3))
    stretched = ready.family.encode_images(pixels(scene(1023, 769).resize((16, 16)))).mean
    square = ready.family.encode_images(pixels(scene(300, 300).resize((16, 16)))).mean
    assert alike.max() < 0.2 * (stretched - square).abs().mean()


def pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize(("trainable", "reference"), [("lora", "adapters_off"), ("lora", "copy"), ("full", "copy")])
def test_a_resume_holds_the_policy_against_the_pretrained_model(
    settings: Callable[..., Config],
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trainable: str,
    reference: str,
) -> None:
    """A reference frozen anew at the resume would be the trained policy, and the loss would start at log 2 again."""
    common = (f"trainable.kind={trainable}", f"reference.kind={reference}", "train.save_every=2", "train.learning_rate=2e-3")
    runs.align(settings(tmp_path / "whole", *common, "train.steps=4"), progress=False)
    runs.align(settings(tmp_path / "run", *common, "train.steps=2"), progress=False)
    resumed: list[Prepared] = []
    train = training._train

    def record(config: Config, ready: Prepared, *rest: Any) -> Any:
        resumed.append(ready)
        return train(config, ready, *rest)

    monkeypatch.setattr(training, "_train", record)
    runs.align(settings(tmp_path / "run", *common, "train.steps=4"), resume=True, progress=False)
    pretrained = UNet2DConditionModel.from_pretrained(folders["epsilon"], subfolder="unet").state_dict()
    kept = resumed[0].step.reference.state_dict()
    assert kept.keys() == pretrained.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in pretrained.items())
    whole, parts = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("whole", "run")
    )
    after = [{key: line[key] for key in line if key != "train/pairs_per_second"} for line in whole if line["step"] > 2]
    assert [{key: line[key] for key in line if key != "train/pairs_per_second"} for line in parts if line["step"] > 2] == after
    first = next(line for line in after if "train/loss" in line)
    assert abs(first["train/loss"] - math.log(2)) > 1e-2
    assert abs(first["train/error/chosen"]) > 1e-4


def test_times_follow_the_length_of_the_checkpoints_own_schedule(prepared: Make, tmp_path: Path) -> None:
    """Fifty times instead of the usual thousand: all of them are trained on, and no other."""
    scheduler = type(schedulers()["epsilon"])(num_train_timesteps=50, beta_schedule="scaled_linear", steps_offset=1)
    tiny_pipeline("epsilon", scheduler).save_pretrained(tmp_path / "fifty")
    for timesteps in ("uniform", "stratified"):
        ready = prepared(f"model.checkpoint={tmp_path / 'fifty'}", f"train.timesteps={timesteps}", "train.batch_size=12")
        told: list[Tensor] = []
        ready.policy.register_forward_pre_hook(lambda _, inputs, options, told=told: told.append(inputs[1]), with_kwargs=True)
        with torch.no_grad():
            for batch in islice(ready.batches(0), 12):
                ready.step(batch, Keyed(0))
        times = torch.cat(told)
        assert times.dtype == torch.int64
        assert 0 <= times.min() <= 5
        assert 44 <= times.max() <= 49
        if timesteps == "stratified":
            assert set(times.tolist()) == set(range(50))
    metrics = validation(ready.step, ready.held_out, ready.config, ready.accelerator)
    assert metrics["rewards/margins"] == 0
    assert {name: value for name, value in metrics.items() if "/t" in name} == {
        f"rewards/{name}/{label}": value for name, value in (("margins", 0.0), ("accuracies", 0.5)) for label in TIMES
    }
    assert metrics["loss"] == pytest.approx(math.log(2))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bank_is_computed_in_the_shapes_that_training_has(
    prepared: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: str
) -> None:
    """In bfloat16 another batch size gives other last bits; the last batch is filled up, not smaller."""
    shapes: list[tuple[bool, torch.Size]] = []
    forward = UNet2DConditionModel.forward

    def record(self: Any, sample: Tensor, *rest: Any, **more: Any) -> Any:
        shapes.append((torch.is_grad_enabled(), sample.shape))
        return forward(self, sample, *rest, **more)

    monkeypatch.setattr(UNet2DConditionModel, "forward", record)
    ready = prepared(
        "reference.bank=2",
        f"data.cache={tmp_path / 'cache'}",
        "train.batch_size=5",
        f"train.precision={precision}",
        "data.validation=null",
        "data.held_out=0.3",
    )
    bank = [shape for learns, shape in shapes]
    shapes.clear()
    ready.step(ready.first_batch(), Keyed(0))
    assert shapes == [(True, torch.Size([10, 4, 8, 8]))]  # the policy alone
    count, held = len(ready.train), len(ready.held_out or ())
    assert bank[: 2 * math.ceil(count / 5)] == [shapes[0][1]] * (2 * math.ceil(count / 5))
    assert count % 5
    assert held
    assert ready.step.self_test(ready.first_batch(), Keyed(0)) < 1e-3
