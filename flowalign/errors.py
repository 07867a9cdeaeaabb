"""The exception tree. Whatever a user can get wrong is one of these, and its message is one sentence.

FlowalignError                 anything flowalign reports on purpose
├── UserError        exit 2    the input is wrong: says the value, what is allowed, and the next step
│   ├── ConfigError            a configuration file or a --set override
│   ├── DataError              comparisons, pictures, prompts
│   │   └── NoneUsableError    not one of the comparisons that were asked for can be used
│   ├── CheckpointError        a model, a run folder, saved state
│   └── MissingExtraError      an optional package that this feature needs
└── RunError         exit 1    the input was fine and the run failed
    ├── SelfTestError          training would start from a wrong loss
    ├── NonFiniteError         a loss or gradient became NaN or infinite
    ├── CollapseError          the guard ended the run
    └── PeerError              another process of the run is gone
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any


class FlowalignError(Exception):
    """Base of all errors raised on purpose; `str()` of it is shown to the user as it is."""

    exit_code = 1


class UserError(FlowalignError):
    """Bad input."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration value or key that cannot be used."""


class DataError(UserError):
    """A data source, row or picture that cannot be used."""


class NoneUsableError(DataError):
    """Not one of the comparisons that were asked for can be used."""

    def __init__(self, bad: Sequence[Any]) -> None:
        """bad: all of them, each with a `reason`."""
        first = f"; the first reason: {bad[0].reason}" if bad else ""
        super().__init__(f"none of the {len(bad)} comparisons can be used{first}")
        self.bad = tuple(bad)


class CheckpointError(UserError):
    """A checkpoint, run folder or saved state that cannot be used."""


class MissingExtraError(UserError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed; run pip install 'flowalign[{extra}]'."
        )


class RunError(FlowalignError):
    """A run that failed although its input was fine."""


class SelfTestError(RunError):
    """The start-up self-test found a loss or margin that is not what the formula gives at policy = reference."""


class NonFiniteError(RunError):
    """A loss or gradient became NaN or infinite."""


class CollapseError(RunError):
    """The guard ended the run, see docs/guard.md."""


class PeerError(RunError):
    """Another process of the same run ended or stopped answering."""


def allowed(value: object, choices: Iterable[str]) -> str:
    """The middle of an error sentence: what may be written instead of `value`, nearest first when one is near."""
    names = sorted(choices)
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}allowed: {', '.join(names)}"


def reason(error: BaseException) -> str:
    """The first line of an error of another library, fit for the middle of a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.split(r"\.(?:\s|$)", lines[0])[0][:300]
