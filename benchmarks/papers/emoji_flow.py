"""A flow behind an images API on the emoji: what it changes, what it costs, and whether best-of-n does better.

    python -m benchmarks.papers.emoji_flow [--work runs/emoji-flow-worth] [--captions 96] [--seeds 8] [--quick]

tiny-sd is served over HTTP as a black box, a flow is fitted to style pairs of the data set as configs/emoji-flow.yaml says,
and the proxy with it stands in front. Held-out captions are drawn from the API and through the proxy and judged by judges that
no training sees; then the flow is held against best-of-n under rewards that are no judges. After that come other ways to fit
and to apply the flow, on the pictures of the first two seeds. What is finished in --work is kept.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.papers import emoji_flow_page
from benchmarks.papers.stages import Tree, judges, kept, options_of, write_rows
from flowalign import config as configuration
from flowalign import runs
from flowalign.demo import held_out_captions
from flowalign.demo_flow import CONFIG, behind_http, write_page
from flowalign.evaluate.compare import mean_with_interval
from flowalign.flow.improve import Flow, load_flow
from flowalign.flow.settings import FlowConfig
from flowalign.runs.flows import embedded
from flowalign.runs.worth import conclusions, likeness

PAGE = Path("docs/results/emoji_flow.md")
SWEPT = 2
"""Seeds on which ways to fit and to apply are compared."""
PAIRS = Path("samples/emoji/preferences/fluent_over_noto-train.jsonl")


@dataclass(frozen=True)
class Fit:
    """One way to fit the flow."""

    name: str
    overrides: tuple[str, ...] = ()
    still: bool = False
    """Add every chosen picture once more, as a pair with itself: what is in the style already shall stay where it is."""


PUBLISHED = Fit("as configured")
FITS = (
    PUBLISHED,
    Fit("chosen pictures stay", still=True),
    Fit("σ 0.5", ("match.sigma=0.5",)),
)
WAYS: dict[str, dict[str, Any]] = {
    "": {},
    "strength 0.5": {"strength": 0.5},
    "strength 0.7": {"strength": 0.7},
    "strength 0.8": {"strength": 0.8},
    "guidance 0.5": {"guidance": 0.5},
    "guidance 2": {"guidance": 2.0},
    "2 steps of midpoint": {"steps": 2},
    "4 steps of midpoint": {"steps": 4},
    "2 steps of euler": {"solver": "euler", "steps": 2},
}
"""Ways to apply it; the first is the configuration's."""
SHARED = ("", "strength 0.7", "strength 0.8")
"""Ways to apply what was fitted otherwise."""


def fit(work: Path, way: Fit, steps: int | None) -> tuple[Path, float]:
    """The run folder of a finished fit, and its seconds."""
    folder = work / f"flow-{way.name.replace(' ', '-')}"
    settings = [f"output={folder}", *way.overrides, *([f"train.steps={steps}"] if steps else [])]
    if way.still:
        pairs = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
        rows = [row | {side: str((PAIRS.parent / row[side]).resolve()) for side in ("chosen", "rejected")} for row in pairs]
        still = [row | {"rejected": row["chosen"]} for row in rows]
        settings.append(f"data.train={write_rows(work / 'still.jsonl', rows + still)}")

    def run() -> Tree:
        result = runs.fit_flow(configuration.load_tree(FlowConfig, CONFIG, settings), resume=True, progress=False)
        if not result["finished"]:
            raise SystemExit(result["summary"])
        return {"seconds": result["seconds"]}

    return folder, kept(work / f"{folder.name}.json", {"settings": settings}, run)["seconds"]


