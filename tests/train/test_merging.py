"""Merged runs: a LoRA of stacked ranks changes weights by the weighted sum, arcs keep lengths, and what cannot is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from flowalign import runs
from flowalign.errors import CheckpointError, ConfigError
from flowalign.families.loading import open_family
from flowalign.settings import Config
from flowalign.train.merging import coefficients, compressed, gram_of_factors, merge_factors, merge_weights, shares

Factors = dict[str, tuple[Tensor, Tensor]]
FILE = "weights/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def trained(settings: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs of one tiny model: three LoRAs of different ranks, scales and layers, and two of all weights."""
    folder = tmp_path_factory.mktemp("parts")
    for name, more in {
        "one": ("trainable.rank=2", "trainable.alpha=6"),
        "two": ("trainable.rank=3", "train.seed=5"),
        "few": ("trainable.rank=2", "trainable.targets=[to_q, to_v]", "train.seed=9"),
        "whole": ("trainable.kind=full", "train.learning_rate=1e-4"),
        "other": ("trainable.kind=full", "train.learning_rate=1e-4", "train.seed=5", "objective={name: hinge}"),
    }.items():
        runs.align(settings(folder / name, *more, "train.steps=1", "data.validation=null", "sample.count=1"), progress=False)
    return {path.name: path for path in folder.iterdir()}


def change(base: Path, run: Path) -> dict[str, Tensor]:
    """ΔW of every weight of the U-Net, as PEFT merges an adapter into it, or as it lies in a whole model."""
    start = open_family(base).denoiser.state_dict()
    family = open_family(run)
    if getattr(family.denoiser, "peft_config", None):
        family.denoiser.fuse_lora()
        family.denoiser.unload_lora()
    end = family.denoiser.state_dict()
    return {name: (end[name].double() - start[name].double()) for name in start}


def lora(seed: int, rank: int, layers: tuple[str, ...] = ("a", "b"), size: tuple[int, int] = (7, 5)) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: (torch.randn(rank, size[1], generator=generator), torch.randn(size[0], rank, generator=generator))
        for layer in layers
    }


def product(factors: tuple[Tensor, Tensor]) -> Tensor:
    a, b = factors
    return b.double().flatten(1) @ a.double().flatten(1)


def test_stacked_ranks_are_the_weighted_sum_and_the_mean_of_factors_is_not() -> None:
    parts, weights = [lora(0, 2), lora(1, 3), lora(2, 2)], [0.5, 0.3, -0.4]
    merged, used = merge_factors(parts, weights, "linear", 0.0)
    for layer in ("a", "b"):
        wanted = sum(weight * product(part[layer]) for weight, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(product(merged[layer]), wanted, atol=1e-6, rtol=0)
        assert merged[layer][0].shape == (7, 5)
        assert used[layer] == weights
    same = [lora(0, 2), lora(1, 2)]
    averaged = product(tuple(0.5 * (x + y) for x, y in zip(same[0]["a"], same[1]["a"], strict=True)))  # type: ignore[arg-type]
    wrong = (averaged - 0.5 * (product(same[0]["a"]) + product(same[1]["a"]))).norm()
    assert wrong > 0.3 * averaged.norm()


def test_convolutions_are_stacked_too() -> None:
    generator = torch.Generator().manual_seed(3)
    parts = [
        {"c": (torch.randn(r, 4, 3, 3, generator=generator), torch.randn(6, r, 1, 1, generator=generator))} for r in (2, 1)
    ]
    merged, _ = merge_factors(parts, [0.25, 0.75], "linear", 0.0)
    a, b = merged["c"]
    assert (a.shape, b.shape) == ((3, 4, 3, 3), (6, 3, 1, 1))
    x = torch.randn(1, 4, 8, 8, generator=generator)

    def applied(down: Tensor, up: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down, padding=1), up)

    wanted = 0.25 * applied(*parts[0]["c"]) + 0.75 * applied(*parts[1]["c"])
    torch.testing.assert_close(applied(a, b), wanted, atol=1e-5, rtol=0)


