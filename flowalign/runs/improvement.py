"""The verb that closes the circle: draw, score, calibrate, select, learn and evaluate, round after round."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flowalign import config as configuration
from flowalign.align.reference import BEGINNING
from flowalign.device import choose_device
from flowalign.errors import CollapseError, ConfigError, NonFiniteError, RunError
from flowalign.evaluate.rounds import Measured, best_of, signs, told
from flowalign.files import atomic_folder, text_lines, write_text
from flowalign.improve_settings import Calibrate, Generator, ImproveConfig, Select
from flowalign.report.improve import write_improve_page
from flowalign.runs.flow_rounds import open_loop
from flowalign.runs.folders import fresh
from flowalign.runs.measured import measure, trained_on
from flowalign.runs.rounds import Loop, ahead, changed, draw_round, score_base, score_round, select_pairs, train_round
from flowalign.runs.selection import check_options
from flowalign.scoring.steered import STEERED
from flowalign.settings import Train, Trainable
from flowalign.train.rundir import RunDir

LATER = ("best", "flow", "guard", "hacking", "rounds", "train.learning_rate")
"""Settings that a run may go on with other values of, beside `output`: they change no round that is finished, and are what a
round that went wrong asks for."""
UNTRAINED: Mapping[str, Any] = {
    **dict.fromkeys(("objective", "reference", "sample"), True),
    "train": set(Train.model_fields) - {"device", "precision"},
    "trainable": set(Trainable.model_fields) - {"kind"},
}
"""The same while the first round has not begun to train: what nothing that was drawn or selected before was made with."""
ASKING = set(Generator.model_fields) - {"url", "model", "size", "seed_field"}
"""The same of `generator`: how it is asked, not what."""
LEARNING = {"weights": "align on", "flow": "fit a flow to"}
KEPT = {"weights": "weights", "flow": "flows"}


def improve(config: ImproveConfig, *, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Improve a generator on its own pictures as `config` says; `config.output` holds all rounds and the weights of the best.

    Stages meet at files, see `runs.rounds`: with `resume` what is there is kept, and the rest made as if it had never stopped.
    Raises ConfigError for a folder in use, settings that do not go together, and other settings than those of the run to go on
    with; RunError where nothing can be selected, or trained, in the first round: a later one ends the loop.
    """
    started, run = time.perf_counter(), RunDir(Path(config.output))
    fresh(run, resume)
    weights = _checked(config, run)
    loop = open_loop(config, progress)
    if not all(loop.prompts):
        raise ConfigError("prompts and held_out name the same prompts, so that none are left to train on; name others.")
    write_text(run.config, configuration.dump(config))
    run.write_environment(choose_device(loop.device))
    try:
        finished, stopped, rounds = _rounds(loop, weights)
    except KeyboardInterrupt:
        finished, stopped, rounds = False, "interrupted", []
    result: dict[str, Any] = {"run": str(run.path), "finished": finished, "seconds": time.perf_counter() - started}
    if not finished:
        say = f"{stopped}. Continue with: flowalign improve {run.path} --resume"
        return result | {"rounds": len(rounds), "summary": say}
    about = json.loads((run.path / "improve.json").read_text(encoding="utf-8"))
    return result | about | {"report": str(run.path / "report.html"), "summary": _summary(about, run.path)}


def _checked(config: ImproveConfig, run: RunDir) -> Mapping[str, float]:
    """Weights of the rewards. Raises ConfigError before anything is drawn."""
    if config.trainable.start is not None:
        raise ConfigError("trainable.start is set by the loop, round after round; leave it null, and name a whole model.")
    if config.switches.mask != "none" or config.switches.annotator_types > 1:
        raise ConfigError(
            "switches.mask and switches.annotator_types read what only given comparisons have; set them to none and 1."
        )
    _check_picking(config)
    if run.config.is_file():
        free: dict[str, Any] = {"output": True, "generator": ASKING}
        free |= {section: {name} if name else True for section, _, name in (each.partition(".") for each in LATER)}
        trained = RunDir(Loop(config).learned(0)).config.is_file()
        free |= {} if trained else UNTRAINED
        begun = configuration.load_tree(ImproveConfig, run.config)
        old, new = begun.model_dump(mode="json", exclude=free), config.model_dump(mode="json", exclude=free)
        different = [name for name in new if new[name] != old[name]]
        if different:
            first = "" if trained else f" and, before the first round trains, {', '.join(UNTRAINED)}"
            raise ConfigError(
                f"{run.path} was begun with another {' and '.join(different)}; a loop goes on with the settings it has, but "
                f"for {', '.join(LATER)}{first}, so give another folder with --output."
            )
        _check_rounds(Loop(config))
    return trained_on(config)


