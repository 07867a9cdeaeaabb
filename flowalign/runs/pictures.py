"""Verbs that draw pictures and compare them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowalign.device import choose_device
from flowalign.errors import ConfigError
from flowalign.evaluate.compare import evaluate_folders
from flowalign.evaluate.judges import load_judges
from flowalign.families.loading import open_checkpoint
from flowalign.families.personal import personal
from flowalign.families.sampling import PRECISIONS, SamplerSettings, write_images
from flowalign.families.steer import load_steering, steered
from flowalign.files import check_folder, write_text
from flowalign.flow.folders import TABLE
from flowalign.runs.folders import judges_of, report
from flowalign.runs.mixing import open_mixed
from flowalign.settings import Config


def generate(
    checkpoint: str | None,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    out: Path = Path("runs/generate"),
    steps: int = 25,
    guidance: float = 5.0,
    batch_size: int = 16,
    sampler: str = "default",
    precision: str = "fp32",
    device: str = "auto",
    weights: Mapping[str, float] | None = None,
    targets: Mapping[str, float] | None = None,
    user: Mapping[str, float] | None = None,
    flow: str | None = None,
    mix: Mapping[str, float] | None = None,
    negative: str | None = None,
    negative_strength: float = 1.0,
    progress: bool = True,
) -> dict[str, Any]:
    """Draw one picture per prompt and seed into `out`, with `metadata.jsonl`; what is there already is not drawn again.

    The table lists what this call was asked for, whatever else the folder holds.
    weights: of the objectives that the run was steered with, by name and in any scale; None draws without, as diffusers does
    that loads the run's weights. targets: scores to draw for, of all objectives of a run that was told scores. user: for whom
    to draw, by name and share, of a run with users. flow: the run folder of a flow to move them along; what was drawn is then
    in `out/before`. mix: instead of a checkpoint, runs and their shares in the mean of predictions. negative: a run to move
    away from, such as one of reversed preferences, in place of the negative prompt's prediction; with a strength of 0 it is not
    asked.
    """
    check_folder(out)
    settings = SamplerSettings(sampler=sampler, steps=steps, guidance=guidance, precision=precision)
    opening = {"dtype": PRECISIONS[precision], "device": choose_device(device)}
    if (checkpoint is None) != bool(mix):
        raise ConfigError("pictures are drawn by one checkpoint or by a mix of several; give one of the two.")
    moving = None
    if flow is not None:  # before the first picture is drawn: it may be none
        from flowalign.flow.improve import load_flow
        from flowalign.runs.flows import apply_opened

        moving = load_flow(flow, device=choose_device(device))
    if mix or (negative is not None and negative_strength):
        if weights is not None or targets is not None or user is not None:
            said = "weights steer" if weights is not None else "targets steer" if targets is not None else "a user is known to"
            raise ConfigError(f"{said} one run alone; leave the mix and the negative run out, or what it is told.")
        shares = mix or {str(checkpoint): 1.0}
        left = negative if negative_strength else None
        pipeline, name = open_mixed(shares, left, negative_strength, guidance=guidance, **opening)
    else:
        pipeline, name = open_checkpoint(str(checkpoint), **opening), None
        _tell(pipeline, str(checkpoint), weights, targets, user)
    wanted = [(prompt, seed) for prompt in prompts for seed in seeds]
    drawn = out if moving is None else out / "before"
    texts, starts = [prompt for prompt, _ in wanted], [seed for _, seed in wanted]
    paths = write_images(drawn, pipeline, texts, starts, settings, generator=name, batch_size=batch_size, progress=progress)
    if moving is not None:
        return apply_opened(moving, drawn, out=out, progress=progress)
    return {"out": str(out), "pictures": len(paths), "summary": f"{len(paths)} pictures in {out}"}


def _tell(
    pipeline: Any,
    run: str,
    weights: Mapping[str, float] | None,
    targets: Mapping[str, float] | None,
    user: Mapping[str, float] | None,
) -> None:
    """Have a run's pipeline draw under what is given. Raises ConfigError where that is not what the run was told."""
    given = [name for name, each in (("weights", weights), ("targets", targets), ("user", user)) if each is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} are both given, and a run knows one of them; give what it was trained with.")
    if user is not None:
        personal(pipeline, run, user)
    elif given:
        condition = load_steering(run).settings.condition
        if (condition == "scores") != (targets is not None):
            right = "targets" if condition == "scores" else "weights"
            raise ConfigError(f"{given[0]} are given, and {run} was told {condition}; give {right} instead.")
        steered(pipeline, run, weights if targets is None else targets)


def evaluate(
    base: str,
    aligned: str,
    prompts: Sequence[str] = (),
    *,
    judges: Path | None = None,
    seeds: Sequence[int] = (0,),
    out: Path = Path("runs/evaluate"),
    steps: int = 25,
    guidance: float = 5.0,
    batch_size: int = 16,
    sampler: str = "default",
    precision: str = "fp32",
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Compare two generators on the same prompts and seeds; `out` gets pictures, `evaluation.json` and `report.html`.

    `base` and `aligned` are checkpoints, run folders, or folders of pictures that `generate` wrote; the page shows the pictures
    where both sides were drawn, and the result names those that were. `prompts` are for sides that are drawn. `judges` may be
    left out where `aligned` is a run whose configuration names them. Raises ConfigError for prompts that nothing is drawn for,
    and for none where something is.
    """
    check_folder(out)
    given = [source for source in (base, aligned) if (Path(source) / TABLE).is_file()]
    if not prompts and len(given) < 2:
        other = aligned if base in given else base
        raise ConfigError(f"{other} is no folder of pictures, so they are drawn, and no prompts say of what; give --prompts.")
    if prompts and len(given) == 2:
        raise ConfigError(f"{base} and {aligned} are folders of pictures, so nothing is drawn; leave --prompts out.")
    judge_folder = judges or judges_of(aligned, Config)
    chosen = load_judges(judge_folder, choose_device(device))
    folders, drawn = [], []
    for side, source in (("base", base), ("aligned", aligned)):
        if source in given:
            folders.append(Path(source))
            continue
        folder = out / "evaluation" / side
        generate(
            source,
            prompts,
            seeds=seeds,
            out=folder,
            steps=steps,
            guidance=guidance,
            batch_size=batch_size,
            sampler=sampler,
            precision=precision,
            device=device,
            progress=progress,
        )
        folders.append(folder)
        drawn.append(side)
    result = evaluate_folders(folders[0], folders[1], chosen, progress=progress) | {"drawn": drawn}
    write_text(out / "evaluation" / "evaluation.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    page = report(out)["report"]
    lines = [
        f"{name}: aligned wins {found['win_rate']['value']:.1%} "
        f"[{found['win_rate']['low']:.1%}, {found['win_rate']['high']:.1%}], "
        f"mean {found['base']['mean']:.3f} -> {found['aligned']['mean']:.3f}"
        for name, found in result["judges"].items()
    ]
    return {key: value for key, value in result.items() if key != "rows"} | {
        "out": str(out),
        "report": page,
        "summary": "\n".join([*lines, f"report: {page}"]),
    }
