"""The verb that takes a new user into a run with users."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowalign import config as configuration
from flowalign.errors import CheckpointError, ConfigError
from flowalign.runs.folders import check_no_loop, fresh
from flowalign.runs.training import align
from flowalign.train.rundir import RunDir


def adapt(
    run: str | Path,
    pairs: str,
    user: str,
    out: str | Path,
    *,
    steps: int = 60,
    learning_rate: float = 0.05,
    overrides: Sequence[str] = (),
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Learn the embedding of one more user from a few comparisons, everything else of the run as it is (PPD, 2501.06655).

    The embedding starts as the mean of those of the known users and is trained as they were, against the model without any,
    at a constant rate and without an average of the weights: in so few steps that would stay where it started.
    pairs: comparisons that the user judged. out: a run folder that knows this user besides those of `run`. overrides: settings,
    as "a.b=c". resume: go on with what an earlier call left in `out`. Returns what `align` does. Raises ConfigError and
    CheckpointError.
    """
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"{run} is not a run folder: it holds no config.yaml; give the folder of a run with users.")
    check_no_loop(Path(run))
    known = configuration.load(path, [])
    if known.users is None:
        raise ConfigError(f"{run} was trained without a section users, so nobody can be taken in; give a run with one.")
    settings = {
        "data.train": pairs,
        "data.validation": None,
        "data.held_out": 0.0,
        "data.limit": None,
        "data.format": "auto",  # another file than those of the run, which say in their own way who judged
        "data.split": "train",
        "data.columns": {name: own for name, own in known.data.columns.items() if name != "annotator"},
        "users": {"tokens": known.users.tokens, "dropout": 0.0, "known": str(run), "new": user},
        "trainable.kind": "none",
        "trainable.start": None,  # what came of it is in the known run's own weights
        "train.steps": steps,
        "train.learning_rate": learning_rate,
        "train.batch_size": min(known.train.batch_size, 4),
        "train.warmup_steps": 0,
        "train.schedule": "constant",
        "train.ema": None,
        "train.weight_decay": 0.0,
        "train.caption_dropout": 0.0,
        "output": str(out),
    }
    if known.trainable.kind == "full":  # the model that was learned, not the one that it began as
        settings |= {"model.checkpoint": str(Path(run) / "weights"), "model.revision": None, "model.variant": None}
    given = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    adapting = configuration.load(path, [*given, *overrides])
    fresh(RunDir(Path(adapting.output)), resume, adapting.train.steps, flag="--out")
    return align(adapting, resume=resume, progress=progress)
