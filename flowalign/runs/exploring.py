"""The verb that shows what a steered run draws under any weights or for any scores, on a page of this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from flowalign.errors import MissingExtraError

HOST = "127.0.0.1"
"""The page has no key, so nobody else can reach it."""


def explore(
    run: str,
    *,
    prompt: str | None = None,
    port: int = 8000,
    steps: int = 25,
    guidance: float = 5.0,
    batch_size: int = 8,
    sampler: str = "default",
    precision: str = "fp32",
    device: str = "auto",
    log_level: str = "info",
) -> dict[str, Any]:
    """Serve a page with a slider for each objective of a steered run until SIGINT or SIGTERM, on this machine only.

    prompt: that the page begins with; None takes one that the run drew. port: 0 takes a free one. Raises CheckpointError for a
    run that was not steered, ConfigError and MissingExtraError.
    """
    try:
        from flowalign.serve import access as accesses
        from flowalign.serve import explore as exploring
        from flowalign.serve import process
        from flowalign.serve.limits import Limits
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), "serve", "flowalign explore") from error
    from flowalign.device import choose_device
    from flowalign.families.loading import open_checkpoint
    from flowalign.families.sampling import PRECISIONS, SamplerSettings, sample
    from flowalign.families.steer import load_steering, steered

    steer = load_steering(run).settings
    settings = SamplerSettings(sampler=sampler, steps=steps, guidance=guidance, precision=precision)
    listening = process.listen(HOST, port)  # before models are loaded: what is taken is said at once
    try:
        pipeline = steered(open_checkpoint(run, dtype=PRECISIONS[precision], device=choose_device(device)), run)

        def draw(
            prompts: Sequence[str], seeds: Sequence[int], weights: Sequence[Mapping[str, float] | None]
        ) -> list[Image.Image]:
            found = sample(pipeline, prompts, seeds, settings, weights=weights, batch_size=batch_size, progress=False)
            return [picture.convert("RGB") for _, picture in found]

        first = _first_prompt(Path(run)) if prompt is None else prompt
        about = exploring.Explored(Path(run).resolve().name, steer.objectives, first, steer.condition)
        access = accesses.Access(hosts=accesses.own_hosts(HOST, None, allow_public=False))
        service = exploring.make_explorer(about, draw, access, Limits(batch=batch_size))
        address = process.address(listening)
        print(f"serving {run} on {address}", flush=True)
        answered = process.serve(service, listening, level=log_level)
    finally:
        listening.close()
    return {"address": address, "requests": answered, "summary": f"{answered} requests answered"}


def _first_prompt(run: Path) -> str:
    from flowalign.report.pictures import read_samples

    samples = read_samples(run)
    return samples[0][1][0].prompt if samples else ""
