"""What of the denoiser learns: all of it, or low-rank adapters; and how either is written for others to load."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from flowalign.errors import CheckpointError, ConfigError
from flowalign.families.loading import LORA
from flowalign.files import atomic_folder
from flowalign.train.ranks import gathered


def make_trainable(
    policy: nn.Module,
    kind: str,
    *,
    rank: int,
    alpha: float | None,
    targets: Sequence[str],
    seed: int,
    gradient_checkpointing: bool,
    idle: Sequence[str] = (),
) -> None:
    """Turn on gradients for what learns: kind lora, full or none.

    LoRA weights are made in float32 whatever the base's dtype, from `seed`.

    AdamW steps of a usual learning rate round away in bfloat16, so what learns is always kept in float32.
    targets: ends of modules' names, or patterns of whole names such as up_blocks.*.to_q, where * stands for any part.
    idle: as of `Family`; nothing in these learns, and what LoRA puts there stays as it begins, which is nothing.
    Raises ConfigError where no module matches `targets`, or only idle ones.
    """
    if kind == "lora":
        alpha = rank if alpha is None else alpha
        adapted = _named(policy, targets)
        config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=adapted)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                policy.add_adapter(config)  # type: ignore[operator]
            except ValueError as error:
                raise _no_layer(policy, targets) from error
    elif kind == "full":
        policy.requires_grad_(True)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for name in idle:
        if (layer := _layer(policy, name)) is not None:
            layer.requires_grad_(False)
    if kind == "lora" and not trained(policy):
        raise ConfigError(
            f"trainable.targets {list(targets)} match only layers whose results the denoiser's output never reads; "
            "name others, or set trainable.targets=null."
        )
    if gradient_checkpointing:
        policy.enable_gradient_checkpointing()  # type: ignore[operator]


def _layer(policy: nn.Module, name: str) -> nn.Module | None:
    """The layer of a full name in which -1 is the last of a list; None where there is none."""
    found: Any = policy
    for part in name.split("."):
        found = found[-1] if part == "-1" else getattr(found, part, None)
        if found is None:
            return None
    return found


def _layers(policy: nn.Module) -> list[str]:
    return [name for name, module in policy.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def _named(policy: nn.Module, targets: Sequence[str]) -> list[str]:
    """`targets` with the layers that patterns stand for in their place. Raises ConfigError for a pattern of none."""
    found = []
    for target in targets:
        names = [name for name in _layers(policy) if fnmatchcase(name, target)] if "*" in target else [target]
        if not names:
            raise _no_layer(policy, [target])
        found += names
    return found


def _no_layer(policy: nn.Module, targets: Sequence[str]) -> ConfigError:
    names = _layers(policy)
    ends = sorted({name.rpartition(".")[2] for name in names})
    part = max(names, key=lambda name: name.count(".")).partition(".")[0]
    return ConfigError(
        f"trainable.targets {list(targets)} match no layer of the denoiser; allowed: layer names such as "
        f"{', '.join(ends[:8])}, and patterns such as {part}.*.{ends[-1]}."
    )


def trained(policy: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name, in the module's order."""
    return {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def distance(parameters: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """‖θ − θ₀‖ over all that learns; waits for the device, and every process must ask."""
    squares = [(tensor.detach() - start[name]).square().sum() for name, tensor in parameters.items()]
    return math.sqrt(gathered(sum(squares[1:], squares[0])).item())  # shards are added before they are gathered


@torch.no_grad()
def assemble(policy: nn.Module, plain: nn.Module | None) -> None:
    """Put weights that lie in shards together in `plain`, a module like `policy`, in the process that has one.

    Every process must call it.
    """
    target = {} if plain is None else plain.state_dict()
    for name, tensor in policy.state_dict().items():
        whole = gathered(tensor)
        if plain is not None:
            target[name].copy_(whole)


def export(
    policy: nn.Module,
    kind: str,
    pipeline: object,
    component: str,
    folder: Path,
    beside: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Write `weights/` for plain diffusers: a LoRA file for `load_lora_weights`, or a whole pipeline for `from_pretrained`.
    Of kind none there is only what lies beside.

    component: what the pipeline calls its denoiser, unet or transformer. beside: other safetensors files of the folder.

    Raises CheckpointError rather than write a file that would change nothing: a LoRA whose up-projections are all zero.
    """
    with atomic_folder(folder) as temporary:
        for name, data in beside.items():
            (temporary / name).write_bytes(data)
            _sort_metadata(temporary / name)
        if kind == "none":
            return
        if kind == "full":
            pipeline.save_pretrained(temporary)  # type: ignore[attr-defined]
            return
        state = get_peft_model_state_dict(policy)
        check_not_a_no_op(state)
        config = policy.peft_config["default"].to_dict()  # type: ignore[union-attr,operator,index]
        config["target_modules"] = sorted(config["target_modules"])  # a set, whose order changes from process to process
        type(pipeline).save_lora_weights(  # type: ignore[attr-defined]
            temporary, **{f"{component}_lora_layers": state, f"{component}_lora_adapter_metadata": config}
        )
        _sort_metadata(temporary / LORA)


def write_lora(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """A file as diffusers writes them: `state` with the component in its names, `metadata` likewise, as PEFT's settings."""
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(
        tensors, path, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(dict(metadata), indent=2, sort_keys=True)}
    )
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Give the header's metadata a fixed order: safetensors writes a random one, and equal weights shall be equal files."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


def check_not_a_no_op(state: dict[str, Tensor]) -> None:
    """Raise CheckpointError where every up-projection of a LoRA is zero, so that loading it would do nothing."""
    ups = [tensor for name, tensor in state.items() if "lora_B" in name]
    if not any(bool(tensor.any()) for tensor in ups):
        raise CheckpointError(
            f"the LoRA's {len(ups)} up-projections are all zero, so the file would change nothing; "
            "train at least one step with train.learning_rate above 0."
        )


def kohya(state: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """A LoRA for a U-Net from diffusers' names into those of kohya's scripts, which A1111 and ComfyUI read.

    Blocks keep the names they have in diffusers, as kohya's of SD 1.x do. His of SDXL have the original code's, and what reads
    files of SDXL knows both.

    state: `...lora_A.weight` `[r, in, ...]` and `...lora_B.weight` `[out, r, ...]`. scaling: alpha / r; kohya's files hold
    alpha beside each pair. Raises CheckpointError for a LoRA of something else than a U-Net.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        layer, _, side = rest.removesuffix(".weight").rpartition(".")
        if part != "unet" or side not in ("lora_A", "lora_B"):
            raise CheckpointError(
                f"the LoRA holds {name}, which has no name in kohya's format; only LoRAs of U-Nets have one; give others "
                f"as they are, weights/{LORA}."
            )
        place = f"lora_unet_{layer.replace('.', '_')}"
        out[f"{place}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"] = tensor
        if side == "lora_A":
            out[f"{place}.alpha"] = torch.tensor(scaling * len(tensor))
    return out
