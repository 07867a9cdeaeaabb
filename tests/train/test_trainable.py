"""What learns, in which precision, and that a file which changes nothing is never written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open

from flowalign.errors import CheckpointError, ConfigError
from flowalign.train.trainable import LORA, distance, export, kohya, make_trainable, trained


@pytest.fixture
def unet(folders: dict[str, Path]) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(folders["epsilon"], subfolder="unet", dtype=torch.bfloat16)
    return unet.requires_grad_(False)


def lora(
    unet: UNet2DConditionModel, *, seed: int = 0, targets: tuple[str, ...] = ("to_q", "to_k"), idle: tuple[str, ...] = ()
) -> None:
    make_trainable(unet, "lora", rank=3, alpha=None, targets=targets, seed=seed, gradient_checkpointing=False, idle=idle)


def test_adapters_are_float32_on_a_bfloat16_model_and_start_as_nothing(unet: UNet2DConditionModel) -> None:
    names = set(dict(unet.named_parameters()))
    lora(unet)
    parameters = trained(unet)
    attentions = [name for name, _ in unet.named_modules() if name.endswith(("to_q", "to_k"))]
    assert len(parameters) == 2 * len(attentions) > 0
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert all(("lora_B" in name) == (not parameter.any()) for name, parameter in parameters.items())
    frozen = {name.replace(".base_layer", "") for name, p in unet.named_parameters() if not p.requires_grad}
    assert frozen == names
    assert next(unet.parameters()).dtype == torch.bfloat16


def test_patterns_adapt_the_layers_that_they_match(unet: UNet2DConditionModel) -> None:
    lora(unet, targets=("up_blocks.*.to_q", "mid_block.*.to_k", "conv_out"))
    found = {name.partition(".lora_")[0] for name in trained(unet)}
    layers = {name.removesuffix(".base_layer") for name, _ in unet.named_modules()}
    wanted = {name for name in layers if name.startswith("up_blocks.") and name.endswith(".to_q")}
    wanted |= {name for name in layers if name.startswith("mid_block.") and name.endswith(".to_k")}
    assert found == wanted | {"conv_out"}
    assert len(wanted) > 2


def test_a_pattern_of_no_layer_is_refused(unet: UNet2DConditionModel) -> None:
    with pytest.raises(ConfigError, match=r"'up_block.\*.to_q'\] match no layer .* such as down_blocks\.\*\.to_v"):
        lora(unet, targets=("to_q", "up_block.*.to_q"))


def test_the_way_from_the_first_weights_is_one_norm_over_all_of_them(unet: UNet2DConditionModel) -> None:
    lora(unet)
    start = {name: parameter.detach().clone() for name, parameter in trained(unet).items()}
    assert distance(trained(unet), start) == 0
    with torch.no_grad():
        for parameter in trained(unet).values():
            parameter += 0.25
    count = sum(parameter.numel() for parameter in trained(unet).values())
    assert distance(trained(unet), start) == pytest.approx(0.25 * count**0.5, rel=1e-5)


def test_adapters_depend_on_the_seed_and_on_nothing_else(folders: dict[str, Path]) -> None:
    found = []
    for seed, noise in ((0, 1), (0, 2), (5, 1)):
        torch.manual_seed(noise)
        unet = UNet2DConditionModel.from_pretrained(folders["epsilon"], subfolder="unet")
        state = torch.random.get_rng_state()
        lora(unet.requires_grad_(False), seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is left where it was
        found.append(torch.cat([p.flatten() for p in trained(unet).values()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_full_fine_tune_learns_everything_in_float32(unet: UNet2DConditionModel) -> None:
    make_trainable(unet, "full", rank=1, alpha=None, targets=(), seed=0, gradient_checkpointing=True)
    assert trained(unet).keys() == dict(unet.named_parameters()).keys()
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}
    assert unet.is_gradient_checkpointing


def test_what_leads_nowhere_is_not_trained(unet: UNet2DConditionModel) -> None:
    attention = "up_blocks.-1.attentions.-1.transformer_blocks.0.attn1"
    with pytest.raises(ConfigError, match=r"trainable.targets \['up_blocks.1.*to_q'\] match only layers whose results"):
        lora(
            unet,
            targets=("up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q",),
            idle=(f"{attention}.to_q", "no_block.0", f"{attention}.norm_q"),
        )


def test_targets_that_match_nothing_name_what_there_is(unet: UNet2DConditionModel) -> None:
    with pytest.raises(ConfigError, match=r"trainable.targets \['to_z'\] match no layer.*allowed: .*conv1"):
        lora(unet, targets=("to_z",))


def test_an_adapter_that_changes_nothing_is_not_written(
    unet: UNet2DConditionModel, folders: dict[str, Path], tmp_path: Path
) -> None:
    lora(unet)
    pipeline = StableDiffusionPipeline.from_pretrained(folders["epsilon"], unet=unet, safety_checker=None)
    with pytest.raises(CheckpointError, match="up-projections are all zero"):
        export(unet, "lora", pipeline, "unet", tmp_path / "weights")
    assert list(tmp_path.iterdir()) == []
    next(p for name, p in trained(unet).items() if "lora_B" in name).data[0, 0] = 0.1
    export(unet, "lora", pipeline, "unet", tmp_path / "weights")
    assert [path.name for path in (tmp_path / "weights").iterdir()] == [LORA]
    with safe_open(tmp_path / "weights" / LORA, "pt") as file:
        assert all(key.startswith("unet.") for key in file.keys())  # noqa: SIM118
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}  # noqa: SIM118


def test_kohyas_names_are_those_that_other_programs_look_for() -> None:
    """Layers of SD 1.5, and of SDXL, whose mid block has ten transformer blocks, as they stand in files of others."""
    names = {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
        ),
        "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0": (
            "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0"
        ),
        "mid_block.attentions.0.transformer_blocks.9.attn2.to_k": (
            "lora_unet_mid_block_attentions_0_transformer_blocks_9_attn2_to_k"
        ),
        "down_blocks.0.resnets.1.time_emb_proj": "lora_unet_down_blocks_0_resnets_1_time_emb_proj",
    }
    down, up = torch.ones(4, 8), torch.full((6, 4), 2.0)
    state = {f"unet.{name}.lora_{side}.weight": value for name in names for side, value in (("A", down), ("B", up))}
    found = kohya(state, 0.5)
    assert set(found) == {
        f"{name}.{part}" for name in names.values() for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    for name in names.values():
        assert torch.equal(found[f"{name}.lora_down.weight"], down)
        assert torch.equal(found[f"{name}.lora_up.weight"], up)
        assert found[f"{name}.alpha"] == 2.0  # rank 4 at half its strength
    with pytest.raises(CheckpointError, match="which has no name in kohya's format"):
        kohya({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": down}, 1.0)
