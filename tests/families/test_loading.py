"""Finding, loading and opening checkpoints in each of their forms, and what is said when that fails."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from diffusers.loaders import single_file_utils
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowalign.errors import CheckpointError
from flowalign.families.loading import LORA, detect_family, locate, open_checkpoint
from flowalign.families.sd import StableDiffusion
from flowalign.families.sdxl import StableDiffusionXL
from tests.families.conftest import sdxl

RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
UNET = (  # diffusers prefix -> original prefix, for two blocks of one layer each
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"),
    ("down_blocks.0.resnets.0", "input_blocks.1.0"),
    ("down_blocks.0.attentions.0", "input_blocks.1.1"),
    ("down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"),
    ("down_blocks.1.resnets.0", "input_blocks.3.0"),
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
    ("up_blocks.0.resnets.0", "output_blocks.0.0"),
    ("up_blocks.0.resnets.1", "output_blocks.1.0"),
    ("up_blocks.0.upsamplers.0.conv", "output_blocks.1.1.conv"),
    ("up_blocks.1.resnets.0", "output_blocks.2.0"),
    ("up_blocks.1.attentions.0", "output_blocks.2.1"),
    ("up_blocks.1.resnets.1", "output_blocks.3.0"),
    ("up_blocks.1.attentions.1", "output_blocks.3.1"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
)
VAE = (
    (r"(encoder|decoder)\.mid_block\.resnets\.0", r"\1.mid.block_1"),
    (r"(encoder|decoder)\.mid_block\.resnets\.1", r"\1.mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_(q|k|v)", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2"),
    (r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample"),
    (r"decoder\.up_blocks\.0\.", "decoder.up.1."),  # counted from the other end
    (r"decoder\.up_blocks\.1\.", "decoder.up.0."),
    (r"(decoder\.up\.\d)\.resnets", r"\1.block"),
    (r"(decoder\.up\.\d)\.upsamplers\.0", r"\1.upsample"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
)


OPEN_CLIP = (
    (r"^text_model\.", ""),
    (r"^embeddings\.token_embedding", "token_embedding"),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^encoder\.layers", "transformer.resblocks"),
    (r"layer_norm([12])", r"ln_\1"),
    (r"final_layer_norm", "ln_final"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"^text_projection\.weight", "text_projection"),
)


def renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in pairs:
        name = re.sub(pattern, replacement, name)
    return name


def open_clip(encoder: Any) -> dict[str, Tensor]:
    """A CLIP text encoder's weights as OpenCLIP has them: one matrix for queries, keys and values, a transposed projection."""
    state, weights = encoder.state_dict(), {}
    for key, tensor in state.items():
        name = renamed(key, OPEN_CLIP)
        if key.endswith(("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias")):
            continue
        if ".q_proj." in key:
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
            tensor = torch.cat([state[key.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
        weights[name] = tensor.T if name == "text_projection" else tensor
    return weights


def original_layout(pipeline: Any) -> dict[str, Tensor]:
    """The tiny pipeline's weights under the names of the original Stable Diffusion code, for XL of Stability's."""
    weights = {}
    for key, tensor in pipeline.unet.state_dict().items():
        ours, theirs = next(pair for pair in UNET if key.startswith(pair[0] + "."))
        rest = key.removeprefix(ours)
        if "resnets" in ours:
            for a, b in RESNET:
                rest = rest.replace(a, b)
        weights["model.diffusion_model." + theirs + rest] = tensor
    for key, tensor in pipeline.vae.state_dict().items():
        name = renamed(key, VAE)
        pointwise = "attentions" in key and "group_norm" not in key and tensor.ndim == 2
        weights["first_stage_model." + name] = tensor[:, :, None, None] if pointwise else tensor
    second = getattr(pipeline, "text_encoder_2", None)
    first = "cond_stage_model" if second is None else "conditioner.embedders.0"
    for key, tensor in pipeline.text_encoder.state_dict().items():
        weights[f"{first}.transformer.text_model." + key.removeprefix("text_model.")] = tensor
    for key, tensor in ({} if second is None else open_clip(second)).items():
        weights["conditioner.embedders.1.model." + key] = tensor
    return {name: tensor.clone().contiguous() for name, tensor in weights.items()}


@pytest.fixture
def single_file(folders: dict[str, Path], tmp_path: Path) -> Path:
    pipeline = StableDiffusionPipeline.from_pretrained(folders["v_zero_snr"], safety_checker=None)
    path = tmp_path / "models" / "tiny-v1.5.safetensors"
    path.parent.mkdir()
    save_file(original_layout(pipeline), path)
    return path


def settings_only(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))


def beside(file: Path) -> Path:
    return file.parent


def same_name(file: Path) -> Path:
    return file.with_suffix("")


@pytest.mark.parametrize("place", [beside, same_name])
def test_a_single_file_is_the_folder_it_was_made_from(
    place: Callable[[Path], Path], single_file: Path, folders: dict[str, Path], offline: Path
) -> None:
    settings_only(folders["v_zero_snr"], place(single_file))
    ours = StableDiffusion.load(single_file, dtype=torch.float32)
    theirs = StableDiffusion.load(folders["v_zero_snr"], dtype=torch.float32)
    assert [ours.fingerprint(part) for part in ("images", "prompts", "denoiser")] == [
        theirs.fingerprint(part) for part in ("images", "prompts", "denoiser")
    ]
    assert ours.noise.prediction_type == "v_prediction"
    assert detect_family(single_file) == "sd"
    assert type(ours.pipeline(ours.denoiser)) is StableDiffusionPipeline


def test_a_single_file_of_xl_is_the_folder_it_was_made_from(tmp_path: Path, offline: Path) -> None:
    """Its two text encoders are told apart by their width, as in real ones."""
    pipeline, file = sdxl(second=40), tmp_path / "tiny-xl.safetensors"
    pipeline.save_pretrained(tmp_path / "whole")
    save_file(original_layout(pipeline), file)
    settings_only(tmp_path / "whole", file.with_suffix(""))
    ours, theirs = (StableDiffusionXL.load(each, dtype=torch.float32) for each in (file, tmp_path / "whole"))
    for part in ("images", "prompts", "denoiser"):
        assert ours.fingerprint(part) == theirs.fingerprint(part), part
    assert detect_family(file) == "sdxl"


def test_a_transformer_alone_is_no_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "flux1-dev.safetensors"
    save_file({"double_blocks.0.img_attn.proj.weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="holds no whole model in the original layout"):
        locate(file)


def test_a_single_file_without_settings_says_what_to_add(single_file: Path, offline: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no configuration .* into the folder .*tiny-v1\.5") as caught:
        locate(single_file)
    assert "\n" not in str(caught.value)


def in_the_hubs_cache(offline: Path, name: str, folder: Path) -> Path:
    """The snapshot of a hub id that is like `folder`."""
    store, commit = offline / f"models--{name.replace('/', '--')}", "0" * 39 + "1"
    shutil.copytree(folder, store / "snapshots" / commit)
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text(commit)
    return store / "snapshots" / commit


def test_the_kind_of_a_single_file_without_settings_is_read_off_names_and_shapes(
    single_file: Path, folders: dict[str, Path], offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    own = single_file_utils.load_state_dict
    monkeypatch.setattr(single_file_utils, "load_state_dict", lambda path, **rest: read.append(path) or own(path, **rest))
    first, second = (
        in_the_hubs_cache(offline, name, folders[kind])
        for name, kind in (
            ("stable-diffusion-v1-5/stable-diffusion-v1-5", "v_zero_snr"),
            ("stabilityai/stable-diffusion-2-1", "sample"),
        )
    )
    assert locate(single_file, weights=False).folder == first
    outlined = StableDiffusion.outline(single_file, dtype=torch.float32)
    assert read == []
    real = StableDiffusion.load(single_file, dtype=torch.float32)
    assert read != []
    assert outlined.noise.prediction_type == real.noise.prediction_type == "v_prediction"
    key = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    for width, found in ((768, first), (1024, second)):  # of the text encoder's states, by which diffusers tells 1.x from 2.x
        save_file({key: torch.zeros(1, width)}, single_file)
        assert locate(single_file).folder == found


def test_a_model_in_the_hubs_cache_is_found_offline(folders: dict[str, Path], offline: Path) -> None:
    in_the_hubs_cache(offline, "someone/tiny", folders["sample"])
    family = StableDiffusion.load("someone/tiny", dtype=torch.float32)
    assert family.fingerprint("denoiser") == StableDiffusion.load(folders["sample"], dtype=torch.float32).fingerprint(
        "denoiser"
    )


def test_an_outline_of_a_single_file_comes_from_the_settings_beside_it(single_file: Path, folders: dict[str, Path]) -> None:
    settings_only(folders["v_zero_snr"], single_file.with_suffix(""))
    outlined = StableDiffusion.outline(single_file, dtype=torch.float32)
    real = StableDiffusion.load(single_file, dtype=torch.float32)
    assert {parameter.device.type for parameter in outlined.denoiser.parameters()} == {"meta"}
    assert {n: p.shape for n, p in outlined.denoiser.named_parameters()} == {
        n: p.shape for n, p in real.denoiser.named_parameters()
    }


def broken_index(root: Path, good: Path) -> str:
    (root / "broken").mkdir()
    (root / "broken" / "model_index.json").write_text("{")
    return str(root / "broken")


def pickled(root: Path, good: Path) -> str:
    (root / "model.ckpt").write_bytes(b"\x80\x04.")
    return str(root / "model.ckpt")


def torn(root: Path, good: Path) -> str:
    (root / "torn.safetensors").write_bytes(b"12345678 not a header")
    return str(root / "torn.safetensors")


def only_lora(root: Path, good: Path) -> str:
    save_file({"unet.down.to_k.lora_A.weight": torch.ones(1)}, root / "lora.safetensors")
    return str(root / "lora.safetensors")


def lora_run(root: Path, good: Path) -> str:
    (root / "run" / "weights").mkdir(parents=True)
    save_file({"unet.down.to_k.lora_A.weight": torch.ones(1)}, root / "run" / "weights" / LORA)
    return str(root / "run")


def no_u_net(root: Path, good: Path) -> str:
    shutil.copytree(good, root / "headless")
    shutil.rmtree(root / "headless" / "unet")
    return str(root / "headless")


def no_vae(root: Path, good: Path) -> str:
    shutil.copytree(good, root / "blind")
    shutil.rmtree(root / "blind" / "vae")
    return str(root / "blind")


def only_bin(root: Path, good: Path) -> str:
    shutil.copytree(good, root / "bin")
    weights = root / "bin" / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    return str(root / "bin")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root, good: str(root / "nothing" / "at" / "all"), "does not exist"),
        (lambda root, good: "someone/not-there", "could not be fetched"),
        (lambda root, good: str(root), r"has no model_index\.json"),
        (broken_index, r"model_index\.json cannot be read"),
        (pickled, r"is not a \.safetensors file"),
        (torn, "cannot be read"),
        (only_lora, "no whole model"),
        (lora_run, "is a LoRA run"),
        (no_u_net, "cannot be loaded"),
        (no_vae, r"vae/config\.json cannot be read"),
        (only_bin, "cannot be loaded"),
    ],
)
def test_mistakes_are_one_sentence(
    make: Callable[[Path, Path], str], words: str, folders: dict[str, Path], tmp_path: Path, offline: Path
) -> None:
    checkpoint = make(tmp_path, folders["epsilon"])
    with pytest.raises(CheckpointError, match=words) as caught:
        StableDiffusion.load(checkpoint, dtype=torch.float32)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert Path(checkpoint).name in message


def test_the_family_is_read_from_the_pipelines_class(folders: dict[str, Path], tmp_path: Path) -> None:
    assert detect_family(folders["epsilon"]) == "sd"
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KolorsPipeline"}))
    with pytest.raises(CheckpointError, match=r"is a KolorsPipeline.*StableDiffusionPipeline"):
        detect_family(tmp_path)


def write_lora_run(root: Path, base: str) -> dict[str, Tensor]:
    """A run folder with a LoRA of rank 2 and alpha 6 whose up-projections are not zero."""
    family = StableDiffusion.load(base, dtype=torch.float32)
    torch.manual_seed(3)
    family.denoiser.add_adapter(
        LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=list(family.lora_targets))
    )
    state = get_peft_model_state_dict(family.denoiser)
    StableDiffusionPipeline.save_lora_weights(
        root / "weights", unet_lora_layers=state, unet_lora_adapter_metadata=family.denoiser.peft_config["default"].to_dict()
    )
    (root / "config.yaml").write_text(
        yaml.safe_dump({"model": {"checkpoint": base, "family": "auto", "revision": None, "variant": None}})
    )
    x_t, t = torch.ones(1, 4, 16, 16), torch.tensor([0.5])
    return {"prediction": family.predict(family.denoiser, x_t, t, family.encode_prompts(["a"])).detach()}


def test_a_lora_run_opens_as_its_base_with_the_adapter(folders: dict[str, Path], tmp_path: Path) -> None:
    trained = write_lora_run(tmp_path, str(folders["epsilon"]))["prediction"]
    base = StableDiffusion.load(folders["epsilon"], dtype=torch.float32)
    pipeline = open_checkpoint(tmp_path)
    x_t, t, conditioning = torch.ones(1, 4, 16, 16), torch.tensor([0.5]), base.encode_prompts(["a"])
    with torch.no_grad():
        torch.testing.assert_close(base.predict(pipeline.unet, x_t, t, conditioning), trained, rtol=0, atol=1e-6)
        assert not torch.allclose(base.predict(base.denoiser, x_t, t, conditioning), trained, atol=1e-3)


def test_a_full_run_opens_by_its_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["sample"], tmp_path / "weights")
    (tmp_path / "config.yaml").write_text("model: {checkpoint: /a/base/that/is/gone}\n")
    pipeline = open_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert pipeline.unet.dtype == pipeline.vae.dtype == torch.bfloat16
    assert detect_family(tmp_path) == "sd"


def test_runs_that_cannot_be_opened_say_why(folders: dict[str, Path], tmp_path: Path) -> None:
    write_lora_run(tmp_path, str(folders["epsilon"]))
    (tmp_path / "config.yaml").write_text("model: {checkpoint: /a/base/that/is/gone}\n")
    with pytest.raises(CheckpointError, match="gone does not exist"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {}\n")
    with pytest.raises(CheckpointError, match="names no base checkpoint"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"checkpoint": str(folders["epsilon"])}}))
    save_file({"unet.nowhere.to_k.lora_A.weight": torch.ones(2, 3)}, tmp_path / "weights" / LORA)
    with pytest.raises(CheckpointError, match="does not fit"):
        open_checkpoint(tmp_path)
