"""Verbs of preference flows: fit one, apply it, compare before with after."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from flowalign import config as configuration
from flowalign.data.images import decode, fit
from flowalign.device import choose_device, open_accelerator
from flowalign.errors import DataError
from flowalign.evaluate.compare import SAMPLER_KEYS, evaluate_folders, read_generation
from flowalign.evaluate.identity import nearest_is_own
from flowalign.evaluate.judges import ImageTower, load_judges, to_pixels
from flowalign.files import atomic, atomic_folder, check_folder, write_text
from flowalign.flow.apply import apply_folder
from flowalign.flow.folders import TABLE, list_pictures
from flowalign.flow.improve import Chain, Flow, load_flow
from flowalign.flow.settings import FlowConfig
from flowalign.report.flow_card import write_flow_card
from flowalign.report.page import write_report
from flowalign.runs.flow_fit import last_metrics, train_field
from flowalign.runs.flow_parts import FlowParts, prepare_flow
from flowalign.runs.folders import fresh, judges_of, stopped
from flowalign.train.ranks import peers
from flowalign.train.rundir import RunDir

SHOWN = 8
"""Held-out pictures that a run shows before and after."""
TOWER_SIDE = 128
"""Pixels at which the image tower looks at pictures for their identity."""


def fit_flow(config: FlowConfig, *, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Fit a flow as `config` says; the run folder `config.output` holds the result.

    With `resume` a run that was stopped or killed goes on from its last saved state, and ends as if it never had been.
    Raises ConfigError where the folder is in use and `resume` is not set, or it has more steps than `config` says.
    """
    started, run = time.perf_counter(), RunDir(Path(config.output))
    fresh(run, resume, config.train.steps)
    accelerator = open_accelerator(config.train, run.path)
    finished, seconds, parts = False, 0.0, None
    try:
        with peers(accelerator.num_processes):
            parts = prepare_flow(config, accelerator, progress=progress)
            summary = parts.summary

            def begin() -> None:
                write_text(run.config, configuration.dump(config))
                run.write_environment(accelerator.device)
                run.write_json("data.json", summary)

            finished, seconds = train_field(
                accelerator,
                parts.field,
                parts.material,
                config.train,
                config.match,
                run,
                context_dropout=config.context.dropout if config.context.kind != "none" else 0.0,
                begin=begin,
                progress=progress,
            )
    except KeyboardInterrupt:
        finished = False
    result = {"run": str(run.path), "finished": finished, "seconds": time.perf_counter() - started}
    if not accelerator.is_main_process:
        return result | {"summary": None}
    if not finished or parts is None:
        return result | {"summary": stopped(run, "flow fit")}
    flow = parts.flow(accelerator.device, parts.domain())
    with atomic_folder(run.weights) as temporary:
        flow.save(temporary)
    last = last_metrics(run)
    _show(flow, parts, run, config)
    write_flow_card(run.path, config.model_dump(mode="json"), last, len(parts.train))
    page = write_report(run.path)
    error, power = (last.get(f"eval/flow/{name}", last.get(f"train/flow/{name}")) for name in ("error", "power"))
    return result | {
        "steps": config.train.steps,
        "seconds_training": seconds,
        "comparisons": len(parts.train),
        "pairs_per_second": last.get("train/pairs_per_second"),
        "metrics": last,
        "report": str(page),
        "summary": f"fitted on {len(parts.train)} comparisons in {seconds:.0f} s: mean square error {error:.4g} of velocities "
        f"of {power:.4g}; weights in {run.weights}, report in {page}",
    }


def _show(flow: Flow, parts: FlowParts, run: RunDir, config: FlowConfig) -> None:
    """Rejected pictures before and after, as samples of the first and the last step."""
    source = parts.held_out or parts.train
    places = source.cached.indices[:SHOWN]
    comparisons = [parts.held_out_source[int(place)] for place in places]
    pictures = [
        Image.fromarray(fit(decode(each.images[-1].read()), flow.resolution).transpose(1, 2, 0)) for each in comparisons
    ]
    prompts = [each.prompt for each in comparisons]
    after = flow.apply(pictures, prompts if flow.reads_prompts else None).pictures
    for step, shown in ((0, pictures), (config.train.steps, after)):
        write_pictures(run.samples / f"step-{step:08d}", shown, prompts, range(len(shown)), [{}] * len(shown), "flow")