def test_inner_products_are_those_of_the_whole_changes() -> None:
    parts = [lora(seed, rank)["a"] for seed, rank in ((0, 2), (1, 4), (2, 1))]
    whole = torch.stack([product(part).flatten() for part in parts])
    torch.testing.assert_close(gram_of_factors(parts), whole @ whole.T)


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Shoemake 1985, of vectors of any length, written out."""
    angle = math.acos(float((first @ second) / (first.norm() * second.norm())))
    return (math.sin((1 - share) * angle) * first + math.sin(share * angle) * second) / math.sin(angle)


@pytest.mark.parametrize("back", [0.0, 0.3])
def test_slerp_is_shoemakes_layer_by_layer_and_goes_back_to_the_base(back: float) -> None:
    parts = [lora(0, 2), lora(1, 3)]
    merged, used = merge_factors(parts, [0.7, 0.3], "slerp", back)
    for layer in ("a", "b"):
        wanted = slerp(*(product(part[layer]).flatten() for part in parts), 0.3)
        torch.testing.assert_close(product(merged[layer]).flatten(), (1 - back) * wanted, atol=1e-5, rtol=0)
    assert used["a"] != used["b"], "each layer has an angle of its own"


def test_changes_of_one_length_keep_it_along_the_arc_and_lose_it_along_the_line() -> None:
    right = torch.eye(3, dtype=torch.float64)
    for weights in ([1 / 3, 1 / 3, 1 / 3], [0.2, 0.3, 0.5]):
        assert coefficients(right, weights, "slerp", 0.0).norm() == pytest.approx(1)
        assert coefficients(right, weights, "linear", 0.0).norm() < 0.7
    assert coefficients(right, [0.2, 0.3, 0.5], "warp", 0.25).norm() == pytest.approx(0.75)
    # three at right angles with equal weights: halfway between two, then a third of the way to the last
    third = coefficients(right, [1 / 3] * 3, "slerp", 0.0)
    assert third.tolist() == pytest.approx([math.sin(math.pi / 3) / math.sqrt(2)] * 2 + [math.sin(math.pi / 6)])


@pytest.mark.parametrize(
    "gram", [[[4.0, 4.0], [4.0, 4.0]], [[1.0, -2.0], [-2.0, 4.0]], [[0.0, 0.0], [0.0, 5.0]], [[0.0, 0.0], [0.0, 0.0]]]
)
def test_parallel_opposite_and_missing_changes_are_joined_in_a_straight_line(gram: list[list[float]]) -> None:
    assert coefficients(torch.tensor(gram), [0.25, 0.75], "slerp", 0.0).tolist() == [0.25, 0.75]


def test_a_smaller_rank_is_the_nearest_and_says_what_it_lost() -> None:
    factors = merge_factors([lora(0, 2), lora(1, 3)], [0.5, 0.5], "linear", 0.0)[0]
    small, lost = compressed(factors, 2)
    squares = total = 0.0
    for layer in ("a", "b"):
        values = np.linalg.svd(product(factors[layer]).numpy(), compute_uv=False)
        gap = float((product(small[layer]) - product(factors[layer])).norm())
        assert gap == pytest.approx(math.sqrt((values[2:] ** 2).sum()), rel=1e-4)
        squares, total = squares + gap**2, total + float((values**2).sum())
        assert small[layer][0].shape == (2, 5)
        assert small[layer][1].shape == (7, 2)
    assert lost == pytest.approx(math.sqrt(squares / total), rel=1e-4)
    same, nothing = compressed(factors, 5)
    torch.testing.assert_close(product(same["a"]), product(factors["a"]), atol=1e-5, rtol=0)
    assert nothing < 1e-6


def test_whole_weights_and_integers() -> None:
    base = {"w": torch.ones(2, 3), "steps": torch.tensor(7)}
    others = [{"w": torch.ones(2, 3) + 1, "steps": torch.tensor(8)}, {"w": torch.ones(2, 3) - 3, "steps": torch.tensor(9)}]
    merged, used = merge_weights(base, others, [0.5, 0.5], "linear", 0.0)
    assert torch.equal(merged["w"], torch.zeros(2, 3))
    assert merged["steps"] == 7
    assert used == {"w": [0.5, 0.5]}


@pytest.mark.parametrize("how", ["linear", "slerp", "warp"])
def test_a_merged_lora_changes_the_model_as_its_parts_together(
    trained: dict[str, Path], folders: dict[str, Path], tmp_path: Path, how: str
) -> None:
    result = runs.merge([str(trained[name]) for name in ("one", "two", "few")], out=tmp_path / "soup", how=how)
    parts = [change(folders["epsilon"], trained[name]) for name in ("one", "two", "few")]
    found = change(folders["epsilon"], tmp_path / "soup")
    told = json.loads((tmp_path / "soup" / "merge.json").read_text())
    assert told["rank"] == result["rank"] == 7
    layers = {name.removeprefix("unet."): c for name, c in told["coefficients"].items()}
    moved = 0
    for name, delta in found.items():
        c = layers.get(name.removesuffix(".weight"), [0, 0, 0])
        if how == "linear" and any(c):
            assert c == [1 / 3] * 3
        wanted = sum(share * part[name] for share, part in zip(c, parts, strict=True))
        torch.testing.assert_close(delta, wanted, atol=1e-6, rtol=0)
        moved += bool(delta.abs().max() > 1e-5)
    assert moved > 10
    if how == "warp":
        assert told["back"] == 0.5


def test_plain_diffusers_draws_with_it_what_generate_draws(
    trained: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    runs.merge([str(trained["one"]), str(trained["two"])], weights=[0.8, 0.4], out=tmp_path / "soup")
    runs.generate(str(tmp_path / "soup"), ["a b"], seeds=[3], steps=3, guidance=2.0, out=tmp_path / "drawn", progress=False)
    pipe = StableDiffusionPipeline.from_pretrained(folders["epsilon"], safety_checker=None)
    pipe.load_lora_weights(tmp_path / "soup" / "weights")
    pipe.set_progress_bar_config(disable=True)
    seeded = torch.Generator().manual_seed(3)
    picture = pipe("a b", num_inference_steps=3, guidance_scale=2.0, generator=seeded, height=32, width=32).images[0]
    with Image.open(next((tmp_path / "drawn").glob("*.png"))) as drawn:
        assert np.array_equal(np.asarray(drawn), np.asarray(picture))
    card = (tmp_path / "soup" / "weights" / "README.md").read_text()
    assert "merged from what several runs changed (linear)" in card
    assert "## Training" not in card
    assert runs.export_kohya(tmp_path / "soup")["file"].endswith("kohya.safetensors")


def test_one_run_with_all_the_weight_is_that_run(trained: dict[str, Path], folders: dict[str, Path], tmp_path: Path) -> None:
    runs.merge([str(trained["one"]), str(trained["two"])], weights=[1, 0], out=tmp_path / "same")
    found, wanted = (change(folders["epsilon"], run) for run in (tmp_path / "same", trained["one"]))
    for name, delta in wanted.items():
        torch.testing.assert_close(found[name], delta, atol=1e-7, rtol=0)


def test_a_smaller_rank_is_said_and_kept(trained: dict[str, Path], tmp_path: Path) -> None:
    result = runs.merge([str(trained["one"]), str(trained["two"])], out=tmp_path / "small", rank=2)
    assert result["rank"] == 2
    assert 0 < result["lost"] < 1
    assert f"{result['lost']:.2g} of the change lost" in result["summary"]


def test_whole_models_are_merged(trained: dict[str, Path], folders: dict[str, Path], tmp_path: Path) -> None:
    runs.merge([str(trained["whole"]), str(trained["other"])], weights=[0.7, 0.3], out=tmp_path / "soup")
    parts = [change(folders["epsilon"], trained[name]) for name in ("whole", "other")]
    found = change(folders["epsilon"], tmp_path / "soup")
    assert max(float((parts[0][name] - parts[1][name]).abs().max()) for name in found) > 1e-5
    for name, delta in found.items():
        torch.testing.assert_close(delta, 0.7 * parts[0][name] + 0.3 * parts[1][name], atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("given", "more", "error", "said"),
    [
        (["one"], {}, ConfigError, "number of runs to merge is 1"),
        (["one", "two"], {"how": "mean"}, ConfigError, "merged by 'mean'; allowed: linear, slerp, warp"),
        (["one", "two"], {"weights": [1.0]}, ConfigError, "give one finite number for each"),
        (["one", "two"], {"weights": [0.5, float("nan")]}, ConfigError, "give one finite number for each"),
        (["one", "two"], {"weights": [0.5, 0.4], "how": "slerp"}, ConfigError, "slerp takes weights above 0 that sum to 1"),
        (["one", "two"], {"weights": [1.5, -0.5], "how": "warp"}, ConfigError, "warp takes weights above 0"),
        (["one", "two"], {"back": 1.5}, ConfigError, "back is 1.5; give 0"),
        (["one", "two"], {"back": 1.0}, CheckpointError, "would change nothing"),
        (["one", "whole"], {}, CheckpointError, "merge runs of one kind"),
        (["whole", "other"], {"rank": 2}, ConfigError, "rank is 2, and the runs are whole models"),
        (["one", "nowhere"], {}, CheckpointError, "nowhere is not the folder of a finished run"),
    ],
)
def test_what_cannot_be_merged_is_one_sentence(
    trained: dict[str, Path], tmp_path: Path, given: list[str], more: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        runs.merge([str(trained.get(name, name)) for name in given], out=tmp_path / "out", **more)
    assert not (tmp_path / "out" / "weights").exists()


def test_runs_of_different_bases_and_folders_in_use_are_refused(
    trained: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    other = tmp_path / "elsewhere"
    shutil.copytree(trained["two"], other)
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace(str(folders["epsilon"]), str(folders["sample"])))
    with pytest.raises(CheckpointError, match="the runs are of 2 bases"):
        runs.merge([str(trained["one"]), str(other)], out=tmp_path / "out")
    (other / "config.yaml").write_text(text.replace("steer: null", "steer: {objectives: [a, b]}"))
    with pytest.raises(CheckpointError, match="one of the runs is steered"):
        runs.merge([str(trained["one"]), str(other)], out=tmp_path / "out")
    with pytest.raises(ConfigError, match=r"^out .* already holds a run; allowed: an empty folder; give another .* --out\.$"):
        runs.merge([str(trained["one"]), str(trained["two"])], out=other)
    for place in ("weights", "rounds/00/align", "rounds/01/align"):
        (tmp_path / "loop" / place).mkdir(parents=True)
    (tmp_path / "loop" / "config.yaml").write_text("prompts: a\nrewards: [style]\n")
    with pytest.raises(CheckpointError, match=r"is the folder of a loop of rounds; give .* such as .*rounds/01/align\."):
        runs.merge([str(trained["one"]), str(tmp_path / "loop")], out=tmp_path / "out")
    with pytest.raises(ConfigError, match="runs to merge is 0"):
        shares(None, 0, "linear")
