"""A pipeline that draws under weights of objectives: what a steered run saved, put into any family's pipeline and taken out."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from flowalign import plugins
from flowalign.data.weights import shares, targets, wording
from flowalign.errors import CheckpointError, ConfigError
from flowalign.families.loading import FAILURES, digest, family_of
from flowalign.families.loras import join_lora
from flowalign.settings import Steer

STEER = "steer.safetensors"
PLACE = "_flowalign_steering"
"""Where a pipeline keeps its `Telling`."""
Rows = tuple[tuple[float, ...], ...]
"""Weights of the objectives, one row for all pictures or one a prompt; a row of zeros is none."""


class Shift(nn.Module):
    """Weights of K objectives -> what is added to every token of a prompt.

    The last layer starts at zero, so at first nothing is. Tokens put behind the prompt's would not start so: a softmax gives
    even a key of zeros a share e⁰ of its attention (docs/steer.md).
    """

    def __init__(
        self, objectives: int, width: int, hidden: int, seed: int = 0, scale: float | None = None, gain: float = 1.0
    ) -> None:
        """width: D of the prompt's tokens. scale: weights times this, less 1, are what goes in; None is K, for the simplex.
        gain: what comes out is multiplied with this.
        """
        super().__init__()
        self.scale = objectives if scale is None else scale
        self.gain = gain
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(objectives, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, width)
            )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Tokens `[B, L, D]` under weights `[B, K]`, in their own dtype; rows of zeros, which are none, change nothing.

        Computed in float32, whatever surrounds it: steps of what learns round away in bfloat16.
        """
        exact = nullcontext() if tokens.is_meta else torch.autocast(tokens.device.type, enabled=False)
        with exact:
            weights = weights.float()
            told = (weights.sum(1, keepdim=True) > 0) * self.gain
            shift = self.layers(weights * self.scale - 1) * told
            return (tokens.float() + shift[:, None]).to(tokens.dtype)


def shift_for(settings: Steer, width: int, seed: int = 0) -> Shift:
    """The network of these settings, as it is before training."""
    scale = 2.0 if settings.condition == "scores" else None
    return Shift(len(settings.objectives), width, settings.hidden, seed, scale, settings.gain)


def write_steering(settings: Steer, shift: Shift | None) -> bytes:
    """The file of a steered run: the network, where there is one, and the settings as metadata."""
    state = {} if shift is None else {name: tensor.detach().cpu().contiguous() for name, tensor in shift.state_dict().items()}
    return save(state, {"steer": settings.model_dump_json()})


