"""A flow over a whole folder of pictures, into another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flowalign.errors import ConfigError, DataError
from flowalign.files import atomic, text_lines, write_text
from flowalign.flow.folders import TABLE, Listed, list_pictures
from flowalign.flow.improve import Chain, Flow
from flowalign.rng import key


def apply_folder(
    flow: Flow | Chain,
    source: str | Path,
    out: Path,
    *,
    prompt: str | None = None,
    diagnose: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Write every picture of `source` after the flow, as PNG of the same name, with a `metadata.jsonl` beside.

    A row keeps what the source's table says and adds `flow`: its identity, `solve` of it or of each of a chain, `strength`,
    `distance`, `limit` and `evaluations`, and `error` where `diagnose` asks for it. prompt: of pictures whose table names none.
    A picture that is there already, made from the same bytes in the same way, is left alone, so that a killed call goes on
    where it was. Returns the rows, in the source's order. Raises DataError and RunError.
    """
    if out.resolve() == Path(source).resolve():
        raise ConfigError(f"{out} is the folder that pictures are read from; give another one to write to.")
    name = identity(flow)
    ways = [solve.model_dump(mode="json", exclude={"batch_size"}) for solve in flow.solves]
    how = {"of": name, "solve": ways, "diagnose": diagnose}
    pictures = list_pictures(source)
    names = _names(pictures)
    prompts = [_prompt(flow, picture, prompt) for picture in pictures]
    known = _known(out)
    rows: dict[str, dict[str, Any]] = {}
    missing: list[int] = []
    for place, picture in enumerate(pictures):
        # The picture's own bytes count, and not its name alone: it may have been drawn again.
        made = how | {"picture": hashlib.sha256(picture.path.read_bytes()).hexdigest()[:16]}
        rows[names[place]] = {**picture.row, "file_name": names[place], "flow": made}
        if "generator" in picture.row:
            rows[names[place]]["generator"] = f"{picture.row['generator']} + flow {name}"
        if prompts[place] is not None:
            rows[names[place]]["prompt"] = prompts[place]
        before = known.get(names[place])
        if before is not None and (out / names[place]).is_file() and _same(before, rows[names[place]]):
            rows[names[place]] = before
        else:
            missing.append(place)
    done = {name: row for name, row in rows.items() if name not in {names[place] for place in missing}}
    _write(out, done, names)  # the table never describes a picture that it does not fit
    size = max(solve.batch_size for solve in flow.solves)
    with tqdm(total=len(missing), desc="applying the flow", unit="picture", disable=not progress) as bar:
        for start in range(0, len(missing), size):
            places = missing[start : start + size]
            told = [str(prompts[place]) for place in places] if flow.reads_prompts else None
            found = flow.apply([pictures[place].read() for place in places], told, diagnose=diagnose)
            for number, place in enumerate(places):
                row = rows[names[place]]
                row["flow"] |= {
                    "strength": found.strength[number],
                    "distance": found.distance[number],
                    "limit": found.limit,
                    "evaluations": found.evaluations,
                }
                if found.error is not None:
                    row["flow"]["error"] = found.error[number]
                if (words := found.words(number)) is not None:
                    row["flow"]["note"] = words
                with atomic(out / names[place]) as temporary:
                    found.pictures[number].save(temporary, format="PNG")
                done[names[place]] = row
            _write(out, done, names)
            bar.update(len(places))
    return [rows[name] for name in names]


def identity(flow: Flow | Chain) -> str:
    """12 hex digits over all that decides what a flow does to a picture, but for how it is solved."""
    if isinstance(flow, Chain):
        return f"{key(*map(identity, flow.flows)):016x}"[:12]
    weights = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(flow.field.state_dict().items()):
        weights.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    guard = "none" if flow.domain is None else f"{flow.domain.limit!r} {flow.domain.spread!r}"
    parts = (weights.hexdigest(), flow.space.fingerprint, flow.contexts.fingerprint, flow.resolution, flow.fit, guard)
    return f"{key(*parts):016x}"[:12]


def _names(pictures: Sequence[Listed]) -> list[str]:
    """What each is called after the flow. Raises DataError where two would be called alike."""
    names = [f"{Path(picture.file_name).with_suffix('')}.png" for picture in pictures]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"two pictures would be written as {twice!r}; give them names that differ before the ending.")
    return names


def _prompt(flow: Flow | Chain, picture: Listed, given: str | None) -> str | None:
    prompt = picture.prompt or given
    if prompt is None and flow.reads_prompts:
        raise DataError(
            f"this flow is told what a picture shows, and nothing says it of {picture.path}; add a {TABLE} with file_name and "
            "prompt, or give one for all with --prompt."
        )
    return prompt


def _known(out: Path) -> dict[str, dict[str, Any]]:
    """The rows of an earlier call."""
    if not (out / TABLE).is_file():
        return {}
    try:
        rows = [json.loads(line) for line in text_lines(out / TABLE) if line.strip()]
        return {row["file_name"]: row for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{out / TABLE} is not a table of pictures ({error}); move it away or give another folder.") from error


def _same(before: dict[str, Any], wanted: dict[str, Any]) -> bool:
    flow = before.get("flow")
    same = isinstance(flow, dict) and all(flow.get(name) == value for name, value in wanted["flow"].items())
    return same and all(before.get(name) == value for name, value in wanted.items() if name != "flow")


def _write(out: Path, rows: dict[str, dict[str, Any]], names: Sequence[str]) -> None:
    lines = [json.dumps(rows[name], ensure_ascii=False) + "\n" for name in names if name in rows]
    write_text(out / TABLE, "".join(lines))
