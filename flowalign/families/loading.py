"""Checkpoints: finding them, loading parts of them, fingerprinting them, and opening them for generation.

A checkpoint is a diffusers folder, a single `.safetensors` file in the original layout, a hub id, or one of our own run
folders. Whatever it is, `locate` gives it a local folder with `model_index.json`, from which everything else is read.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from flowalign import plugins
from flowalign.errors import CheckpointError, reason

INDEX = "model_index.json"
LORA = "pytorch_lora_weights.safetensors"
USERS = "users.safetensors"
"""What a run with a section users saves beside its LoRA, or instead of one."""
FAILURES = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError)  # what loaders raise


@dataclass(frozen=True)
class Located:
    """A checkpoint on this disk."""

    name: str
    """As the user wrote it."""
    folder: Path
    """Diffusers folder; for a single file, the folder that holds its configuration."""
    file: Path | None = None
    """The single file with the weights, if that is what it is."""
    variant: str | None = None

    @property
    def pipeline_class(self) -> str:
        """Name of the diffusers pipeline. Raises CheckpointError."""
        return str(self.settings(INDEX).get("_class_name"))

    def settings(self, file: str) -> dict[str, Any]:
        """One of the folder's JSON files. Raises CheckpointError."""
        try:
            return dict(json.loads((self.folder / file).read_text(encoding="utf-8")))
        except FAILURES as error:
            raise CheckpointError(
                f"{self.folder / file} cannot be read ({reason(error)}); save the whole pipeline again with save_pretrained."
            ) from error


def locate(checkpoint: str | Path, *, revision: str | None = None, variant: str | None = None, weights: bool = True) -> Located:
    """Find a checkpoint, downloading it if it is a hub id that is not in the cache; without `weights` its settings only.

    Raises CheckpointError.
    """
    name, path = str(checkpoint), Path(checkpoint).expanduser()
    if path.is_dir():
        for folder in (path, path / "weights"):
            if (folder / INDEX).is_file():
                return Located(name, folder, variant=variant)
        if any((path / "weights" / each).is_file() for each in (LORA, USERS)):
            raise CheckpointError(
                f"{name} is a LoRA run, not a whole model; name the checkpoint that its config.yaml names instead."
            )
        raise CheckpointError(f"{name} has no {INDEX}; give a folder that a diffusers pipeline wrote with save_pretrained.")
    if path.is_file():
        return Located(name, _configuration(path), file=path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(
            f"{name} does not exist; give a diffusers folder, a .safetensors file or a hub id such as owner/name."
        )
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download

    skipped = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))  # never used: not downloaded
    try:
        if weights:
            folder = DiffusionPipeline.download(name, revision=revision, variant=variant, use_safetensors=True, **skipped)
        else:
            folder = snapshot_download(name, revision=revision, allow_patterns=[INDEX, "*/*config.json"])
    except FAILURES as error:
        raise CheckpointError(
            f"{name} is no file or folder here and could not be fetched as a hub id ({reason(error)}); "
            "check the spelling, or download it once while online."
        ) from error
    return Located(name, Path(folder), variant=variant)


def _configuration(file: Path) -> Path:
    """The diffusers folder that describes a single file: named like it, or around it, or the hub's for its kind."""
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file} is not a .safetensors file, and nothing else is read; convert it to safetensors first.")
    try:
        with safe_open(file, "pt") as weights:
            names = weights.keys()
            shapes = {key: weights.get_slice(key).get_shape() for key in names}
    except FAILURES as error:
        raise CheckpointError(f"{file} cannot be read ({reason(error)}); copy or download it again.") from error
    if not any(key.startswith(("model.diffusion_model.", "first_stage_model.")) for key in shapes):
        raise CheckpointError(
            f"{file} holds no whole model in the original layout; give the file or folder of the full checkpoint."
        )
    for folder in (file.with_suffix(""), file.parent):
        if (folder / INDEX).is_file():
            return folder
    from diffusers.loaders.single_file_utils import fetch_diffusers_config
    from huggingface_hub import snapshot_download

    try:
        kinds = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}  # it looks at names and shapes
        source = fetch_diffusers_config(kinds)["pretrained_model_name_or_path"]
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.txt", "*/*.json", "*/*.txt"]))
    except FAILURES as error:
        raise CheckpointError(
            f"{file} has no configuration and none could be fetched ({reason(error)}); put the {INDEX}, scheduler, tokenizer, "
            f"text_encoder, unet and vae configuration of its kind into the folder {file.with_suffix('')}."
        ) from error


