"""The verb that serves: puts a generator, an upstream, a flow and rewards behind HTTP."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowalign.errors import ConfigError, MissingExtraError
from flowalign.parent import end_with

if TYPE_CHECKING:
    from flowalign.scoring.rewards.base import Reward
    from flowalign.serve.app import Generating
    from flowalign.serve.improver import Improve

KEY, UPSTREAM_KEY = "FLOWALIGN_API_KEY", "FLOWALIGN_UPSTREAM_KEY"
"""Environment variables: arguments of a command can be read by every user of a machine."""


def serve(
    *,
    generator: str | None = None,
    upstream: str | None = None,
    flow: str | None = None,
    strength: float | None = None,
    rewards: Sequence[str | Mapping[str, Any]] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    upstream_key: str | None = None,
    parent: int | None = None,
    allow_public: bool = False,
    public_url: str | None = None,
    url_hosts: Sequence[str] = (),
    model_names: Sequence[str] = (),
    steps: int = 25,
    guidance: float = 5.0,
    sampler: str = "default",
    precision: str = "fp32",
    device: str = "auto",
    limits: Mapping[str, Any] | None = None,
    log_level: str = "info",
) -> dict[str, Any]:
    """Serve until SIGINT or SIGTERM; requests in work are finished first.

    generator: a checkpoint to draw with; upstream: an images API to stand in front of, up to and with /v1; one of them, or
    rewards alone, see `scoring.loading.load_rewards`. flow: a run folder, and strength how far it moves pictures. api_key,
    upstream_key: by default from FLOWALIGN_API_KEY and FLOWALIGN_UPSTREAM_KEY. parent: the process that started this one, with
    which it ends. limits: values of `serve.limits.Limits` other than its own. Raises ConfigError, CheckpointError and
    MissingExtraError.
    """
    try:
        from flowalign.serve import access as accesses
        from flowalign.serve import app, process
        from flowalign.serve.limits import Limits
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), "serve", "flowalign serve") from error

    if parent is not None:
        end_with(parent)
    _check_parts(generator, upstream, flow, strength, rewards)
    key = os.environ.get(KEY) or None if api_key is None else api_key
    other = os.environ.get(UPSTREAM_KEY) or None if upstream_key is None else upstream_key
    accesses.check_bind(host, key, allow_public=allow_public)
    access = accesses.Access(
        key,
        bearer=upstream is None or other is not None,
        hosts=accesses.own_hosts(host, public_url, allow_public=allow_public),
    )
    bounds = Limits(**limits or {})
    listening = process.listen(host, port)  # before models are loaded: what is taken is said at once
    try:
        source: Generating | app.Proxying | None = None
        if upstream is not None:
            source = app.Proxying(upstream, tuple(url_hosts), other)
        elif generator is not None:
            source = _generating(
                generator,
                model_names,
                bounds.batch,
                device,
                steps=steps,
                guidance=guidance,
                sampler=sampler,
                precision=precision,
            )
        service = app.make_service(
            source,
            improve=None if flow is None else _improve(flow, strength, device),
            rewards=_rewards(rewards, device, precision) if rewards else (),
            limits=bounds,
            access=access,
            public_url=public_url,
        )
        what = (upstream and f"in front of {upstream}") or generator or f"scores by {', '.join(map(str, rewards))}"
        address = process.address(listening)
        print(f"serving {what} on {address}", flush=True)
        answered = process.serve(service, listening, level=log_level)
    finally:
        listening.close()
    return {"address": address, "requests": answered, "summary": f"{answered} requests answered"}


def _check_parts(
    generator: str | None, upstream: str | None, flow: str | None, strength: float | None, rewards: Sequence[Any]
) -> None:
    """Raises ConfigError for parts that make no server."""
    if strength is not None and (flow is None or not 0 <= strength <= 1):
        raise ConfigError(f"--strength is {strength:g}; it goes with --flow RUN and must be from 0 to 1.")
    if generator is not None and upstream is not None:
        raise ConfigError("--generator and --upstream are two ways to get pictures; give one of them.")
    if generator is None and upstream is None:
        if flow is not None:
            raise ConfigError(f"--flow {flow} has nothing to move; add --upstream URL or --generator CHECKPOINT.")
        if not rewards:
            raise ConfigError("there is nothing to serve; give --generator CHECKPOINT, --upstream URL or --rewards NAME.")


def _generating(
    checkpoint: str,
    names: Sequence[str],
    batch: int,
    device: str,
    *,
    steps: int,
    guidance: float,
    sampler: str,
    precision: str,
) -> Generating:
    from flowalign.device import choose_device
    from flowalign.families.loading import open_checkpoint
    from flowalign.families.sampling import PRECISIONS, SamplerSettings
    from flowalign.serve.app import Generating
    from flowalign.serve.checkpoint import CheckpointGenerator

    settings = SamplerSettings(sampler=sampler, steps=steps, guidance=guidance, precision=precision)
    pipeline = open_checkpoint(checkpoint, dtype=PRECISIONS[precision], device=choose_device(device))
    return Generating(CheckpointGenerator(pipeline, settings, batch), tuple(names) or (Path(checkpoint).name or checkpoint,))


def _improve(run: str, strength: float | None, device: str) -> Improve:
    from flowalign.device import choose_device
    from flowalign.flow.improve import load_flow

    flow = load_flow(run, device=choose_device(device))
    moving = flow if strength is None else flow.with_solve({"strength": strength})
    return lambda images, prompts: moving.apply(images, prompts).pictures


def _rewards(specs: Sequence[str | Mapping[str, Any]], device: str, precision: str) -> list[Reward]:
    from flowalign.device import choose_device
    from flowalign.families.sampling import PRECISIONS
    from flowalign.scoring.loading import load_rewards
    from flowalign.scoring.rewards.base import Shelf

    return load_rewards(specs, Shelf(choose_device(device), PRECISIONS[precision]))
