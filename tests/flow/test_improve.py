"""A flow over pictures: untouched at strength 0, alone as together, less where pictures are strange, the same once loaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import flowalign
from flowalign import runs
from flowalign.errors import CheckpointError, ConfigError, DataError, RunError
from flowalign.families.loading import open_checkpoint
from flowalign.families.sampling import SamplerSettings, write_images
from flowalign.flow.apply import apply_folder, identity
from flowalign.flow.contexts import Nothing
from flowalign.flow.domain import Domain
from flowalign.flow.field import FieldSettings, make_field
from flowalign.flow.folders import list_pictures
from flowalign.flow.improve import CHAIN, Chain, Flow, load_flow, write_chain
from flowalign.flow.settings import Solve
from flowalign.flow.spaces import PixelSpace
from flowalign.flow.wrap import Folder, Function, Pipeline
from flowalign.runs import serving

pytestmark = pytest.mark.usefixtures("one_thread")
STILL = Solve(strength=0.0)


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """Of the votes' kind."""
    tint = ((200, 60, 40), (40, 60, 200))[seed % 2]
    pixels = np.random.default_rng(seed).normal(tint, 50, (size[1], size[0], 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def pixels(pictures: list[Image.Image]) -> list[np.ndarray]:
    return [np.asarray(each) for each in pictures]


@pytest.fixture(scope="module")
def flow(flow_run: Path) -> Flow:
    found = load_flow(flow_run)
    return replace(found, domain=None)


@pytest.mark.parametrize("size", [(16, 16), (40, 23), (64, 64), (9, 30)])
@pytest.mark.parametrize("fit", ["scale", "tile"])
def test_strength_0_changes_no_bit(flow: Flow, size: tuple[int, int], fit: str) -> None:
    given = [picture(seed, size) for seed in range(3)]
    found = replace(flow, fit=fit).apply(given, ["a thing"] * 3, solve=STILL)
    assert all((a == b).all() for a, b in zip(pixels(given), pixels(found.pictures), strict=True))
    assert found.evaluations == 0
    assert found.strength == [0, 0, 0]
    moved = replace(flow, fit=fit).apply(given, ["a thing"] * 3)
    assert all((a != b).any() for a, b in zip(pixels(given), pixels(moved.pictures), strict=True))
    assert [each.size for each in moved.pictures] == [size] * 3


def test_a_field_that_says_nothing_changes_no_bit_either(flow: Flow) -> None:
    """Through the whole way: encoded, integrated, decoded twice, added."""
    from flowalign.flow.field import make_field

    still = replace(flow, field=make_field(flow.field.settings, 0))
    given = [picture(seed, (23, 40)) for seed in range(3)]
    found = still.apply(given, ["a thing"] * 3)
    assert found.evaluations > 0
    assert all((a == b).all() for a, b in zip(pixels(given), pixels(found.pictures), strict=True))


def test_pictures_are_apart(flow: Flow) -> None:
    given, prompts = [picture(seed) for seed in range(4)], ["a thing", "b thing", "c thing", "d thing"]
    together = pixels(flow.apply(given, prompts).pictures)
    alone = [flow.apply([each], [prompt]).pictures[0] for each, prompt in zip(given, prompts, strict=True)]
    in_twos = pixels(flow.apply(given, prompts, solve=flow.solve.model_copy(update={"batch_size": 2})).pictures)
    for other in (pixels(alone), in_twos):  # the last bit of a byte, where kernels of other batch sizes round otherwise
        assert max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(together, other, strict=True)) <= 1


def test_strength_is_half_way_for_a_straight_flow(flow: Flow) -> None:
    class Constant(torch.nn.Module):
        settings = flow.field.settings

        def forward(self, s: torch.Tensor, y: torch.Tensor, context: object, dropped: object = None) -> torch.Tensor:
            return torch.full_like(y, 0.5)

    straight, z = replace(flow, field=Constant()), []  # type: ignore[arg-type]
    for strength in (0.0, 0.5, 1.0):
        seen: list[torch.Tensor] = []
        watched = replace(straight, space=Watched(flow, seen))
        watched.apply([picture(0)], ["a thing"], solve=Solve(steps=2, strength=strength))
        z.append(0.0 if not seen else float((seen[0] - seen[1]).mean()))
    assert z == pytest.approx([0, 0.25, 0.5], abs=1e-5)


class Watched:
    """A space that keeps what it decodes."""

    def __init__(self, flow: Flow, seen: list[torch.Tensor]) -> None:
        self._space, self._seen = flow.space, seen

    def encode(self, given: torch.Tensor) -> torch.Tensor:
        return self._space.encode(given)

    def residual(self, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        self._seen += [end, start]
        return self._space.residual(start, end)


def test_the_prompt_counts_and_must_be_given(flow: Flow) -> None:
    given = [picture(0)]
    told = [pixels(flow.apply(given, [prompt]).pictures)[0] for prompt in ("a thing", "zebra")]
    assert (told[0] != told[1]).any()
    with pytest.raises(DataError, match=r"one prompt for each picture"):
        flow.apply(given)
    with pytest.raises(DataError, match=r"1 pictures and 2 prompts"):
        flow.apply(given, ["a", "b"])
    assert flow.apply([], []).pictures == []


def test_strange_pictures_are_moved_less_and_it_is_said(flow_run: Path, tmp_path: Path) -> None:
    flow = load_flow(flow_run)
    assert flow.domain is not None
    width = len(flow.domain.mean)
    # The statistics of 24 tiny pictures say little: a limit that is known makes the test one of the flow and not of them.
    domain = Domain(flow.domain.mean, torch.eye(width, dtype=torch.float64), flow.domain.limit, flow.domain.spread)
    given = torch.from_numpy(np.array(picture(0))).permute(2, 0, 1)[None] / 255
    near = float(domain.distance(flow.space.encode(given))[0])
    flow = replace(flow, domain=replace(domain, limit=near * 1.2, spread=near))
    white = Image.new("RGB", (16, 16), "white")
    found = flow.apply([picture(0), white], ["a thing", "a thing"])
    assert found.words(0) is None
    assert found.strength[0] == 1 > found.strength[1] > 0
    assert f"moved with strength {found.strength[1]:.2f}" in str(found.words(1))
    half = flow.apply([white], ["a thing"], solve=flow.solve.model_copy(update={"strength": 0.5}))
    assert half.strength[0] == pytest.approx(found.strength[1] / 2)
    full = replace(flow, domain=None).apply([white], ["a thing"])
    moved = [np.abs(np.asarray(each.pictures[-1]).astype(float) - 255).mean() for each in (found, full)]
    assert moved[0] < moved[1]
    white.save(tmp_path / "white.png")
    stamps = []
    for _ in range(2):  # one that was moved less is there already, too
        rows = apply_folder(flow, tmp_path, tmp_path / "out", prompt="a thing", progress=False)
        stamps.append((tmp_path / "out" / "white.png").stat().st_mtime_ns)
    assert stamps[0] == stamps[1]
    assert rows[0]["flow"]["note"] == found.words(1)


def test_the_error_of_the_steps_is_told(flow: Flow) -> None:
    rough, fine = (
        flow.apply([picture(0)], ["a thing"], solve=Solve(solver=solver, steps=steps), diagnose=True).error
        for solver, steps in (("euler", 1), ("rk4", 8))
    )
    assert rough is not None
    assert fine is not None
    assert 0 <= fine[0] < 0.01 < rough[0]


def test_any_mode_comes_back_as_rgb_of_its_size(flow: Flow) -> None:
    clear = Image.new("RGBA", (20, 16), (0, 0, 0, 0))
    grey = Image.new("L", (16, 16), 90)
    found = flow.apply([clear, grey], ["a thing"] * 2, solve=STILL).pictures
    assert [(each.mode, each.size) for each in found] == [("RGB", (20, 16)), ("RGB", (16, 16))]
    assert (np.asarray(found[0]) == 255).all()  # what is transparent lies on white


def test_a_loaded_flow_is_the_saved_one(flow: Flow, tmp_path: Path) -> None:
    given = [picture(seed) for seed in range(2)]
    flow.save(tmp_path)
    again = load_flow(tmp_path)
    assert identity(again) == identity(flow)
    one, other = (pixels(each.apply(given, ["a", "b"]).pictures) for each in (flow, again))
    assert all((a == b).all() for a, b in zip(one, other, strict=True))
    about = json.loads((tmp_path / "field.json").read_text())
    about["flow"]["space"]["fingerprint"] = "another"
    (tmp_path / "field.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=r"the autoencoder that .* was trained with has changed"):
        load_flow(tmp_path)


def test_a_chain_goes_on_where_the_flow_before_led(flow_run: Path, tmp_path: Path) -> None:
    write_chain(tmp_path, [flow_run, flow_run])
    chain = load_flow(tmp_path)
    assert isinstance(chain, Chain)
    first, second = chain.flows
    assert first.space is second.space  # loaded once
    assert first.contexts is second.contexts
    assert len({identity(each) for each in (first, chain, Chain((first,)))}) == 3
    given, told = [picture(0), Image.new("RGB", (16, 16), "white")], ["a thing", "a thing"]
    one = first.apply(given, told)
    both, limits = [one, second.apply(one.pictures, told)], (one.limit or 0.0)
    found = chain.apply(given, told)
    assert all((a == b).all() for a, b in zip(pixels(found.pictures), pixels(both[1].pictures), strict=True))
    assert found.strength == [min(pair) for pair in zip(*(each.strength for each in both), strict=True)]
    assert found.distance == [max(pair) / limits for pair in zip(*(each.distance for each in both), strict=True)]
    assert (found.limit, found.evaluations) == (1.0, sum(each.evaluations for each in both))
    with pytest.raises(DataError, match="give one prompt for each picture"):
        chain.apply(given)


def shifting(shift: float, **solve: Any) -> Flow:
    """Moves every byte of small pictures by shift · strength."""
    field = make_field(FieldSettings((3, 8, 8), width=8, levels=1), 0)
    with torch.no_grad():
        field.net.conv_out.bias.fill_(shift / 127.5)  # the space reaches from -1 to 1
    still, plain = field.eval().requires_grad_(False), Solve(steps=1, solver="euler", **solve)
    return Flow(still, PixelSpace(), Nothing(), None, 8, "scale", plain, {}, torch.device("cpu"))


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """The folder of a chain: a flow that moves by 100 and then one that moves by a quarter of 40."""
    for name, made in (("00", shifting(100)), ("01", shifting(40, strength=0.25, iterations=2, batch_size=2))):
        (tmp_path / "two" / name).mkdir(parents=True)
        made.save(tmp_path / "two" / name)
    write_chain(tmp_path / "two", [tmp_path / "two" / name for name in ("00", "01")])
    Image.new("RGB", (8, 8), (50, 50, 50)).save(tmp_path / "grey.png")
    (tmp_path / "in").mkdir()
    for name in "abc":
        shutil.copy(tmp_path / "grey.png", tmp_path / "in" / f"{name}.png")
    return tmp_path / "two"


def byte(found: Image.Image | Path) -> int:
    return int(np.asarray(found if isinstance(found, Image.Image) else Image.open(found))[0, 0, 0])


@pytest.mark.parametrize(("strength", "value"), [(None, 50 + 100 + 20), (0.5, 50 + 50 + 40)])
def test_each_flow_of_a_chain_is_applied_in_its_own_way(two: Path, strength: float | None, value: int) -> None:
    grey, out = Image.open(two.parent / "grey.png"), two.parent / "out"
    told = {} if strength is None else {"strength": strength}
    chain = load_flow(two).with_solve(told)
    assert byte(chain.apply([grey]).pictures[0]) == value
    rows = apply_folder(chain, two.parent / "in", out, progress=False)
    assert [byte(out / name) for name in ("a.png", "b.png", "c.png")] == [value] * 3
    ways = [(each["strength"], each["iterations"]) for each in rows[0]["flow"]["solve"]]
    assert ways == [(strength or 1.0, 1), (strength or 0.25, 2)]
    assert rows[0]["flow"]["strength"] == min(each for each, _ in ways)
    runs.apply_flow(str(two), two.parent / "in", out=two.parent / "other", strength=strength, device="cpu", progress=False)
    assert byte(two.parent / "other" / "a.png") == value
    wrapped = flowalign.wrap(Function(lambda prompt, seed: grey), two)
    better = wrapped if strength is None else wrapped.with_strength(strength)
    assert byte(better(["a"], [0])[0]) == value
    (served,) = serving._improve(str(two), strength, "cpu")([grey], ["a"])
    assert byte(served) == value


def test_what_is_told_to_a_chain_counts_for_all_of_it(two: Path) -> None:
    chain, out = load_flow(two), two.parent / "out"
    wrapped = flowalign.wrap(Function(lambda prompt, seed: Image.open(two.parent / "grey.png")), two, solve=Solve(strength=0.5))
    assert byte(wrapped(["a"], [0])[0]) == 50 + 50 + 20
    with pytest.raises(ConfigError, match=r"strength cannot be 2"):
        wrapped.with_strength(2)
    apply_folder(chain, two.parent / "in", out, progress=False)
    stamp = (out / "a.png").stat().st_mtime_ns
    apply_folder(chain, two.parent / "in", out, progress=False)
    assert (out / "a.png").stat().st_mtime_ns == stamp
    first = replace(chain, flows=(chain.flows[0].with_solve({"strength": 0.1}), chain.flows[1]))  # the last is the same
    apply_folder(first, two.parent / "in", out, progress=False)
    assert byte(out / "a.png") == 50 + 10 + 20


@pytest.mark.parametrize(
    ("text", "says"), [("{", "cannot be read"), ('{"flows": []}', "names no flow"), ('{"flows": ["no"]}', "holds no field")]
)
def test_a_chain_that_is_broken_is_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / CHAIN).write_text(text)
    with pytest.raises(CheckpointError, match=says):
        load_flow(tmp_path)


def folder_of(path: Path, count: int = 3, *, table: bool = True) -> Path:
    path.mkdir()
    lines = []
    for seed in range(count):
        picture(seed).save(path / f"{seed}.png")
        lines.append(
            json.dumps({"file_name": f"{seed}.png", "prompt": f"{'abc'[seed]} thing", "seed": seed, "mine": seed}) + "\n"
        )
    if table:
        (path / "metadata.jsonl").write_text("".join(lines))
    return path


def test_a_folder_keeps_its_table_and_goes_on_where_it_was(flow: Flow, tmp_path: Path) -> None:
    source, out = folder_of(tmp_path / "in"), tmp_path / "out"
    rows = apply_folder(flow, source, out, progress=False)
    kept = [(row["file_name"], row["prompt"], row["mine"]) for row in rows]
    assert kept == [("0.png", "a thing", 0), ("1.png", "b thing", 1), ("2.png", "c thing", 2)]
    assert [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()] == rows
    alone = flow.apply([picture(1)], ["b thing"]).pictures[0]
    assert np.abs(np.asarray(Image.open(out / "1.png")).astype(int) - np.asarray(alone)).max() <= 1
    stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    (out / "0.png").unlink()
    picture(5).save(source / "2.png")
    again = apply_folder(flow, source, out, progress=False)
    now = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert now["1.png"] == stamps["1.png"]  # neither gone nor changed
    assert again[1] == rows[1]
    assert now["0.png"] > stamps["0.png"]
    assert now["2.png"] > stamps["2.png"]
    other = apply_folder(flow.with_solve({"steps": 1}), source, out, progress=False)
    assert other[1]["flow"]["evaluations"] == 2 != again[1]["flow"]["evaluations"]


def test_folders_that_cannot_be_used_are_one_sentence(flow: Flow, tmp_path: Path) -> None:
    bare = folder_of(tmp_path / "bare", table=False)
    with pytest.raises(DataError, match=r"nothing says it of .*0.png"):
        apply_folder(flow, bare, tmp_path / "out", progress=False)
    assert len(apply_folder(flow, bare, tmp_path / "out", prompt="a thing", progress=False)) == 3
    with pytest.raises(ConfigError, match=r"the folder that pictures are read from"):
        apply_folder(flow, bare, bare, prompt="a thing", progress=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no metadata.jsonl and no pictures"):
        list_pictures(tmp_path / "empty")
    (bare / "metadata.jsonl").write_text('{"file_name": "../x.png"}\n')
    with pytest.raises(DataError, match=r"line 1 names '../x.png'"):
        list_pictures(bare)
    (bare / "metadata.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(DataError, match=r"line 1 is no JSON object with a file_name"):
        list_pictures(bare)
    (bare / "metadata.jsonl").write_text('{"file_name": "0.png", "prompt": "x"}\n{"file_name": "0.jpg", "prompt": "x"}\n')
    picture(0).save(bare / "0.jpg")
    with pytest.raises(DataError, match=r"two pictures would be written as '0.png'"):
        apply_folder(flow, bare, tmp_path / "out", progress=False)


def test_a_wrapped_generator_is_a_generator(flow: Flow, flow_run: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    prompts, seeds = ["a thing", "b thing"], [3, 4]
    function = Function(lambda prompt, seed: picture(seed))
    wrapped = flowalign.wrap(function, flow)
    found = wrapped(prompts, seeds)
    known = flow.apply([picture(3), picture(4)], prompts).pictures
    assert all((a == b).all() for a, b in zip(pixels(found), pixels(known), strict=True))
    same = wrapped.with_strength(0)(prompts, seeds)
    assert all((a == b).all() for a, b in zip(pixels(same), pixels(function(prompts, seeds)), strict=True))
    assert len(flowalign.wrap(wrapped, flow_run, solve=STILL)(prompts, seeds)) == 2  # a run folder is enough
    with pytest.raises(RunError, match=r"gave 1 pictures for 2 prompts"):
        flowalign.wrap(lambda prompts, seeds: [picture(0)], flow)(prompts, seeds)

    pipeline = open_checkpoint(folders["epsilon"])
    settings = SamplerSettings(steps=1, guidance=1.0)
    write_images(tmp_path / "drawn", pipeline, prompts, seeds, settings, progress=False)
    drawn, read = Pipeline(pipeline, settings)(prompts, seeds), Folder(tmp_path / "drawn")(prompts, seeds)
    assert all((a == b).all() for a, b in zip(pixels(drawn), pixels(read), strict=True))
    with pytest.raises(DataError, match=r"no picture of prompt 'c thing' with seed 3"):
        Folder(tmp_path / "drawn")(["c thing"], [3])
