"""`flowalign demo flow`: a flow behind an images API that nobody can look into, held against best-of-n, in minutes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flowalign import config as configuration
from flowalign import runs
from flowalign.demo import GUIDANCE, STEPS, begin, held_out_captions
from flowalign.evaluate.worth import arms
from flowalign.files import write_text
from flowalign.flow.settings import FlowConfig
from flowalign.report.worth import write_worth
from flowalign.runs.worth import Setting, measure_worth, scored
from flowalign.serve.child import serving

CONFIG = Path("configs/emoji-flow.yaml")
FIT_STEPS, BATCH = 120, 16
"""Of the configuration's 500: what fits into the demo's minutes."""
CAPTIONS, SEEDS = 20, 8
METRICS = "metrics.json"


def demo_flow(out: Path = Path("runs/demo-flow")) -> dict[str, Any]:
    """Fit a flow on style pairs, put it behind tiny-sd served over HTTP, draw held-out captions both ways, judge, report.

    `out` gets the flow's run folder, the pictures, `metrics.json` and `report.html`; an earlier demo there is replaced. Raises
    ConfigError outside a clone of the project, and where `out` holds something else.
    """
    started = time.perf_counter()
    begin(out, CONFIG)
    print(f"1/3  fit: {FIT_STEPS} steps of {BATCH} pairs that prefer Fluent drawings to Noto ones", flush=True)
    flow = out / "flow"
    fitted = runs.fit_flow(
        configuration.load_tree(FlowConfig, CONFIG, [f"output={flow}", f"train.steps={FIT_STEPS}", f"train.batch_size={BATCH}"])
    )
    if not fitted["finished"]:
        return fitted
    captions = held_out_captions(CAPTIONS)
    print(f"2/3  serve, draw and judge: {CAPTIONS} held-out captions, {SEEDS} seeds each, from the API and through the proxy")
    found = behind_http(flow, captions, range(SEEDS), out)
    found |= {"seconds_fit": fitted["seconds"], "seconds_total": time.perf_counter() - started}
    write_text(out / METRICS, json.dumps(found, indent=1) + "\n")
    print("3/3  report", flush=True)
    page = write_page(out, found, FIT_STEPS)
    return {
        "verdict": found["verdict"],
        "seconds_fit": found["seconds_fit"],
        "seconds_total": found["seconds_total"],
        "arms": found["arms"],
        "report": str(page),
        "summary": f"{found['verdict']}\n{found['seconds_total']:.0f} s in all. Open {page}",
    }


def behind_http(flow: Path, captions: Sequence[str], seeds: Sequence[int], out: Path) -> dict[str, Any]:
    """Serve tiny-sd and the flow in front of it, each a process of its own, and measure."""
    with ExitStack() as stack:
        drawing = ["--generator", "samples/emoji/tiny-sd", "--steps", str(STEPS), "--guidance", f"{GUIDANCE:g}"]
        upstream = stack.enter_context(serving(*drawing, "--precision", "bf16", log=out / "upstream.log"))
        between = ["--upstream", f"{upstream}/v1", "--flow", str(flow)]
        proxy = stack.enter_context(serving(*between, log=out / "proxy.log"))
        setting = Setting(f"{upstream}/v1", f"{proxy}/v1", str(flow))
        return measure_worth(setting, captions, seeds, out=out)


def write_page(out: Path, found: dict[str, Any], steps: int) -> Path:
    seconds = found["seconds"]
    how = (
        f"tiny-sd ({STEPS} steps, guidance {GUIDANCE:g}) and the proxy with the flow ran as two processes on loopback, on this "
        f"machine's CPU. The flow was fitted with {steps} steps in {found['seconds_fit']:.0f} s, as long as "
        f"{found['seconds_fit'] / seconds['draw']:.0f} calls take. A call and the flow were timed one at a time. The judges "
        "look through another network than the rewards that choose. “both” is the mean of the rewards, each standardised. Best "
        "of n is the mean over all choices of n among the pictures drawn of a caption. Intervals are 95 % over captions."
    )
    return write_worth(out, found, arms(scored(found)), title="Does the flow earn its place?", how=how)
