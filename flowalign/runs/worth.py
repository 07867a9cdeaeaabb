"""What a flow behind an images API is worth: draw through it and past it, let judges look, and hold it against best-of-n."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flowalign.device import choose_device
from flowalign.errors import RunError
from flowalign.evaluate.compare import mean_with_interval
from flowalign.evaluate.diversity import pairwise_distance
from flowalign.evaluate.identity import nearest_is_own
from flowalign.evaluate.judges import load_judges
from flowalign.evaluate.worth import Scored, Seconds, arms, rows
from flowalign.flow.improve import load_flow
from flowalign.report.worth import verdict
from flowalign.runs.flows import embedded, write_pictures
from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards.base import Shelf
from flowalign.serve.client import ImagesAPI

PARALLEL = 8
"""Requests under way at a time while pictures are drawn; they are timed one at a time."""
TIMED = 8
"""Pictures that are timed, each way."""
CHECKED = 8
"""Pictures that are moved here as well: the proxy must give the same."""
Scorer = Callable[[Sequence[Image.Image], Sequence[str]], Any]
Pair = tuple[list[Image.Image], list[Image.Image]]


@dataclass(frozen=True)
class Setting:
    """An images API, the proxy in front of it, and by what their pictures are chosen and judged."""

    upstream: str
    """Up to and with /v1."""
    proxy: str
    """The same of `flowalign serve --upstream … --flow …`."""
    flow: str
    """The flow's run folder."""
    model: str = "tiny-sd"
    judges: str = "samples/emoji/judges"
    rewards: tuple[str, ...] = ("samples/emoji/rewards.yaml",)
    """For choosing the best of n; no judge is among them."""
    device: str = "auto"


