"""The plan as a page of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
WORK = ("GFLOP", "TFLOP", "PFLOP", "EFLOP")


def page(plan: dict[str, Any]) -> str:
    """What `predict` found, for people."""
    blocks = (_model, _memory, _data, _flops, _run, _gpus, _warnings)
    return "\n\n".join("\n".join(block(plan)) for block in blocks)


def _model(plan: dict[str, Any]) -> Iterator[str]:
    model, parameters = plan["model"], plan["parameters"]
    shape = " x ".join(map(str, model["latents"]))
    yield f"{model['checkpoint']}  ({model['family']}, {model['resolution']} px, latents {shape})"
    share = parameters["trained"] / parameters["denoiser"]
    yield from _table(
        [
            ("parameters", "", ""),
            ("  trained", _count(parameters["trained"]), f"{parameters['kind']}, {share:.2%} of the denoiser's number"),
            ("  denoiser", _count(parameters["denoiser"]), ""),
            *((f"  {name}", _count(number), "while the caches are filled") for name, number in parameters["encoders"].items()),
        ]
    )


def _memory(plan: dict[str, Any]) -> Iterator[str]:
    memory, several = plan["memory"], plan["run"]["processes"] > 1
    yield from _table(
        [
            ("memory on each device" if several else "memory on the device", "", ""),
            *((f"  {part['name']}", size(part["bytes"]), part["how"]) for part in memory["parts"]),
            ("  together", size(memory["total"]), "while it trains"),
            ("  before that", size(memory["while_caching"]), "denoiser and encoders, without their activations"),
        ]
    )


def _data(plan: dict[str, Any]) -> Iterator[str]:
    data, disk = plan["data"], plan["disk"]
    most = "" if data["exact"] else "at most "
    rows = [("data", "", ""), ("  comparisons", _number(data["train"]), data["note"])]
    rows.append(("  held out", _number(data["held_out"]), ""))
    if data["prepared"] is not None:
        rows.append(("  prepared", _number(data["prepared"]), "what the run sees or holds out; no other picture is read"))
    rows.append(("disk for caches", "", ""))
    for name, each, what in (("latents", "per_picture", "pictures"), ("prompts", "per_prompt", "prompts")):
        number = "" if data[what] is None else f"{most}{data[what]:,} {what}, "
        rows.append((f"  {name}", size(disk[name]), f"{number}{size(disk[each])} each"))
    rows.append(("  reference bank", size(disk["bank"]), "" if plan["run"]["bank"] else "reference.bank is null"))
    yield from _table(rows)


def _flops(plan: dict[str, Any]) -> Iterator[str]:
    flops, pictures = plan["flops_per_comparison"], plan["data"]["per_comparison"]
    parts = (
        ("policy forward", "policy_forward", ""),
        ("policy backward", "policy_backward", ""),
        ("reference forward", "reference", ""),
        ("encoding pictures", "images", ""),
        ("encoding the prompt", "prompts", ""),
        ("re-encoding at every step", "re_encoded", "what many scripts do; never done here"),
        ("with caches", "cached", ""),
        ("with caches and a bank", "with_bank", ""),
    )
    rows = [("work per comparison", "", f"{pictures} pictures and a prompt")]
    for name, key, note in parts:
        mine = key == ("with_bank" if plan["run"]["bank"] else "cached")
        rows.append((f"  {name}", work(flops[key]), "this configuration" if mine else note))
    yield from _table(rows)


def _run(plan: dict[str, Any]) -> Iterator[str]:
    run = plan["run"]
    epochs = "" if run["epochs"] is None else f", {run['epochs']:.2f} epochs"
    shared = "" if run["processes"] == 1 else f" over {run['processes']:,} processes"
    each = f"{run['comparisons_per_step']:,} comparisons{shared}"
    yield f"the run: {run['steps']:,} steps of {each} = {run['comparisons']:,}{epochs}"
    stages = ((name, run["flops"][name]) for name in ("caching", "bank", "training", "validation"))
    yield from _table([(f"  {name}", work(flops), "") for name, flops in stages])
    forwards = run["reference_forwards"]
    if forwards is None:
        return
    live, each, draws = forwards["live"], forwards["per_draw"], run["bank"]
    if draws is None:
        yield (
            f"  reference.bank=K would take K x {each:,} reference forwards instead of {live:,}: fewer if K is below the "
            f"{run['epochs']:.2f} epochs"
        )
    else:
        yield f"  the bank takes {draws} x {each:,} = {draws * each:,} reference forwards instead of {live:,}"


def _gpus(plan: dict[str, Any]) -> Iterator[str]:
    missing = [name for name, flops in plan["run"]["flops"].items() if flops is None]
    count, without = plan["run"]["processes"], f"without {', '.join(['drawing samples', *missing])}"
    reached = f"at {plan['efficiency']:.0%} of its dense {plan['precision']} peak"
    if count == 1:
        yield f"on one GPU {reached} (an assumption, as are the prices; {without})"
    else:
        shared = "which share the work without loss"
        yield f"on {count:,} GPUs, each {reached}, {shared} (assumptions, as are the prices of a GPU; {without})"
    rows = [("", "TFLOP/s", "comparisons/s", "time", "USD/hour", "USD", "")]
    for row in plan["gpus"]:
        fits = "" if row["fits"] else f"does not fit into {row['memory_gib']} GiB"
        speed, price = (f"{row['peak_tflops']:,.1f}", f"{row['comparisons_per_second']:,.2f}"), f"{row['usd_per_hour']:.2f}"
        rows.append((f"  {row['gpu']}", *speed, time(row["hours"]), price, f"{row['usd']:,.2f}", fits))
    yield from _table(rows)


def _warnings(plan: dict[str, Any]) -> Iterator[str]:
    if not plan["warnings"]:
        yield "no setting is known to end badly"
    for sentence in plan["warnings"]:
        yield f"warning: {sentence}"


def size(count: int | None) -> str:
    """Bytes in the largest unit that leaves a number of 1 or more."""
    if count is None:
        return "not known"
    value, unit = float(count), 0
    while value >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:,.{2 if unit else 0}f} {UNITS[unit]}"


def work(flops: int | None) -> str:
    """FLOP in the largest unit that leaves a number of 1 or more."""
    if flops is None:
        return "not known"
    value, unit = flops / 1e9, 0
    while value >= 1000 and unit < len(WORK) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:,.2f} {WORK[unit]}"


def time(hours: float) -> str:
    """Hours in seconds, minutes, hours or days."""
    for unit, each in (("s", 60 / 3600), ("min", 1.0), ("h", 48.0)):
        if hours < each:
            return f"{hours * {'s': 3600, 'min': 60, 'h': 1}[unit]:.1f} {unit}"
    return f"{hours / 24:,.1f} days"


def _count(number: int) -> str:
    return f"{number / 1e6:,.1f} M"


def _number(count: int | None) -> str:
    return "not known" if count is None else f"{count:,}"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """First and last column to the left, numbers between them to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for first, *numbers, last in rows:
        cells = [f"{text:>{width}}" for text, width in zip(numbers, widths[1:-1], strict=True)]
        yield "  ".join([f"{first:<{widths[0]}}", *cells, last]).rstrip()