def _check_rounds(loop: Loop) -> None:
    """Raise ConfigError where rounds have prompts that the base did not draw: all share its calibration.

    What counts is what it drew, not the number of rounds that the run was begun or went on with.
    """
    pictures = loop.base / "pictures"
    if not (pictures / "drawn.json").is_file():
        return
    drawn = {json.loads(line)["prompt"] for line in text_lines(pictures / "plan.jsonl")}
    for number in range(loop.config.rounds):
        if not {row.prompt for row in loop.plan(number)} <= drawn:
            raise ConfigError(
                f"rounds is {loop.config.rounds}, and from round {number + 1} on there are prompts that the base of "
                f"{loop.folder} has not drawn, because draw.prompts={loop.config.draw.prompts} gives each round its own; "
                f"allowed: rounds up to {number}, or another folder with --output."
            )


def _check_picking(config: ImproveConfig) -> None:
    """Raise ConfigError for options that the way of picking does not read, and for what a steered loop cannot do, and would
    find when the base has drawn already, or pass over.
    """
    steer, select = config.steer, config.select
    if steer is None:
        check_options(select.by, changed(select))
        return
    if steer.condition == "scores":
        raise ConfigError(
            "steer.condition 'scores' learns from pictures that have scores already; a loop judges its own by weights, so set "
            "steer.condition=weights."
        )
    if config.train.compile and steer.form == "tokens":
        raise ConfigError(
            "train.compile compiles a denoiser that is called by itself, and steer.form 'tokens' calls it with more; set "
            "train.compile=false, or steer.form=prompt."
        )
    if config.reference.kind in BEGINNING:
        raise ConfigError(
            f"reference.kind {config.reference.kind!r} is a policy of the loop, and a steered one is held against a model that "
            "is told no weights; set reference.kind=auto."
        )
    given = select.model_dump(exclude={"least", "pair_weights", "order", "ratio"})
    passed = [f"select.{name}" for name, value in Select().model_dump(include=set(given)).items() if given[name] != value]
    passed += [f"select.order={select.order}"] if select.order in ("implicit", "potential") else []
    passed += ["calibrate.by or weights"] if config.calibrate.model_copy(update={"pairs": None}) != Calibrate() else []
    if passed:
        raise ConfigError(
            f"steer holds the best picture against the worst by the weights they were drawn under, which {passed[0]} does not "
            "go with; leave it out."
        )


def _rounds(loop: Loop, weights: Mapping[str, float]) -> tuple[bool, str | None, list[dict[str, Any]]]:
    """(whether the end was reached, why it came early, what every round measured)"""
    total, rounds = loop.config.rounds, list[dict[str, Any]]()

    def say(number: int, what: str) -> None:
        print(f"round {number + 1}/{total}: {what}", flush=True)

    say(0, f"draw {len(loop.pool())} pictures with the base and score them")
    score_base(loop)
    history = [measure(loop, loop.policy(0), loop.base / "evaluation")]
    stopped: str | None = None
    for number in range(total):
        if number > 0:
            stale = ", by a policy one round old" if loop.staleness(number) else ""
            say(number, f"draw {len(loop.plan(number))} pictures and score them{stale}")
            draw_round(loop, number)
        score_round(loop, number)
        try:
            count = select_pairs(loop, number)
        except RunError as error:
            if not rounds:
                raise
            stopped = f"Round {number + 1} selects no comparisons: {error}"
            break
        say(number, f"{LEARNING[loop.config.fit]} {count} comparisons")
        other = ahead(loop, number + 1)
        try:
            result = train_round(loop, number)
        except (CollapseError, NonFiniteError) as error:
            if not rounds:
                raise
            what = "collapsed" if isinstance(error, CollapseError) else "could not be trained"
            stopped = f"Round {number + 1} {what}: {error}"
            break
        finally:
            if other is not None:
                other.join()
        if not result["finished"]:
            return False, f"round {number + 1} was stopped while it trained", rounds
        say(number, "evaluate on held-out prompts")
        history.append(measure(loop, loop.policy(number + 1), loop.round(number) / "evaluation"))
        rounds.append(_evaluated(loop, number, count, history, weights))
        stopped = _alarm(loop, number, rounds[-1])
        _write(loop, rounds, weights, stopped, history[0])
        if stopped is not None:
            break
    _write(loop, rounds, weights, stopped, history[0])
    _keep_best(loop, rounds)
    return True, stopped, rounds