class Telling(ABC):
    """What tells one pipeline something beside the prompt: a weight for each of several names."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.rows: Rows | None = None
        """What is drawn under now; None is nothing."""
        self.without_lora: Callable[[], None] | None = None
        """Takes the run's LoRA out again, if that came with it."""
        self._asked: int | None = None

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Of what it tells, and how."""

    @abstractmethod
    def said(self, prompt: str | list[str] | None) -> str | list[str] | None:
        """What is encoded instead of a prompt."""

    @abstractmethod
    def told(self, encoded: tuple[Any, ...], *, negative: bool, both: bool) -> tuple[Any, ...]:
        """What `encode_prompt` gave -> what it gives under `rows`.

        negative: it encoded the negative prompts; both: the prompts and, in second place, the negative ones.
        """

    def named(self, row: Sequence[float]) -> dict[str, float]:
        """Weights by name."""
        return {name: round(value, 6) for name, value in zip(self.names, row, strict=True)}

    def row(self, weights: Mapping[str, float] | None) -> tuple[float, ...]:
        """What a user asks for, on the simplex; None is zeros. Raises ConfigError."""
        return (0.0,) * len(self.names) if weights is None else shares(weights, self.names)

    @contextmanager
    def under(self, rows: Rows | None) -> Iterator[None]:
        """Draw under other weights for a while."""
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before

    def attach(self, pipeline: Any) -> None:
        """Stand between the pipeline and its own encoding of prompts. Negative prompts are told nothing.

        A pipeline that does not encode both prompts in one call encodes the negative one in a second.
        """
        plain = pipeline.encode_prompt
        parameters = inspect.signature(plain).parameters
        twice = "negative_prompt" not in parameters

        @wraps(plain)
        def encode(*given: Any, **named: Any) -> Any:
            negative = twice and bool(self._asked)
            self._asked = None if self._asked is None else self._asked + 1
            if self.rows is None:
                return plain(*given, **named)
            call = inspect.signature(plain).bind(*given, **named)
            if not negative:
                call.arguments["prompt"] = self.said(call.arguments.get("prompt"))
            return self.told(plain(*call.args, **call.kwargs), negative=negative, both=not twice)

        def noting(function: Callable[..., Any], asked: int | None) -> Callable[..., Any]:
            @wraps(function)
            def note(*given: Any, **named: Any) -> Any:
                self._asked = asked
                return function(*given, **named)

            return note

        pipeline.encode_prompt = encode
        if twice:  # what a call of the pipeline begins and ends with
            pipeline.check_inputs = noting(pipeline.check_inputs, 0)
            pipeline.maybe_free_model_hooks = noting(pipeline.maybe_free_model_hooks, None)
        setattr(pipeline, PLACE, self)

    def detach(self, pipeline: Any) -> None:
        """Take away what `attach` put there, and the run's LoRA if it came with it; other LoRAs stay."""
        for name in ("encode_prompt", "check_inputs", "maybe_free_model_hooks", PLACE):
            vars(pipeline).pop(name, None)
        if self.without_lora is not None:
            self.without_lora()

    def each(self, count: int) -> Rows:
        """The row of each of `count` pictures."""
        rows = self.rows or ()
        if count % len(rows):
            raise ConfigError(f"there are weights for {len(rows)} prompts, and {count} pictures; give one for each, or one.")
        return tuple(row for row in rows for _ in range(count // len(rows)))


class Steering(Telling):
    """What tells one pipeline the weights of objectives."""

    def __init__(self, settings: Steer, shift: Shift | None) -> None:
        super().__init__(settings.objectives)
        self.settings, self.shift = settings, shift

    @property
    def fingerprint(self) -> str:
        return digest(self.settings.model_dump(mode="json"), *(() if self.shift is None else (Plain(self.shift),)))

    def row(self, weights: Mapping[str, float] | None) -> tuple[float, ...]:
        if weights is not None and self.settings.condition == "scores":
            return targets(weights, self.names)
        return super().row(weights)

    def said(self, prompt: str | list[str] | None) -> str | list[str] | None:
        if self.shift is not None or prompt is None:  # None: its encoding is given
            return prompt
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        rows = self.each(len(prompts))
        said = [wording(text, self.names, row) if any(row) else text for text, row in zip(prompts, rows, strict=True)]
        return said[0] if isinstance(prompt, str) else said

    def told(self, encoded: tuple[Any, ...], *, negative: bool, both: bool) -> tuple[Any, ...]:
        if negative or self.shift is None:
            return encoded
        return (self._shifted(encoded[0]), *encoded[1:])

    def _shifted(self, tokens: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """`[B, L, D]`, or a list of `[l, D]`."""
        if isinstance(tokens, list):
            weights = torch.tensor(self.each(len(tokens)), device=tokens[0].device)
            return [self._moved(each[None], row[None])[0] for each, row in zip(tokens, weights, strict=True)]
        return self._moved(tokens, torch.tensor(self.each(len(tokens)), device=tokens.device))

    def _moved(self, tokens: Tensor, weights: Tensor) -> Tensor:
        if self.shift is None:
            return tokens
        width = self.shift.layers[-1].out_features
        if width != tokens.shape[-1]:
            raise CheckpointError(
                f"the run steers prompts with tokens of {width} numbers, and this pipeline's have {tokens.shape[-1]}; take a "
                "pipeline of the checkpoint that the run was trained on."
            )
        return self.shift.to(tokens.device)(tokens, weights)


class Plain(nn.Module):
    """For `digest`, which asks modules for their settings."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.config = module, {}


def folder_of(run: str | Path, file: str) -> Path:
    """The folder that holds a file such as `STEER`: `run/weights`, or the folder itself. Raises CheckpointError."""
    path = Path(run).expanduser()
    for folder in (path / "weights", path):
        if (folder / file).is_file():
            return folder
    section = file.partition(".")[0]
    raise CheckpointError(f"{run} holds no {file}; give the folder of a finished run with a section {section}.")


def load_steering(run: str | Path) -> Steering:
    """What a steered run saved. Raises CheckpointError."""
    path = folder_of(run, STEER) / STEER
    try:
        with safe_open(path, "pt") as file:
            settings = Steer.model_validate_json(file.metadata()["steer"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if settings.form == "prompt":
            return Steering(settings, None)
        width = state["layers.4.weight"].shape[0]
        shift = shift_for(settings, width)
        shift.load_state_dict(state)
    except (*FAILURES, ValidationError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}); copy the run's weights again.") from error
    return Steering(settings, shift.requires_grad_(False).eval())


def steering_of(pipeline: Any) -> Telling | None:
    """What `steered` or `personal` put into a pipeline."""
    found: Telling | None = vars(pipeline).get(PLACE)
    return found


def steered(pipeline: Any, run: str | Path, weights: Mapping[str, float] | None = None) -> Any:
    """Make a diffusers pipeline draw under weights of the objectives that a run was steered with; returns the pipeline.

    run: the run folder, or its weights/. The run's LoRA is applied beside those that are, and loaded unless it is there.
    weights: by name, in any scale, such as {"clip": 0.7, "style": 0.3}; an objective that is not named has weight 0; None draws
    without weights. Of a run with steer.condition scores they are target scores, from 0 to 1, of all objectives.
    Call it again for other weights, and `unsteered` to have the pipeline as it was. Raises CheckpointError and ConfigError.
    """
    return put(pipeline, folder_of(run, STEER), load_steering(run), weights)


def put(pipeline: Any, folder: Path, steering: Telling, weights: Mapping[str, float] | None) -> Any:
    """Put what was loaded from a folder of weights into a pipeline, with the folder's LoRA; returns the pipeline."""
    row = steering.row(weights)
    unsteered(pipeline)
    family = plugins.load("families", family_of(type(pipeline).__name__))
    steering.without_lora = join_lora(getattr(pipeline, family.component), folder, family.component)
    steering.rows = None if weights is None else (row,)
    steering.attach(pipeline)
    return pipeline


def unsteered(pipeline: Any) -> Any:
    """Take out what `steered` or `personal` put into a pipeline, their LoRA included and no other. Returns the pipeline."""
    steering = steering_of(pipeline)
    if steering is not None:
        steering.detach(pipeline)
    return pipeline


def rows_for(
    pipeline: Any, weights: Sequence[Mapping[str, float] | None] | None, count: int
) -> tuple[Telling | None, Rows | None]:
    """What steers a pipeline, and the weights of each of `count` pictures, by default those it draws under.

    Raises ConfigError.
    """
    steering = steering_of(pipeline)
    if weights is None:
        rows = None if steering is None or steering.rows is None else steering.rows * (count if len(steering.rows) == 1 else 1)
        return steering, rows
    if steering is None:
        named = sorted({name for each in weights for name in each or ()})
        raise ConfigError(
            f"weights of {', '.join(named) or 'objectives'} are given, and what draws knows none; take a run that was steered."
        )
    if len(weights) != count:
        raise ConfigError(f"there are weights for {len(weights)} of {count} pictures; give one for each.")
    return steering, tuple(map(steering.row, weights))