def measure_worth(
    setting: Setting, prompts: Sequence[str], seeds: Sequence[int], *, out: Path, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Every prompt from every seed, through the proxy and from the upstream, judged; as JSON, its pictures in `out`.

    Raises RunError where the proxy moved fewer pictures than it was asked for, or moves them in another way than the flow here.
    """
    wanted = [(prompt, seed) for prompt in prompts for seed in seeds]
    told, keys = [prompt for prompt, _ in wanted], [seed for _, seed in wanted]
    apis = [ImagesAPI(url, setting.model, seed_field="seed", parallel=PARALLEL) for url in (setting.upstream, setting.proxy)]
    moved = _moved(setting.proxy)
    sides: list[list[Image.Image]] = []
    for api, name in zip(apis, ("from the generator", "through the proxy"), strict=True):
        started = time.perf_counter()
        sides.append([picture.convert("RGB") for picture in api(told, keys)])
        say(f"     {len(told)} pictures {name} in {time.perf_counter() - started:.0f} s")
    through = _moved(setting.proxy) - moved
    if through < len(told):
        raise RunError(f"the proxy moved {through} of {len(told)} pictures; its log says why the others stayed as they were.")
    pair: Pair = (sides[0], sides[1])
    for name, pictures in zip(("before", "after"), pair, strict=True):
        write_pictures(out / name, pictures, told, keys, [{}] * len(told), f"{setting.model}, {name} the flow")
    draw, both = _latencies(apis, wanted[:TIMED])
    evaluations, domain = _check(setting, pair, told)
    judged, _ = _scores([(judge.name, judge.score) for judge in load_judges(setting.judges)], pair, told)
    loaded = load_rewards(setting.rewards, Shelf(choose_device(setting.device)))
    rewards, choosing = _scores([(each.card.name, each.score) for each in loaded], pair, told)
    features = [embedded(pictures, choose_device(setting.device)) for pictures in pair]
    seconds = Seconds(draw, max(0.0, both - draw), choosing)
    found = {
        "prompts": list(prompts),
        "seeds": list(seeds),
        "judged": judged,
        "rewards": rewards,
        "seconds": asdict(seconds),
        "evaluations": evaluations,
        "strength": domain,
        **likeness(features, told, len(seeds)),
    }
    return found | conclusions(found)


def scored(found: Mapping[str, Any]) -> Scored:
    """The measured scores as arrays."""
    shape = (len(found["prompts"]), len(found["seeds"]))

    def arrays(values: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, tuple[Any, Any]]:
        return {name: tuple(np.array(side).reshape(shape) for side in pair) for name, pair in values.items()}  # type: ignore[misc]

    return Scored(arrays(found["judged"]), arrays(found["rewards"]), Seconds(**found["seconds"]))


def conclusions(found: Mapping[str, Any]) -> dict[str, Any]:
    """All ways to get a picture, with intervals, and what follows in words."""
    compared = arms(scored(found))
    return {"arms": rows(compared), "verdict": verdict(compared, found)}


def _scores(scorers: Sequence[tuple[str, Scorer]], pair: Pair, prompts: Sequence[str]) -> tuple[dict[str, Any], float]:
    """By scorer the lists before and after, and the seconds that all scorers together took for a picture."""
    found: dict[str, Any] = {}
    spent = 0.0
    for name, score in scorers:
        sides = []
        for pictures in pair:
            values: list[float] = []
            score(pictures[:1], prompts[:1])  # what is loaded when first needed is not part of a picture's price
            started = time.perf_counter()
            for start in range(0, len(pictures), 32):
                values += score(pictures[start : start + 32], prompts[start : start + 32]).double().flatten().tolist()
            spent += time.perf_counter() - started
            sides.append(values)
        found[name] = sides
    return found, spent / (2 * len(prompts))


def _latencies(apis: Sequence[ImagesAPI], wanted: Sequence[tuple[str, int]]) -> list[float]:
    """Seconds of a picture from each API, one at a time and in turns: the least of all, for others' work only ever adds."""
    alone = [replace(api, parallel=1) for api in apis]
    taken: list[list[float]] = [[] for _ in apis]
    for prompt, seed in wanted:
        for api, seconds in zip(alone, taken, strict=True):
            started = time.perf_counter()
            api([prompt], [seed])
            seconds.append(time.perf_counter() - started)
    return [min(seconds) for seconds in taken]


def _check(setting: Setting, pair: Pair, prompts: Sequence[str]) -> tuple[int, float]:
    """Evaluations of the field and mean strength of the first pictures, moved here. Raises RunError where the proxy differs."""
    flow = load_flow(setting.flow, device=choose_device(setting.device))
    here = flow.apply(pair[0][:CHECKED], prompts[:CHECKED] if flow.reads_prompts else None)
    before, ours, theirs = (
        np.stack([np.asarray(each, dtype=np.float64) for each in side[:CHECKED]])
        for side in (
            pair[0],
            here.pictures,
            pair[1],
        )
    )
    off, way = np.abs(theirs - ours).mean(), np.abs(ours - before).mean()
    if off > 0.05 * way + 0.5:  # of 255; a generator in bf16 rounds otherwise when other pictures share its batch
        raise RunError(
            f"the proxy's pictures differ by {off:.2f} of 255 in the mean from what {setting.flow} makes of the upstream's, "
            f"moving them by {way:.2f}; it serves another flow, or the upstream draws other pictures when it is asked again."
        )
    return here.evaluations, float(np.mean(here.strength))


def likeness(features: Sequence[np.ndarray], prompts: Sequence[str], draws: int) -> dict[str, Any]:
    """Identity and drift, picture by picture among those of one seed; variety of a prompt's pictures before and after.

    features: before and after, `[P * draws, F]`, seed by seed of each prompt; prompts: `[P * draws]`.
    """
    own, drift = np.zeros(len(prompts)), np.zeros(len(prompts))
    for seed in range(draws):
        place = slice(seed, None, draws)
        own[place], drift[place] = nearest_is_own(features[0][place], features[1][place])
    mean, spread = features[0].mean(0), features[0].std(0) + 1e-6
    out: dict[str, Any] = {
        "identity": asdict(mean_with_interval(own, prompts)),
        "drift": asdict(mean_with_interval(drift, prompts)),
        "variety": None,
    }
    if draws > 1:
        before, after = (pairwise_distance((each - mean) / spread, prompts) for each in features)
        difference = asdict(mean_with_interval(after - before, range(len(before))))
        out["variety"] = {"before": float(before.mean()), "after": float(after.mean()), "difference": difference}
    return out


def _moved(proxy: str) -> int:
    """Pictures that a proxy has moved, as it counts them itself."""
    import httpx

    text = httpx.get(f"{proxy.removesuffix('/v1')}/metrics", trust_env=False, timeout=30).text
    counts = [line.split()[-1] for line in text.splitlines() if line.startswith('flowalign_pictures_total{outcome="applied"')]
    return int(sum(float(count) for count in counts))