def _evaluated(
    loop: Loop, number: int, count: int, history: Sequence[Measured], weights: Mapping[str, float]
) -> dict[str, Any]:
    """One round as `evaluation.json` has it."""
    cfg = loop.config.hacking
    seen = [] if cfg.policy == "off" else signs(history, weights, drop=cfg.diversity_drop, seed=loop.config.draw.seed)
    found = {
        "round": number + 1,
        "comparisons": count,
        "staleness": loop.staleness(number),
        **told(history[0], history[-1], weights, seed=loop.config.draw.seed),
        "signs": [asdict(sign) for sign in seen],
    }
    write_text(loop.round(number) / "evaluation.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return found


def _alarm(loop: Loop, number: int, found: Mapping[str, Any]) -> str | None:
    """Why the loop ends after this round, if it does."""
    alarms = [sign["says"] for sign in found["signs"] if sign["alarm"]]
    for says in alarms:
        print(f"round {number + 1}: {says}", flush=True)
    return f"Round {number + 1}: {alarms[0]}" if alarms and loop.config.hacking.policy == "stop" else None


def _kept(loop: Loop, rounds: Sequence[Mapping[str, Any]]) -> int | None:
    """Place of the best round of those that count: not of one whose alarm ended the loop, which an alarm does under `stop`."""
    alarmed = loop.config.hacking.policy == "stop" and rounds and any(sign["alarm"] for sign in rounds[-1]["signs"])
    return best_of(rounds[:-1] if alarmed else rounds, loop.config.best)


def _write(
    loop: Loop, rounds: Sequence[Mapping[str, Any]], weights: Mapping[str, float], stopped: str | None, base: Measured
) -> None:
    """`improve.json` and the page, after every round."""
    best = _kept(loop, rounds)
    about = {
        "rounds": list(rounds),
        "best": None if best is None else rounds[best]["round"],
        "best_by": loop.config.best,
        "stopped": stopped,
        "weights": dict(weights),
        "base": told(base, base, weights, seed=loop.config.draw.seed),
        "planned": loop.config.rounds,
        "drawing": loop.config.draw.when,
        "selection": loop.config.select.by if loop.config.steer is None else STEERED,
        "fit": loop.config.fit,
        **loop.about(best),
    }
    write_text(loop.folder / "improve.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    write_improve_page(loop.folder)


def _keep_best(loop: Loop, rounds: Sequence[Mapping[str, Any]]) -> None:
    best = _kept(loop, rounds)
    target = loop.folder / "weights"
    if best is None:
        shutil.rmtree(target, ignore_errors=True)
        return
    with atomic_folder(target) as temporary:
        loop.keep(best, temporary)


def _summary(about: Mapping[str, Any], folder: Path) -> str:
    lines = []
    for each in about["rounds"]:
        rates = ", ".join(f"{name} {found['calibrated']['value']:.2f}" for name, found in each["measures"].items())
        far = "" if each["reach"] is None else f"hypervolume {each['reach']['hypervolume']['value']:.3f}; "
        lines.append(f"round {each['round']}: win rates over the base {rates}; {far}diversity {each['diversity']['value']:.2f}")
    lines += [] if about["stopped"] is None else [f"stopped early. {about['stopped']}"]
    lines.append(
        "no round is kept"
        if about["best"] is None
        else f"best by {about['best_by']}: round {about['best']}, its {KEPT[about['fit']]} in {folder / 'weights'}"
    )
    return "\n".join([*lines, f"report: {folder / 'report.html'}"])
