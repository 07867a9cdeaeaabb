"""The verb that makes one run of several: soups of LoRAs or of whole models of one base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from flowalign import config as configuration
from flowalign.errors import CheckpointError, ConfigError, reason
from flowalign.families.loading import FAILURES, LORA, find_lora, open_family
from flowalign.files import atomic_folder, write_text
from flowalign.report.card import MADE, write_card
from flowalign.runs.folders import check_no_loop, fresh
from flowalign.settings import Config
from flowalign.train.merging import BACK, Factors, compressed, merge_factors, merge_weights, shares
from flowalign.train.rundir import RunDir
from flowalign.train.trainable import check_not_a_no_op, write_lora

MERGE = "merge.json"


def merge(
    runs: Sequence[str],
    *,
    out: Path,
    weights: Sequence[float] | None = None,
    how: str = "linear",
    back: float | None = None,
    rank: int | None = None,
) -> dict[str, Any]:
    """Write a run folder whose weights are the merge of the runs' changes to their one base, and `merge.json` beside.

    weights: one a run, see `train.merging.shares`. how: linear, slerp or warp. back: how far to go back to the base afterwards,
    from 0 to 1, for warp one half unless it is given. rank: of LoRAs, the most that the merge may have; if left out it is the
    sum of theirs, which is exact. Raises ConfigError and CheckpointError.
    """
    weights = shares(weights, len(runs), how)
    back = (BACK if how == "warp" else 0.0) if back is None else back
    if not 0 <= back <= 1:
        raise ConfigError(f"back is {back:g}; give 0, which stays, to 1, which is the base.")
    folder = RunDir(out)
    fresh(folder, resume=False, flag="--out", goes_on=False)
    settings = [_settings(run) for run in runs]
    bases = {_base(each) for each in settings}
    if len(bases) > 1:
        raise CheckpointError(
            f"the runs are of {len(bases)} bases, {', '.join(sorted(str(base[0]) for base in bases))}; merge runs of one base."
        )
    if any(each.users is not None for each in settings):
        raise CheckpointError(
            "one of the runs knows users, and what its attentions read of them cannot be merged; merge others."
        )
    if any(each.steer is not None for each in settings):
        raise CheckpointError(
            "one of the runs is steered by weights, and what tells it of them cannot be merged; merge runs that are not."
        )
    kinds = {each.trainable.kind for each in settings}
    if len(kinds) > 1:
        raise CheckpointError("some of the runs are LoRAs and others whole models; merge runs of one kind.")
    first = settings[0]
    about: dict[str, Any] = {"runs": list(runs), "weights": weights, "how": how, "back": back}
    if kinds == {"lora"}:
        size, lost, layers = _merge_loras(runs, folder.weights, weights, how, back, rank)
        about |= {"rank": size, "lost": lost, "coefficients": layers}
        trainable = first.trainable.model_copy(update={"rank": size, "alpha": None})
        said = f"a LoRA of rank {size}" + (f", {lost:.2g} of the change lost" if rank is not None else "")
    elif rank is not None:
        raise ConfigError(f"rank is {rank}, and the runs are whole models, which have none; leave it out.")
    else:
        about |= {"coefficients": _merge_models(first, runs, folder.weights, weights, how, back)}
        trainable, said = first.trainable, "a whole model"
    merged = first.model_copy(update={"trainable": trainable, "output": str(out)})
    write_text(folder.config, configuration.dump(merged))
    write_text(out / MERGE, json.dumps(about, indent=1) + "\n")
    if (made := Path(runs[0]).expanduser() / MADE).is_file():
        write_text(out / MADE, made.read_text(encoding="utf-8"))
    write_card(out)
    parts = " + ".join(f"{weight:g} {run}" for weight, run in zip(weights, runs, strict=True))
    return about | {
        "out": str(out),
        "summary": f"{out}: {said}, {how}: {parts}" + (f", {back:g} back to the base" if back else ""),
    }


def _settings(run: str) -> Config:
    path = Path(run).expanduser()
    check_no_loop(path)
    if not (path / "weights").is_dir() or not (path / "config.yaml").is_file():
        raise CheckpointError(f"{run} is not the folder of a finished run; give folders that flowalign align wrote.")
    return configuration.load(path / "config.yaml")


def _base(settings: Config) -> tuple[str, str | None, str | None]:
    path = Path(settings.model.checkpoint).expanduser()
    name = str(path.resolve()) if path.exists() else settings.model.checkpoint
    return name, settings.model.revision, settings.model.variant


def _merge_loras(
    runs: Sequence[str], out: Path, weights: Sequence[float], how: str, back: float, rank: int | None
) -> tuple[int, float, dict[str, list[float]]]:
    """Write the LoRA -> (its rank, share of the change that was lost, the coefficients of every layer)."""
    read = [_read(run) for run in runs]
    merged, layers = merge_factors([factors for factors, _ in read], weights, how, back)
    lost = 0.0
    if rank is not None and rank < len(next(iter(merged.values()))[0]):
        merged, lost = compressed(merged, rank)
    size = len(next(iter(merged.values()))[0])
    state = {
        f"{layer}.lora_{side}.weight": value for layer, both in merged.items() for side, value in zip("AB", both, strict=True)
    }
    check_not_a_no_op(state)
    component = next(iter(state)).partition(".")[0]
    metadata = {name: value for name, value in read[0][1].items() if name.startswith(f"{component}.")}
    targets = sorted(layer.removeprefix(f"{component}.") for layer in merged)
    metadata |= {f"{component}.r": size, f"{component}.lora_alpha": size, f"{component}.target_modules": targets}
    with atomic_folder(out) as temporary:
        write_lora(temporary / LORA, state, metadata)
    return size, lost, layers


def _read(run: str) -> tuple[Factors, dict[str, Any]]:
    """A run's LoRA as factors with its scale in B, and what its file says of itself. Raises CheckpointError."""
    found = find_lora(run)
    if found is None:
        raise CheckpointError(f"{run} holds no weights/{LORA}; finish the run first.")
    path = found.weights / LORA
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        layers = sorted({name.rpartition(".lora_")[0] for name in tensors})
        factors: Factors = {}
        for layer in layers:
            a, b = (tensors.pop(f"{layer}.lora_{side}.weight") for side in "AB")
            factors[layer] = (a, b * _scale(metadata, layer.partition(".")[0], len(a)))
        if tensors or not factors:
            raise ValueError(f"it holds {next(iter(tensors), 'no layer')}, which is no plain LoRA")
    except FAILURES as error:
        raise CheckpointError(f"{path} cannot be merged ({reason(error)}); give LoRAs that flowalign align wrote.") from error
    return factors, metadata


def _scale(metadata: dict[str, Any], component: str, rank: int) -> float:
    odd = [name for name in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora") if metadata.get(f"{component}.{name}")]
    if odd:
        raise ValueError(f"it uses {odd[0]}")
    return float(metadata.get(f"{component}.lora_alpha", rank)) / rank


def _merge_models(
    settings: Config, runs: Sequence[str], out: Path, weights: Sequence[float], how: str, back: float
) -> dict[str, list[float]]:
    """Write the whole pipeline; all models are held at once, in float32."""
    model = settings.model
    base = open_family(model.checkpoint, dtype=torch.float32, revision=model.revision, variant=model.variant)
    others = [open_family(run, dtype=torch.float32).denoiser.state_dict() for run in runs]
    merged, used = merge_weights(base.denoiser.state_dict(), others, weights, how, back)
    base.denoiser.load_state_dict(merged)
    with atomic_folder(out) as temporary:
        base.pipeline(base.denoiser).save_pretrained(temporary)
    return used