def load_parts(located: Located, pipeline_class: type, parts: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
    """Load only the named parts of a pipeline ("unet", "vae", "scheduler", …), on the CPU. Raises CheckpointError."""
    others = {name: None for name, value in located.settings(INDEX).items() if isinstance(value, list) and name not in parts}
    has_checker = "requires_safety_checker" in inspect.signature(pipeline_class.__init__).parameters
    unchecked = {"requires_safety_checker": False} if has_checker else {}
    diffusers_logging.disable_progress_bar()  # a bar for each part of a pipeline says nothing beside our own
    transformers_logging.disable_progress_bar()
    try:
        if located.file is None:
            pipeline = pipeline_class.from_pretrained(
                located.folder,
                dtype=dtype,
                variant=located.variant,
                use_safetensors=True,
                local_files_only=True,
                **unchecked,
                **others,
            )
        else:
            pipeline = pipeline_class.from_single_file(
                str(located.file), config=str(located.folder), dtype=dtype, **unchecked, **others
            )
    except FAILURES as error:
        raise CheckpointError(
            f"{located.name} cannot be loaded as {pipeline_class.__name__} ({reason(error)}); "
            "it needs all parts of the pipeline, with weights as .safetensors."
        ) from error
    loaded = {name: getattr(pipeline, name, None) for name in parts}
    missing = [name for name, part in loaded.items() if part is None]
    if missing:
        raise CheckpointError(f"{located.name} lacks {', '.join(missing)}; save the whole pipeline with save_pretrained.")
    return loaded


def digest(*parts: Any) -> str:
    """blake2b of modules (settings and weights), tokenizers (rules and vocabulary) and JSON values; 32 hex digits.

    It depends on dtypes, and neither on where a checkpoint lies nor on which library version wrote it.
    """
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, nn.Module):
            state.update(_settings(part.config))
            for name, tensor in sorted(part.state_dict().items()):
                state.update(f"\x1f{name} {tensor.dtype} {tuple(tensor.shape)}\x1f".encode())
                state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            for name, module in part.named_modules():  # LoRA: how strongly each adapter is applied is no weight
                if isinstance(getattr(module, "scaling", None), dict):
                    state.update(f"\x1f{name} {module.scaling} {module.disable_adapters}".encode())
        elif hasattr(part, "backend_tokenizer"):
            rules = json.loads(part.backend_tokenizer.to_str())
            rules["padding"] = rules["truncation"] = part.model_max_length  # the others are left over from the last call
            state.update(_settings(rules))
        else:
            state.update(_settings(part))
    return state.hexdigest()


def _settings(config: Any) -> bytes:
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if isinstance(values, dict):
        passing = ("dtype", "torch_dtype", "transformers_version", "architectures")  # as are the private ones: paths, versions
        values = {name: value for name, value in values.items() if name not in passing and not name.startswith("_")}
    return json.dumps(values, sort_keys=True, default=str).encode()


def detect_family(
    checkpoint: str | Path, *, revision: str | None = None, variant: str | None = None, weights: bool = True
) -> str:
    """Name of the family whose `pipeline_classes` include the checkpoint's. Raises CheckpointError."""
    found = locate(checkpoint, revision=revision, variant=variant, weights=weights)
    return family_of(found.pipeline_class, str(checkpoint))


def family_of(pipeline_class: str, checkpoint: str = "the pipeline") -> str:
    """Name of the family that a diffusers pipeline class belongs to. Raises CheckpointError."""
    supported: list[str] = []
    for name in plugins.names("families"):
        classes = plugins.load("families", name).pipeline_classes
        if pipeline_class in classes:
            return name
        supported.extend(classes)
    raise CheckpointError(
        f"{checkpoint} is a {pipeline_class}, which is not supported; use a checkpoint of {', '.join(sorted(supported))}."
    )


@dataclass(frozen=True)
class LoraRun:
    """A run folder of ours whose weights are a LoRA, embeddings of users or both, and what it was trained on."""

    weights: Path
    """Folder of their files."""
    base: str
    revision: str | None
    variant: str | None


def find_lora(checkpoint: str | Path) -> LoraRun | None:
    """The LoRA run that a checkpoint names, None for whole models. Raises CheckpointError where its base is not known."""
    weights = Path(checkpoint).expanduser() / "weights"
    if not any((weights / name).is_file() for name in (LORA, USERS)) or (weights / INDEX).is_file():
        return None
    try:
        model = yaml.safe_load((weights.parent / "config.yaml").read_text(encoding="utf-8"))["model"]
        return LoraRun(weights, model["checkpoint"], model.get("revision"), model.get("variant"))
    except (*FAILURES, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{checkpoint} has a LoRA, but its config.yaml names no base checkpoint ({reason(error)}); "
            "restore config.yaml with model.checkpoint."
        ) from error


def add_lora(denoiser: Any, run: LoraRun, component: str) -> str | None:
    """Load the run's adapter, where it has one, into a denoiser of its base, in place, as the only one that is applied.

    Returns its name, None where the run has none. Raises CheckpointError.
    """
    if not (run.weights / LORA).is_file():
        return None
    before = set(getattr(denoiser, "peft_config", None) or ())
    # Beside others diffusers numbers names by how many there are, which may be one of theirs.
    own = next(name for name in (f"flowalign_{place}" for place in count()) if name not in before) if before else None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")  # an outline holds no values
            denoiser.load_lora_adapter(run.weights, prefix=component, weight_name=LORA, adapter_name=own)
        added: list[str] = [name for name in getattr(denoiser, "peft_config", None) or () if name not in before]
        if not added:  # diffusers only warns
            raise ValueError(f"it holds nothing for a {component}")
    except FAILURES as error:
        raise CheckpointError(
            f"{run.weights / LORA} does not fit {run.base} ({reason(error)}); use the base it was trained on."
        ) from error
    return added[0]


def open_family(
    checkpoint: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    variant: str | None = None,
) -> Any:
    """The family of any checkpoint or of a run folder of ours (its LoRA applied), its denoiser on `device`.

    Raises CheckpointError.
    """
    run = find_lora(checkpoint)
    base = checkpoint
    if run is not None:
        base, revision, variant = run.base, run.revision, run.variant
    name = detect_family(base, revision=revision, variant=variant)
    family = plugins.load("families", name).load(base, dtype=dtype, revision=revision, variant=variant)
    family.denoiser.to(device)
    if run is not None:
        add_lora(family.denoiser, run, family.component)
    return family


def open_checkpoint(
    checkpoint: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    variant: str | None = None,
) -> Any:
    """A diffusers pipeline ready to generate, from whatever `open_family` opens. Raises CheckpointError."""
    family = open_family(checkpoint, dtype=dtype, device=device, revision=revision, variant=variant)
    return family.pipeline(family.denoiser)