class Bench:
    """The first seeds' pictures from the API, and what they are judged to be."""

    def __init__(self, folder: Path, found: Tree) -> None:
        draws = len(found["seeds"])
        places = [
            (place * draws + turn, seed)
            for place in range(len(found["prompts"]))
            for turn, seed in enumerate(found["seeds"][:SWEPT])
        ]
        self.prompts = [found["prompts"][place // draws] for place, _ in places]
        names = [f"{place:05d}-{seed}.png" for place, seed in places]
        self.pictures = [Image.open(folder / "before" / name).convert("RGB") for name in names]
        self.features = embedded(self.pictures, torch.device("cpu"))
        self.before = self.judged(self.pictures)

    def judged(self, pictures: list[Image.Image]) -> Tree:
        return {name: judge.score(pictures, self.prompts).tolist() for name, judge in judges().items()}

    def applied(self, flow: Flow, options: dict[str, Any]) -> Tree:
        """Share in the style, caption match and its change with intervals over captions, identity, seconds and evaluations."""
        begun = time.process_time()
        told = self.prompts if flow.reads_prompts else None
        found = flow.apply(self.pictures, told, solve=flow.solve.model_copy(update=options))
        spent = (time.process_time() - begun) / len(self.pictures)
        scores = self.judged(found.pictures)
        alike = likeness([self.features, embedded(found.pictures, torch.device("cpu"))], self.prompts, SWEPT)
        change = np.array(scores["caption_match"]) - np.array(self.before["caption_match"])
        return {
            "style": asdict(mean_with_interval(np.array(scores["style"]) > 0.5, self.prompts)),
            "caption_match": float(np.mean(scores["caption_match"])),
            "change": asdict(mean_with_interval(change, self.prompts)),
            "identity": alike["identity"]["value"],
            "evaluations": found.evaluations,
            "cpu": spent,
        }


def measure(work: Path, captions: int, seeds: int, *, steps: int | None, quick: bool) -> Tree:
    """Everything; `{worth: …, ways: {fit: {way: figures}}, …}`."""
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {text}", flush=True)

    flow, seconds = fit(work, PUBLISHED, steps)
    say(f"fitted in {seconds:.0f} s")
    folder, shown = work / "behind-http", held_out_captions(captions)
    about = {"captions": captions, "seeds": seeds, "steps": steps}
    found = kept(work / "worth.json", about, lambda: behind_http(flow, shown, range(seeds), folder) | {"seconds_fit": seconds})
    found |= conclusions(found)  # how it is put in words may have changed since it was measured
    say(found["verdict"])
    page = write_page(folder, found, steps or configuration.load_tree(FlowConfig, CONFIG).train.steps)
    say(f"page: {page}")
    bench, ways = Bench(folder, found), dict[str, Any]()
    for each in FITS[: 2 if quick else None]:
        loaded = load_flow(fit(work, each, steps)[0])
        for name, options in list(WAYS.items())[: 2 if quick else None]:
            if each is not PUBLISHED and name not in SHARED:
                continue
            file = work / f"way-{each.name}-{name}.json".replace(" ", "-")
            figures = kept(file, about | {"options": options}, partial(bench.applied, loaded, options))
            ways.setdefault(each.name, {})[name] = figures
            say(f"{each.name}, {name or 'as configured'}: {emoji_flow_page.line(figures)}")
    before = {name: [float(value) for value in values] for name, values in bench.before.items()}
    base = {"style": float(np.mean(np.array(before["style"]) > 0.5)), "caption_match": float(np.mean(before["caption_match"]))}
    return {"worth": found, "ways": ways, "before": base, "seconds": time.perf_counter() - started}


def main() -> None:
    options = parser().parse_args()
    if options.quick:
        found = measure(options.work, 3, 2, steps=3, quick=True)
    else:
        found = measure(options.work, options.captions, options.seeds, steps=None, quick=False)
    print("\n".join([*emoji_flow_page.worth_table(found["worth"]), "", *emoji_flow_page.ways_table(found)]))
    if not options.quick:
        emoji_flow_page.write_page(found, options.work, PAGE)


def parser() -> argparse.ArgumentParser:
    made = options_of(__doc__, "runs/emoji-flow-worth")
    made.add_argument("--captions", type=int, default=48)
    made.add_argument("--seeds", type=int, default=8, help="pictures of each caption, each way")
    return made


if __name__ == "__main__":
    main()
