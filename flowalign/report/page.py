"""`write_report`: one self-contained HTML page of a run, pictures first. Nothing is loaded from anywhere else."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from flowalign.errors import CheckpointError
from flowalign.evaluate.compare import Generated, match, read_generation
from flowalign.evaluate.guard import guard_report
from flowalign.files import text_lines, write_text
from flowalign.report.charts import Line, forest, line_chart
from flowalign.report.document import document
from flowalign.report.pictures import Samples, read_samples, sheet, strip

Metrics = Sequence[Mapping[str, Any]]
SIDES = ("base", "aligned")


def write_report(run: str | Path, *, limit: int = 48) -> Path:
    """Write `report.html` into a run folder from what the folder holds; a part that is missing is left out.

    Read are config.yaml, metrics.jsonl, metrics.json (its `verdict`), environment.json, data.json, samples/step-*, and
    evaluation/ with evaluation.json, base/ and aligned/, which hold what was judged unless evaluation.json names fewer sides
    as `drawn`. Without an evaluation's pictures the first and the last samples stand in for them. At most `limit` pairs are
    inlined, the first ones. Raises CheckpointError for a folder with nothing to report or a file that cannot be read, DataError
    for broken pictures.
    """
    run = Path(run)
    config = read_mapping(run / "config.yaml")
    metrics = list(read_lines(run / "metrics.jsonl"))
    evaluation = read_mapping(run / "evaluation" / "evaluation.json")
    folders = [run / "evaluation" / side for side in SIDES]
    there = [*evaluation.get("drawn", SIDES)] == [*SIDES] and all(folder.is_dir() for folder in folders)
    pairs = match(*map(read_generation, folders)) if there else []  # else of an earlier evaluation
    samples = read_samples(run)
    data, environment = read_mapping(run / "data.json"), read_mapping(run / "environment.json")
    if not any((config, metrics, evaluation, pairs, samples, data, environment)):
        raise CheckpointError(f"{run} holds nothing to report; give a run folder, with config.yaml and metrics.jsonl in it.")
    verdict = read_mapping(run / "metrics.json").get("verdict") or _verdict(evaluation)
    parts = [
        _header(run.resolve().name, verdict, config, metrics, evaluation),
        _pictures(pairs, evaluation, limit) if pairs else _sampled(samples, limit),
        _results(evaluation),
        _progress(samples) if pairs or len(samples) > 2 else "",
        _training(metrics),
        _tables("Settings", config),
        _tables("Data", data),
        _tables("Environment", environment),
    ]
    path = run / "report.html"
    write_text(path, document(f"{run.resolve().name} · flowalign", "".join(parts)))
    return path


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON or YAML file that holds a mapping; {} if there is none."""
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        value = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); write it again or move it out of the run folder.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold named values; write it again or move it out of the run folder.")
    return value


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a metrics file. A last line that was cut by a kill is left out."""
    lines = text_lines(path) if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            if number < len(lines):
                raise CheckpointError(f"{path} line {number} is not JSON ({error}); remove the line.") from error


def _verdict(evaluation: Mapping[str, Any]) -> str:
    """A sentence per judge, for a run that states no verdict of its own."""
    sentences = []
    for name, judge in evaluation.get("judges", {}).items():
        rate = judge["win_rate"]
        if rate["low"] > 0.5:
            said = "the aligned model wins"
        elif rate["high"] < 0.5:
            said = "the base model wins"
        else:
            said = "no clear difference"
        value, low, high = (f"{100 * rate[key]:.0f}" for key in ("value", "low", "high"))
        sentences.append(f"By {name}, {said} (win rate of the aligned model {value} %, 95 % interval {low} to {high} %).")
    return " ".join(sentences)


def _guarded(config: Mapping[str, Any], metrics: Metrics) -> str:
    """What the guard saw, for a run that has one."""
    settings = config.get("guard")
    return guard_report(settings["policy"], metrics)["says"] if isinstance(settings, Mapping) and metrics else ""


def _header(name: str, verdict: str, config: Mapping[str, Any], metrics: Metrics, evaluation: Mapping[str, Any]) -> str:
    objective, model = config.get("objective") or {}, config.get("model") or {}
    knobs = ", ".join(f"{key} {value:g}" for key, value in objective.items() if isinstance(value, float | int))
    facts = {
        "checkpoint": Path(str(model["checkpoint"])).name if "checkpoint" in model else None,
        "objective": f"{objective['name']}{f' ({knobs})' if knobs else ''}" if "name" in objective else None,
        "steps": max((line["step"] for line in metrics), default=None),
        "pairs judged": evaluation.get("pairs"),
    }
    known = {key: escape(str(value)) for key, value in facts.items() if value is not None}
    shown = "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in known.items())
    said = f'<p class="verdict">{escape(verdict)}</p>' if verdict else ""
    guarded = _guarded(config, metrics)
    said += f'<p class="lead guard">{escape(guarded)}</p>' if guarded else ""
    title = f'<p class="eyebrow">Alignment report</p><h1>{escape(name)}</h1>'
    return f'<header>{title}{said}<dl class="facts">{shown}</dl></header>'


def _pictures(pairs: Sequence[tuple[Generated, Generated]], evaluation: Mapping[str, Any], limit: int) -> str:
    scores = {(row["prompt"], row["seed"]): row["scores"] for row in evaluation.get("rows", [])}
    shown, count = sheet(pairs[:limit], scores)
    return _picture_section("Left the base model, right the aligned one", pairs, shown, count)


def _sampled(samples: Samples, limit: int) -> str:
    """The first samples beside the last ones."""
    if len(samples) < 2:
        return ""
    (first, before), (last, after) = samples[0], samples[-1]
    pairs = list(zip(before, after, strict=True))
    names = ("base" if first == 0 else f"step {first:,}", f"step {last:,}")
    shown, count = sheet(pairs[:limit], {}, names)
    return _picture_section(f"Left the {names[0]} model, right the same after {last:,} steps", pairs, shown, count)


def _picture_section(sides: str, pairs: Sequence[tuple[Generated, Generated]], shown: str, count: int) -> str:
    made = pairs[0][0].settings
    which = f"the first {count} of {len(pairs)} pairs, not picked" if len(pairs) > count else f"all {len(pairs)} pairs"
    sampler = "the checkpoint's own sampler" if made["sampler"] == "default" else f"sampler {made['sampler']}"
    lead = (
        f"{sides}: same prompt, same seed, same settings ({sampler}, {made['steps']} steps, guidance {made['guidance']:g}, "
        f"{made['width']} × {made['height']} px). Shown are {which}."
    )
    return f'<section id="pictures"><h2>Pictures</h2><p class="lead">{escape(lead)}</p>{shown}</section>'


def _progress(samples: Samples) -> str:
    """What the run drew along the way."""
    if len(samples) < 2:
        return ""
    table, steps, prompts = strip(samples)
    shown = ((steps, len(samples), "steps"), (prompts, len(samples[0][1]), "prompts"))
    parts = " and ".join(f"{part} of {whole} {what}" for part, whole, what in shown if part < whole)
    which = f" Shown are {parts}." if parts else ""
    lead = f"The same prompts and seeds, drawn by the model as it was after each of these steps.{which}"
    return f'<section id="progress"><h2>During training</h2><p class="lead">{escape(lead)}</p>{table}</section>'


def _results(evaluation: Mapping[str, Any]) -> str:
    judges = evaluation.get("judges")
    if not judges:
        return ""
    rows = []
    for name, judge in judges.items():
        cells = [_value(judge[side]["mean"]) + _share(judge[side]) for side in ("base", "aligned")]
        cells += [_interval(judge[key], signed=True) for key in ("mean_difference", "median_difference")]
        cells.append(" / ".join(f'<data value="{judge[key]}">{judge[key]}</data>' for key in ("wins", "ties", "losses")))
        rows.append(f"<tr><th>{escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    interval = evaluation["interval"]
    lead = (
        f"{evaluation['pairs']} pairs from {evaluation['prompts']} prompts. A tie counts one half. Intervals: "
        f"{100 * interval['level']:g} %, {interval['method']}, {interval['resamples']:,} resamples."
    )
    head = ("Judge", "Base mean", "Aligned mean", "Mean difference", "Median difference", "Wins / ties / losses")
    return (
        f'<section id="results"><h2>Win rates</h2><p class="lead">{escape(lead)}</p>'
        f'<div class="scroll">{forest([(name, judge["win_rate"]) for name, judge in judges.items()])}</div>'
        f'<div class="scroll"><table><thead><tr>{"".join(f"<th>{title}</th>" for title in head)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _value(value: float, signed: bool = False) -> str:
    return f'<data value="{value}">{format(value, "+.3f" if signed else ".3f").replace("-", "−")}</data>'


def _interval(estimate: Mapping[str, float], signed: bool) -> str:
    low, high = (_value(estimate[key], signed) for key in ("low", "high"))
    return f'{_value(estimate["value"], signed)}<span class="interval">[{low}, {high}]</span>'


def _share(side: Mapping[str, float]) -> str:
    if "share" not in side:
        return ""
    return f'<span class="interval"><data value="{side["share"]}">{100 * side["share"]:.1f} %</data> above ½</span>'


def _training(metrics: Metrics) -> str:
    def points(key: str) -> list[tuple[float, float]]:
        found = [(line["step"], line[key]) for line in metrics if key in line]
        return [(step, value) for step, value in found if isinstance(value, float | int) and math.isfinite(value)]

    def pair(key: str) -> list[Line]:
        train, validation = points(f"train/{key}"), points(f"eval/{key}")
        return [Line("train", "plain train", train), Line("validation", "one", validation, dots=True)]

    errors = [
        Line("chosen, train", "winner train", points("train/error/chosen")),
        Line("rejected, train", "loser train", points("train/error/rejected")),
        Line("chosen, validation", "winner", points("eval/error/chosen"), dots=True),
        Line("rejected, validation", "loser", points("eval/error/rejected"), dots=True),
    ]
    charts = [
        ("Denoising error", "policy − reference; the chosen one should not rise", errors, None, 0.0),
        ("Reward margin", "chosen − rejected", pair("rewards/margins"), None, 0.0),
        ("Preference accuracy", "share of pairs ranked right", pair("rewards/accuracies"), (0.0, 1.0), 0.5),
        ("Loss", "mean over pairs", pair("loss"), None, None),
    ]
    drawn = "".join(
        line_chart(title, note, lines, span=span, at=at)
        for title, note, lines, span, at in charts
        if any(line.points for line in lines)
    )
    return f'<section id="training"><h2>Training</h2><div class="charts">{drawn}</div></section>' if drawn else ""


def _tables(title: str, values: Mapping[str, Any]) -> str:
    """Nested values as small tables: one per mapping, loose values first."""
    groups = _groups("", values)
    if not groups:
        return ""
    tables = []
    for name, rows in groups:
        body = "".join(f"<tr><th>{escape(key)}</th><td>{escape(_shown(value))}</td></tr>" for key, value in rows)
        tables.append(f"<div>{f'<h3>{escape(name)}</h3>' if name else ''}<table><tbody>{body}</tbody></table></div>")
    return f'<section id="{title.lower()}"><h2>{title}</h2><div class="groups">{"".join(tables)}</div></section>'


def _groups(name: str, values: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, Any]]]]:
    loose = [(str(key), value) for key, value in values.items() if not (isinstance(value, dict) and value)]
    groups = [(name, loose)] if loose else []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            groups += _groups(f"{name} · {key}" if name else str(key), value)
    return groups


def _shown(value: Any) -> str:
    if value is None or value == {} or value == []:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_shown(item) for item in value[:12]) + (f" … ({len(value)} in all)" if len(value) > 12 else "")
    return f"{value:g}" if isinstance(value, float) else str(value)