def write_pictures(
    folder: Path,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    seeds: Sequence[int],
    rows: Sequence[Mapping[str, Any]],
    generator: str,
) -> None:
    """Pictures with a table that `read_generation` reads; what a row does not say of how they were drawn is filled in."""
    lines = []
    for place, (picture, prompt, seed, row) in enumerate(zip(pictures, prompts, seeds, rows, strict=True)):
        name = f"{place:05d}-{seed}.png"
        with atomic(folder / name) as temporary:
            picture.save(temporary, format="PNG")
        lines.append(table_line(name, picture, prompt, seed, row, generator))
    write_text(folder / TABLE, "".join(lines))


def table_line(name: str, picture: Image.Image, prompt: str, seed: int, row: Mapping[str, Any], generator: str) -> str:
    """What a table that `read_generation` reads says of one picture; `row`: what is known of how it was drawn."""
    plain = {"sampler": "given", "steps": 0, "guidance": 0.0, "height": picture.height, "width": picture.width}
    drawn = {key: row.get(key, plain[key]) for key in SAMPLER_KEYS}
    entry = {"file_name": name, "prompt": prompt, "seed": seed, **drawn, "generator": str(row.get("generator", generator))}
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _told_how(flow: Flow | Chain, options: Mapping[str, Any]) -> Flow | Chain:
    """The flow, applied by these options where they are not None. Raises ConfigError for a value out of range."""
    return flow.with_solve({name: value for name, value in options.items() if value is not None})


