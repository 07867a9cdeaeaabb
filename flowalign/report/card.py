"""`write_card`: the model card of a run's weights, as the Hugging Face hub reads it, with a picture of what changed."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw, ImageFont

from flowalign import plugins
from flowalign.config import load
from flowalign.errors import CheckpointError
from flowalign.evaluate.compare import Generated
from flowalign.families.loading import INDEX, family_of
from flowalign.files import atomic, write_text
from flowalign.report.page import read_lines, read_mapping
from flowalign.report.pictures import Samples, read_samples
from flowalign.settings import Config

ACROSS, ROWS = 8, 2  # prompts side by side in the picture, and how many such rows of before and after
CELL = (128, 256)  # pixels: smaller pictures are doubled until they reach the first, larger ones are shrunk to the second
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MADE = "model.json"
"""What a run's weights go into: the class of the pipeline, and which of its parts the checkpoint leaves out."""
MEASURED = {
    "eval/rewards/accuracies": "pairs ranked right",
    "eval/rewards/margins": "reward margin βΔ",
    "eval/error/chosen": "error of chosen, policy − reference",
    "eval/error/rejected": "error of rejected, policy − reference",
    "eval/loss": "loss",
}


def write_card(run: str | Path) -> Path:
    """Write `weights/README.md` and, where the run drew samples, `weights/samples.png`; returns the card's path.

    Read are config.yaml, model.json, data.json, environment.json, metrics.jsonl, samples/ and evaluation/evaluation.json; only
    the first must be there. Raises ConfigError or CheckpointError for one that is missing or cannot be read, and
    CheckpointError for a run without weights.
    """
    run = Path(run)
    weights = run / "weights"
    if not weights.is_dir():
        raise CheckpointError(f"{run} has no weights to describe; finish the run with flowalign align {run} --resume.")
    config = load(run / "config.yaml")
    samples = read_samples(run)
    environment = read_mapping(run / "environment.json")
    merged = read_mapping(run / "merge.json")
    parts = [
        _front(config),
        _opening(run, config, environment) if not merged else _merged(run, config, merged),
        _pictures(samples, weights / "samples.png"),
        _usage(run, config, weights),
        "" if merged else _training(config, environment),
        _data(read_mapping(run / "data.json")),
        _measured(list(read_lines(run / "metrics.jsonl"))),
        _judged(read_mapping(run / "evaluation" / "evaluation.json")),
        "## Licence\n\nThese weights derive from the base model: its licence and terms of use apply to them.",
    ]
    path = weights / "README.md"
    write_text(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def contact_sheet(samples: Samples, *, side: int) -> Image.Image:
    """Steps as rows, prompts as columns; after ACROSS prompts the next ones follow below. `side`: pixels of a picture."""
    gap, label = side // 16, 18
    count = min(len(samples[0][1]), ACROSS * ROWS)
    across = min(count, ACROSS)
    blocks = -(-count // across)
    tall = len(samples) * (side + gap + label) + 2 * gap
    out = Image.new("RGB", (across * (side + gap) + gap, blocks * tall), "white")
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(14)
    for row, (step, pictures) in enumerate(samples):
        for place, picture in enumerate(pictures[:count]):
            block, column = divmod(place, across)
            top = block * tall + gap + row * (side + gap + label)
            if column == 0:
                words = f"before, step {step}" if row == 0 else f"after, step {step}"
                draw.text((gap, top), words, fill=(90, 98, 106), font=font)
            out.paste(_cell(picture, side), (gap + column * (side + gap), top + label))
    return out


def _cell(picture: Generated, side: int) -> Image.Image:
    with Image.open(picture.path) as source:
        image = source.convert("RGB")
    small = max(image.size) < side
    scale = side // max(image.size) if small else side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (side, side), "white")
    cell.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return cell


WHAT = {"lora": "A LoRA for", "full": "All weights of", "none": "Embeddings of users for"}


def _front(config: Config) -> str:
    """YAML front matter. A base that is only on this disk has no name on the hub, and the hub refuses any other."""
    base = config.model.checkpoint
    front: dict[str, Any] = {}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists():
        relation = "finetune" if config.trainable.kind == "full" else "adapter"
        front = {"base_model": base, "base_model_relation": relation}
    tags = ["flowalign", "preference-alignment", config.objective.name]
    front |= {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    front["tags"] = [*tags, "lora"] if config.trainable.kind == "lora" else tags
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---"


def _opening(run: Path, config: Config, environment: Mapping[str, Any]) -> str:
    what = WHAT[config.trainable.kind]
    version = environment.get("packages", {}).get("flowalign")
    tool = f"flowalign {version}" if version and version[0].isdigit() else "flowalign"
    return (
        f"# {run.resolve().name}\n\n{what} {literal(config.model.checkpoint)}, aligned on preference pairs with the objective "
        f"{literal(config.objective.name)} by {tool}."
    )


def _merged(run: Path, config: Config, merged: Mapping[str, Any]) -> str:
    """Of weights that were made from those of other runs, so that nothing is said of a training that was not."""
    what = "A LoRA for" if config.trainable.kind == "lora" else "All weights of"
    rows = zip(map(literal, merged["runs"]), merged["weights"], strict=True)
    back = f", then {merged['back']:g} of the way back to it" if merged["back"] else ""
    return (
        f"# {run.resolve().name}\n\n{what} {literal(config.model.checkpoint)}, merged from what several runs changed "
        f"({merged['how']}{back}).\n\n{_table(('run', 'weight'), rows)}"
    )


def _pictures(samples: Samples, path: Path) -> str:
    if len(samples) < 2:
        return ""
    ends = [samples[0], samples[-1]]
    largest = max(max(picture.settings["width"], picture.settings["height"]) for picture in ends[0][1])
    with atomic(path) as temporary:
        contact_sheet(ends, side=min(max(largest, CELL[0]), CELL[1])).save(temporary, format="PNG", optimize=True)
    shown = ends[0][1][: ACROSS * ROWS]
    made = shown[0].settings
    prompts = "\n".join(f"{place}. {literal(picture.prompt)}" for place, picture in enumerate(shown, 1))
    return (
        f"![the same prompts and seeds before and after]({path.name})\n\nUpper row the base, lower row these weights: the same "
        f"prompts and seeds, {made['steps']} steps, guidance {made['guidance']:g}, not picked. From left to right:\n\n{prompts}"
    )


def _usage(run: Path, config: Config, weights: Path) -> str:
    """Python that draws a picture; nothing where it is not known what opens the file that holds the base."""
    model, sample, made = config.model, config.sample, read_mapping(run / MADE)
    kind = made.get("pipeline") or read_mapping(weights / INDEX).get("_class_name")
    call = {"guidance_scale": sample.guidance}
    if kind is not None:
        call = plugins.load("families", family_of(kind)).call(sample.guidance, 1)
    absent = dict.fromkeys(made.get("absent", ()))
    folder = f"{json.dumps(weights.as_posix())}  # this folder, or its name on the hub"
    imports, opener = ["import torch"], "DiffusionPipeline"
    dtype = f", dtype=torch.{DTYPES[config.train.precision]}"  # text encoders would come in the dtype of their files
    if config.trainable.kind == "full":
        lines = [f"folder = {folder}", f"pipe = {opener}.from_pretrained(folder{_arguments(absent)}{dtype})"]
    elif model.checkpoint.endswith(".safetensors"):
        if kind is None:
            return ""
        opener, file = kind, Path(model.checkpoint)
        beside = [each for each in (file.with_suffix(""), file.parent) if (each / INDEX).is_file()]
        settings = {"config": beside[0].as_posix()} if beside else {}
        lines = [f"pipe = {opener}.from_single_file({json.dumps(model.checkpoint)}{_arguments(settings | absent)}{dtype})"]
    else:
        named = {name: value for name, value in (("revision", model.revision), ("variant", model.variant)) if value}
        lines = [f"pipe = {opener}.from_pretrained({json.dumps(model.checkpoint)}{_arguments(named | absent)}{dtype})"]
    if config.trainable.kind != "full":
        lines.append(f"folder = {folder}")
    if config.steer is not None:  # both load the LoRA as well
        imports.insert(0, "import flowalign")
        lines.append(f"flowalign.steered(pipe, folder, {json.dumps(dict.fromkeys(config.steer.objectives, 1))})")
    elif config.users is not None:
        imports.insert(0, "import flowalign")
        lines.append('flowalign.personal(pipe, folder, "the name of a user")')
    elif config.trainable.kind == "lora":
        lines.append("pipe.load_lora_weights(folder)")
    imports.append(f"from diffusers import {opener}")
    lines.append(f'image = pipe("a prompt", num_inference_steps={sample.steps}{_arguments(call)}).images[0]')
    return "\n".join(["## Use", "", "```python", *imports, "", *lines, "```"])


def _arguments(given: Mapping[str, Any]) -> str:
    """As they follow others in a call."""
    shown = {name: "None" if value is None else json.dumps(value) for name, value in given.items()}
    return "".join(f", {name}={value.removesuffix('.0')}" for name, value in shown.items())


def _training(config: Config, environment: Mapping[str, Any]) -> str:
    train, trainable = config.train, config.trainable
    knobs = _knobs(config)
    rows: dict[str, Any] = {"objective": literal(config.objective.name), **{f"`{name}`": knobs[name] for name in knobs}}
    if trainable.kind == "lora":
        alpha = trainable.rank if trainable.alpha is None else trainable.alpha
        rows |= {"trained": f"LoRA, rank {trainable.rank}, alpha {alpha:g}"}
    elif trainable.kind == "full":
        rows |= {"trained": "all weights of the denoiser"}
    warmup = f"{train.warmup_steps} steps of warm-up, then " if train.warmup_steps else ""
    rows |= {
        "optimizer steps": train.steps,
        "pairs a step": f"{train.batch_size * train.accumulation} per process",
        "learning rate": f"{train.learning_rate:g}, {warmup}{train.schedule}",
        "optimizer": f"{train.optimizer}, weight decay {train.weight_decay:g}",
        "average of weights": "none" if train.ema is None else f"decay {train.ema:g}",
        "caption dropout": train.caption_dropout,
        "precision": f"{train.precision}; trained weights fp32",
        "seed": train.seed,
        "device": environment.get("device"),
    }
    beta = knobs.get("beta")
    note = ""
    if config.objective.name in ("dpo", "hinge") and isinstance(beta, float | int):
        note = (
            "\n\nβ counts mean squared errors: with Δ = ½(e_ref − e) of the chosen picture minus the same of the rejected "
            f"one, β = {beta:g} is as strong as `beta_dpo` {beta:g} in Diffusion-DPO's code and {beta / 2:g} in diffusers' "
            "Stable Diffusion 1.5 script."
        )
    return f"## Training\n\n{_table(('setting', 'value'), rows.items())}{note}"


def _knobs(config: Config) -> dict[str, Any]:
    """The objective's knobs, defaults included, as they were used."""
    parameters = inspect.signature(plugins.load("objectives", config.objective.name)).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return defaults | config.objective.knobs


def _data(data: Mapping[str, Any]) -> str:
    rows = []
    for side in ("train", "held_out"):
        found = data.get(side) or {}
        if found:
            source = (data.get("sources") or {}).get("train" if side == "train" else "validation")
            counts = [found.get(key) for key in ("comparisons", "prompts", "pictures", "ties")]
            rows.append((side.replace("_", " "), *counts, literal(source) if source else None))
    if not rows:
        return ""
    bad = data.get("bad_rows", 0)
    words = f"\n\nPictures were cut to {data['resolution']} px squares." if "resolution" in data else ""
    words += f" {bad:,} rows could not be used." if bad else ""
    seen, all_rows = ((data.get(key) or {}).get(name) for key, name in (("prepared", "train"), ("train", "comparisons")))
    if seen is not None and all_rows is not None and seen < all_rows:
        words += f" Of {seen:,} training comparisons pictures were read: those that the run saw."
    return f"## Data\n\n{_table(('', 'comparisons', 'prompts', 'pictures', 'ties', 'source'), rows)}{words}"


def _measured(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Held-out metrics before and after."""
    lines = [line for line in metrics if any(key in line for key in MEASURED)]
    if not lines:
        return ""
    first, last = lines[0], lines[-1]
    rows = [(name, first.get(key), last.get(key)) for key, name in MEASURED.items() if key in last]
    table = _table(("held-out comparisons", f"step {first['step']}", f"step {last['step']}"), rows)
    return (
        f"## Measured\n\n{table}\n\nAt fixed timesteps and noise. An error of chosen above 0 says that these weights denoise "
        "the preferred pictures worse than the base does."
    )


def _judged(evaluation: Mapping[str, Any]) -> str:
    judges = evaluation.get("judges")
    if not judges:
        return ""
    rows = []
    for name, judge in judges.items():
        rate = judge["win_rate"]
        interval = f"{100 * rate['value']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"
        rows.append((literal(name), interval, judge["base"]["mean"], judge["aligned"]["mean"]))
    level = 100 * evaluation["interval"]["level"]
    table = _table(("judge", f"win rate over the base [{level:g} % interval]", "base mean", "aligned mean"), rows)
    return f"## Judged\n\n{evaluation['pairs']} pairs of pictures from {evaluation['prompts']} prompts, same seeds.\n\n{table}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([_shown(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, float | int):
        return str(value).replace("|", "\\|")
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def literal(text: str) -> str:
    """Any text as one line of Markdown code, so that nothing in it is markup."""
    line = " ".join(str(text).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if "`" in line else ""
    return f"{fence}{pad}{line}{pad}{fence}"