def apply_flow(
    run: str,
    source: Path,
    *,
    out: Path,
    solver: str | None = None,
    steps: int | None = None,
    strength: float | None = None,
    iterations: int | None = None,
    guidance: float | None = None,
    batch_size: int | None = None,
    prompt: str | None = None,
    diagnose: bool = False,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Apply a flow to a folder of pictures; what is None is as the run's configuration says.

    `out` gets the pictures and a `metadata.jsonl` that says of each how far it was moved. What is there already is left alone.
    """
    check_folder(out)
    flow = load_flow(run, device=choose_device(device))
    options = {
        "solver": solver,
        "steps": steps,
        "strength": strength,
        "iterations": iterations,
        "guidance": guidance,
        "batch_size": batch_size,
    }
    return apply_opened(_told_how(flow, options), source, out=out, prompt=prompt, diagnose=diagnose, progress=progress)


def apply_opened(
    flow: Flow | Chain,
    source: Path,
    *,
    out: Path,
    prompt: str | None = None,
    diagnose: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """`apply_flow` of one that is loaded and told how."""
    started = time.perf_counter()
    rows = apply_folder(flow, source, out, prompt=prompt, diagnose=diagnose, progress=progress)
    return _told(out, rows, time.perf_counter() - started)


def _told(out: Path, rows: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """What was applied, in numbers and words."""
    less = [row for row in rows if "note" in row["flow"]]
    strengths = [row["flow"]["strength"] for row in rows]
    errors = [row["flow"]["error"] for row in rows if "error" in row["flow"]]
    lines = [f"{len(rows)} pictures in {out}, moved with strength {np.mean(strengths):.2f} in the mean"]
    if less:
        lines.append(f"{len(less)} of them moved less: {less[0]['file_name']} is {less[0]['flow']['note']}")
    if errors:
        lines.append(
            f"error of the steps, there and back: {np.mean(errors):.2%} of the way in the mean, at most {max(errors):.2%}"
        )
    return {
        "out": str(out),
        "pictures": len(rows),
        "seconds": seconds,
        "strength": float(np.mean(strengths)),
        "moved_less": len(less),
        "evaluations": max(row["flow"]["evaluations"] for row in rows),
        "error": float(np.mean(errors)) if errors else None,
        "summary": "\n".join(lines),
    }


def evaluate_flow(
    run: str,
    source: Path,
    *,
    judges: Path | None = None,
    out: Path = Path("runs/flow-evaluate"),
    strength: float | None = None,
    steps: int | None = None,
    iterations: int | None = None,
    guidance: float | None = None,
    solver: str | None = None,
    prompt: str | None = None,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Compare pictures before and after a flow: win rates by the judges, and whether each is still itself.

    `out` gets both, `evaluation.json` and `report.html`. `judges` may be left out where the run's configuration names them.
    Raises ConfigError where no judges are known.
    """
    check_folder(out)
    place = choose_device(device)
    chosen = load_judges(judges or judges_of(run, FlowConfig), place)
    options = {"strength": strength, "steps": steps, "iterations": iterations, "guidance": guidance, "solver": solver}
    flow = _told_how(load_flow(run, device=place), options)
    folders = {side: out / "evaluation" / side for side in ("base", "aligned")}
    listed = list_pictures(source)
    prompts = [picture.prompt or prompt for picture in listed]
    if None in prompts:
        path = listed[prompts.index(None)].path
        raise DataError(f"nothing says what {path} shows, which judges ask; add a {TABLE} with prompts, or give --prompt.")
    seeds = [int(picture.row.get("seed", number)) for number, picture in enumerate(listed)]
    rows = [picture.row for picture in listed]
    write_pictures(folders["base"], [each.read() for each in listed], [str(each) for each in prompts], seeds, rows, "given")
    started = time.perf_counter()
    applied = apply_folder(flow, folders["base"], folders["aligned"], progress=progress)
    seconds = time.perf_counter() - started
    result = evaluate_folders(folders["base"], folders["aligned"], chosen, progress=progress)
    own, drift = _identity([read_generation(folder) for folder in folders.values()], place)
    told = _told(folders["aligned"], applied, seconds)
    result["flow"] = {
        "identity": float(own.mean()),
        "drift": float(drift.mean()),
        "strength": told["strength"],
        "moved_less": told["moved_less"],
        "evaluations": told["evaluations"],
        "seconds_per_picture": seconds / len(applied),
        "solve": [solve.model_dump(mode="json") for solve in flow.solves],
    }
    write_text(out / "evaluation" / "evaluation.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    page = str(write_report(out))
    lines = [
        f"{name}: after the flow wins {found['win_rate']['value']:.1%} [{found['win_rate']['low']:.1%}, "
        f"{found['win_rate']['high']:.1%}], mean {found['base']['mean']:.3f} -> {found['aligned']['mean']:.3f}"
        + (f", share {found['base']['share']:.2f} -> {found['aligned']['share']:.2f}" if "share" in found["base"] else "")
        for name, found in result["judges"].items()
    ]
    lines.append(f"identity: {own.mean():.1%} are nearest to themselves; {told['evaluations']} evaluations a picture")
    return {key: value for key, value in result.items() if key != "rows"} | {
        "out": str(out),
        "report": page,
        "summary": "\n".join([*lines, f"report: {page}"]),
    }


def _identity(sides: Sequence[Sequence[Any]], device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    before, after = (embedded([picture.path for picture in pictures], device) for pictures in sides)
    return nearest_is_own(before, after)


def embedded(pictures: Sequence[Path | Image.Image], device: torch.device) -> np.ndarray:
    """What the image tower sees of pictures, `[n, 4192]`: for identity and variety."""
    tower, rows = ImageTower(device), []
    for start in range(0, len(pictures), 32):
        part = pictures[start : start + 32]
        images = [each if isinstance(each, Image.Image) else Image.open(each).convert("RGB") for each in part]
        rows.append(tower(to_pixels(images, TOWER_SIDE)).cpu())
    return torch.cat(rows).numpy()
