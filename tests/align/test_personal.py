"""A policy that knows its users: who is told, what learns, is saved, resumed, taken in and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file

import flowalign
from flowalign import runs
from flowalign.align.checks import check
from flowalign.align.personal import Personal
from flowalign.config import load, parse
from flowalign.data.pairs import PairStream, fixed_draws
from flowalign.device import make_accelerator
from flowalign.errors import CheckpointError, ConfigError
from flowalign.families.base import CONTEXT
from flowalign.families.loading import USERS, open_checkpoint
from flowalign.families.sampling import SamplerSettings, sample
from flowalign.families.steer import steering_of
from flowalign.rng import Keyed
from flowalign.settings import Config
from flowalign.setup import Prepared, load_objective, prepare
from flowalign.train.trainable import trained
from tests.report.test_card import drawn_by_the_card

Make = Callable[..., Prepared]
USED = ("users={tokens: 2}", "trainable.kind=none")


@pytest.fixture(scope="module")
def tastes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A red and a blue picture of 16 things to train on and 8 held out; ann prefers red, bob blue, and eve as ann."""
    folder, rng = tmp_path_factory.mktemp("tastes"), np.random.default_rng(0)
    lines: dict[str, list[str]] = {"train": [], "held": [], "eve": []}
    for place in range(24):
        for name, tint in (("red", (225, 30, 30)), ("blue", (30, 30, 225))):
            pixels = rng.normal(np.array(tint) + rng.normal(0, 25, 3), 8, (32, 32, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{place}-{name}.png")
        for who in ("ann", "bob", "eve"):
            better, worse = ("blue", "red") if who == "bob" else ("red", "blue")
            row = {"prompt": f"{'abcdef'[place % 6]} thing", "annotator": who}
            row |= {"chosen": f"{place}-{better}.png", "rejected": f"{place}-{worse}.png"}
            part = "held" if place >= 16 and who != "eve" else "train" if who != "eve" else "eve" if place < 4 else ""
            lines.setdefault(part, []).append(json.dumps(row) + "\n")
    paths = {name: folder / f"{name}.jsonl" for name in ("train", "held", "eve")}
    for name, path in paths.items():
        path.write_text("".join(lines[name]))
    return paths


@pytest.fixture
def data(tastes: dict[str, Path]) -> tuple[str, ...]:
    return (f"data={{train: {tastes['train']}, validation: {tastes['held']}, resolution: 16}}",)


@pytest.mark.parametrize("kind", ["none", "lora", "full"])
def test_at_the_start_policy_and_reference_agree_to_the_last_bit(prepared: Make, data: Any, kind: str) -> None:
    ready = prepared(USED[0], *data, f"trainable.kind={kind}")
    assert isinstance(ready.policy, Personal)
    assert ready.train.users == ("ann", "bob")
    with torch.no_grad():
        terms = ready.step.terms(ready.first_batch(), Keyed(0))
    assert terms.reference_error is not None
    assert torch.equal(terms.policy_error, terms.reference_error)
    assert ready.at_start.self_test(ready.first_batch(), Keyed(0)) == 0.0


def test_a_batch_says_who_judged_unless_that_is_dropped(prepared: Make, data: Any) -> None:
    ready = prepared(*USED, *data)
    stream = PairStream(ready.train, 5, batch_size=8, caption_dropout=0.2, weights_dropout=0.3)
    items = [item for group in islice(stream._items(), 20) for item in group]
    batch = ready.train.__getitems__(items)
    names = [json.loads(line)["annotator"] for line in Path(ready.config.data.train).read_text().splitlines()]
    for row, item in enumerate(items):
        who = names[ready.train.cached.indices[item.place]]
        nobody = item.drop or item.bare
        assert batch.objective_weights is not None
        assert batch.objective_weights[row].tolist() == ([0.0, 0.0] if nobody else [float(who == "ann"), float(who == "bob")])
    assert 0.3 < np.mean([item.drop or item.bare for item in items]) < 0.6


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_embeddings_and_projections_learn_and_adapters_where_asked(prepared: Make, data: Any, kind: str) -> None:
    ready = prepared(USED[0], *data, f"trainable.kind={kind}", "train.caption_dropout=0", "users.dropout=0")
    names = trained(ready.policy)
    for _ in range(2):  # at the first step what is read is zero, and only what it is read by has a gradient
        ready.optimizer.zero_grad()
        ready.step(ready.first_batch(), Keyed(0))[0].mean().backward()
        ready.optimizer.step()
    own = {name for name in names if name.startswith("shift.")}
    assert own == {"shift.embeddings"} | {f"shift.readings.{n}.{each}.weight" for n in range(4) for each in ("to_k", "to_v")}
    assert all(names[name].grad is not None and names[name].grad.abs().max() > 0 for name in own)
    assert {name for name in names if "lora" in name} == names.keys() - own
    assert (names.keys() == own) == (kind == "none")


@pytest.mark.parametrize("how", ["train.backward=chunked", "trainable.gradient_checkpointing=true"])
def test_gradients_do_not_depend_on_what_is_computed_again(prepared: Make, data: Any, how: str) -> None:
    found = []
    for more in ((), (how, "train.chunk=2")):
        ready = prepared(*USED, *data, "train.batch_size=4", *more)
        with torch.no_grad():
            for reading in ready.policy.shift.readings:
                reading.to_v.weight.normal_(generator=torch.Generator().manual_seed(3))
        ready.policy.train()
        ready.step(ready.first_batch(), Keyed(0))[0].mean().backward()
        found.append([parameter.grad for parameter in trained(ready.policy).values()])
    for plain, other in zip(*found, strict=True):
        assert (plain - other).norm() <= 1e-3 * plain.norm()


FAST = (
    "objective.beta=100.0",
    "train.steps=30",
    "train.learning_rate=2e-2",
    "train.batch_size=8",
    "train.caption_dropout=0",
    "train.timestep_range=[0.2, 0.7]",
)


@pytest.fixture(scope="module")
def run(settings: Any, tastes: dict[str, Path], clear: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that trained on ann's and bob's votes, over a frozen denoiser."""
    folder = tmp_path_factory.mktemp("learn") / "run"
    data = f"data={{train: {tastes['train']}, validation: {tastes['held']}, resolution: 16}}"
    runs.align(settings(folder, *USED, f"model.checkpoint={clear}", data, *FAST), progress=False)
    return folder


def margins(run: Path, held: Path, shares: dict[str, float], who: str, draws: int = 4) -> torch.Tensor:
    """Δ of the held-out pairs of one user, read under shares of users, by the exported weights in a plain pipeline."""
    config = load(run / "config.yaml", ["users=null", "trainable.kind=lora", f"data.validation={held}"])
    ready = prepare(config, make_accelerator(config, run), progress=False)
    step, family = ready.step.on_held_out(), ready.family
    pipeline = flowalign.personal(open_checkpoint(config.model.checkpoint), run, shares)
    assert ready.held_out is not None
    telling, count = pipeline._flowalign_steering, len(ready.held_out)
    lines = (json.loads(line) for line in held.read_text().splitlines())
    mine, total = torch.tensor([line["annotator"] == who for line in lines]), torch.zeros(count)
    with torch.no_grad():
        for draw in range(draws):
            (batch,) = fixed_draws(ready.held_out, count, draws, draw)
            x_t, target, t = step.noised(batch, Keyed(1))
            told = step.told(batch)
            (tokens,) = telling.told((told.tensors[CONTEXT],), negative=False, both=False)
            base, ours = (
                (family.predict(denoiser, x_t, t, each) - target).square().flatten(1).mean(1).view(count, 2)
                for denoiser, each in ((family.denoiser, told), (pipeline.unet, told.joined(CONTEXT, tokens)))
            )
            h = 0.5 * (base - ours)
            total += h[:, 0] - h[:, 1]
    return total[mine]


def test_users_of_opposite_tastes_are_each_served(run: Path, tastes: dict[str, Path]) -> None:
    for who, other in (("ann", "bob"), ("bob", "ann")):
        assert (margins(run, tastes["held"], {who: 1.0}, who) > 0).all()
        assert (margins(run, tastes["held"], {other: 1.0}, who) < 0).all()  # with swapped names everything is wrong
    between = [margins(run, tastes["held"], {"ann": 1 - share, "bob": share}, "ann").mean().item() for share in (0.0, 0.5, 1.0)]
    assert between[0] > between[1] > between[2]


@pytest.mark.slow
def test_in_the_embedded_world_one_user_gets_fluent_and_one_noto(emoji: Path, tmp_path: Path) -> None:
    for part, count in (("train", 200), ("held_out", 24)):
        rows = []
        for who, labels in (("ann", "fluent_over_noto"), ("bob", "noto_over_fluent")):
            lines = (emoji / "preferences" / f"{labels}-{part}.jsonl").read_text().splitlines()[:count]
            for row in map(json.loads, lines):
                sides = {side: str(emoji) + row[side].removeprefix("..") for side in ("chosen", "rejected")}
                rows.append(json.dumps({"prompt": row["prompt"], "annotator": who} | sides) + "\n")
        (tmp_path / f"{part}.jsonl").write_text("".join(rows))
    data = {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "held_out.jsonl")}
    train = {"steps": 20, "learning_rate": 1e-3, "batch_size": 16, "warmup_steps": 5, "validation_draws": 1}
    tree = {"model": {"checkpoint": str(emoji / "tiny-sd")}, "data": data, "objective": {"beta": 800.0}, "train": train}
    tree |= {"users": {}, "trainable": {"kind": "none"}, "sample": {"count": 1, "steps": 1}, "output": str(tmp_path / "run")}
    runs.align(parse(tree), progress=False)
    for who, other in (("ann", "bob"), ("bob", "ann")):
        held = tmp_path / "held_out.jsonl"
        assert margins(tmp_path / "run", held, {who: 1.0}, who, draws=2).mean() > 0
        assert margins(tmp_path / "run", held, {other: 1.0}, who, draws=2).mean() < 0


def test_a_run_is_drawn_for_its_users_and_for_nobody_as_the_base(run: Path, tmp_path: Path, clear: Path) -> None:
    assert not list(run.glob("weights/*lora*"))
    drawn = {}
    for name, user in {"nobody": None, "ann": {"ann": 1.0}, "bob": {"bob": 2.0}, "end": {"ann": 1.0, "bob": 0.0}}.items():
        found = runs.generate(str(run), ["a thing"], out=tmp_path / name, steps=2, user=user, progress=False)
        assert found["pictures"] == 1
        drawn[name] = (tmp_path / name / "00000-0.png").read_bytes()
    runs.generate(str(clear), ["a thing"], out=tmp_path / "base", steps=2, progress=False)
    assert drawn["nobody"] == (tmp_path / "base" / "00000-0.png").read_bytes()
    assert drawn["end"] == drawn["ann"]
    assert len({drawn["nobody"], drawn["ann"], drawn["bob"]}) == 3
    row = json.loads((tmp_path / "bob" / "metadata.jsonl").read_text())
    assert row["weights"] == {"bob": 1.0}
    with pytest.raises(ConfigError, match="both given"):
        runs.generate(str(run), ["a thing"], out=tmp_path / "x", user={"ann": 1.0}, weights={"ann": 1.0}, progress=False)


def test_a_pipeline_draws_what_the_policy_would(run: Path) -> None:
    config = load(run / "config.yaml", [])
    ready = prepare(config, make_accelerator(config, run), progress=False)
    ready.policy.shift.load_state_dict(load_file(run / "weights" / USERS))
    pipeline = flowalign.personal(open_checkpoint(config.model.checkpoint), run, "bob")
    told = ready.family.encode_prompts(["a thing"])
    x_t, t = torch.randn(1, 4, 8, 8), torch.tensor([0.5])
    given = told.joined("objective_weights", torch.tensor([[0.0, 1.0]]))
    telling = pipeline._flowalign_steering
    (tokens,) = telling.told((told.tensors[CONTEXT],), negative=False, both=False)
    with torch.no_grad():
        ours = ready.policy(ready.family, x_t, t, given)
        theirs = ready.family.predict(pipeline.unet, x_t, t, told.joined(CONTEXT, tokens))
    assert torch.equal(ours, theirs)


def test_one_more_user_is_taken_in_and_nothing_else_changes(run: Path, tastes: dict[str, Path], tmp_path: Path) -> None:
    found = runs.adapt(run, str(tastes["eve"]), "eve", tmp_path / "run2", steps=12, learning_rate=0.2, progress=False)
    assert found["finished"]
    before, after = (load_file(folder / "weights" / USERS) for folder in (run, tmp_path / "run2"))
    assert before.keys() == after.keys()
    assert torch.equal(after["embeddings"][:2], before["embeddings"])
    assert all(torch.equal(before[name], after[name]) for name in before if name != "embeddings")
    moved = (after["embeddings"][2] - before["embeddings"].mean(0)).abs()
    assert 0 < moved.max() <= 12 * 0.2 + 1e-4  # steps of AdamW
    last = margins(tmp_path / "run2", tastes["held"], {"eve": 1.0}, "ann")
    assert (last > 0).float().mean() >= 0.75  # eve has ann's taste
    assert last.mean() > margins(run, tastes["held"], {"ann": 0.5, "bob": 0.5}, "ann").mean()
    again = runs.adapt(tmp_path / "run2", str(tastes["eve"]), "dan", tmp_path / "run3", steps=1, progress=False)
    assert again["finished"]
    assert load_file(tmp_path / "run3" / "weights" / USERS)["embeddings"].shape[0] == 4
    drawing = {"steps": 1, "out": tmp_path / "x", "progress": False}
    with pytest.raises(ConfigError, match="the user 'nobody' is not known to the run; allowed: ann, bob, eve"):
        runs.generate(str(tmp_path / "run2"), ["a"], user={"nobody": 1.0}, **drawing)
    with pytest.raises(ConfigError, match="knows"):
        runs.adapt(run, str(tastes["eve"]), "ann", tmp_path / "run4", progress=False)


def test_a_new_users_file_need_not_be_like_those_of_the_run(
    settings: Callable[..., Config], tastes: dict[str, Path], tmp_path: Path
) -> None:
    """All of it counts as the new user's, so no column has to say so, and it may lie in another kind of file."""
    rows = [json.loads(line) for line in tastes["train"].read_text().splitlines()]
    pictures = {side: [str(tastes["train"].parent / row[side]) for row in rows] for side in ("chosen", "rejected")}
    named = {"caption": [row["prompt"] for row in rows], "user_id": [row["annotator"] for row in rows], **pictures}
    Dataset.from_dict(named).to_parquet(tmp_path / "train.parquet")
    given = f"data={{train: {tmp_path / 'train.parquet'}, held_out: 0.2, resolution: 16, format: parquet}}"
    columns = "data.columns={annotator: user_id, prompt: caption}"
    runs.align(settings(tmp_path / "run", *USED, given, columns, "train.steps=1"), progress=False)
    four = [{"caption": named["caption"][place], **{side: pictures[side][place] for side in pictures}} for place in range(4)]
    (tmp_path / "four.jsonl").write_text("".join(json.dumps(row) + "\n" for row in four))
    found = runs.adapt(tmp_path / "run", str(tmp_path / "four.jsonl"), "eve", tmp_path / "run2", steps=1, progress=False)
    assert found["finished"]
    data = load(tmp_path / "run2" / "config.yaml", []).data
    assert (data.columns, data.format, data.split) == ({"prompt": "caption"}, "auto", "train")


@pytest.mark.parametrize("kind", ["lora", "none"])
def test_users_of_a_run_are_not_forgotten_in_silence(
    run: Path, settings: Callable[..., Config], data: Any, tmp_path: Path, kind: str
) -> None:
    config = settings(tmp_path / "next", USED[0], *data, f"trainable.kind={kind}", f"trainable.start={run}")
    for use in (runs.align, runs.plan):
        with pytest.raises(ConfigError, match="knows users of its own, who would begin anew here; take one more in with"):
            use(config)


def test_taking_in_goes_on_and_refuses_a_folder_in_use(run: Path, tastes: dict[str, Path], tmp_path: Path) -> None:
    def adapt(steps: int, name: str, resume: bool = False) -> dict[str, torch.Tensor]:
        runs.adapt(run, str(tastes["eve"]), "eve", tmp_path / name, steps=steps, resume=resume, progress=False)
        return load_file(tmp_path / name / "weights" / USERS)

    adapt(1, "halved")
    with pytest.raises(ConfigError, match=r"out .* add --resume to continue that run, or give another folder with --out\."):
        adapt(2, "halved")
    halved, whole = adapt(2, "halved", resume=True), adapt(2, "whole")
    assert all(torch.equal(halved[name], whole[name]) for name in whole)
    with pytest.raises(ConfigError, match=r"give another folder with --out\."):
        adapt(1, "halved", resume=True)


def test_a_loop_is_no_run_to_take_a_user_into(tmp_path: Path) -> None:
    (tmp_path / "rounds" / "00" / "align").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("prompts: a\nrewards: [style]\n")
    with pytest.raises(CheckpointError, match=r"is the folder of a loop of rounds; give .* such as .*rounds/00/align\."):
        runs.adapt(tmp_path, "four.jsonl", "eve", tmp_path / "out")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_the_denoiser_learned_is_kept_when_a_user_is_taken_in(
    settings: Callable[..., Config], tastes: dict[str, Path], data: Any, tmp_path: Path, kind: str
) -> None:
    trained = ("train.steps=2", f"trainable.kind={kind}", "train.learning_rate=0.01", "sample.prompts=[a thing]")
    runs.align(settings(tmp_path / "run", USED[0], *data, *trained), progress=False)
    runs.adapt(tmp_path / "run", str(tastes["eve"]), "eve", tmp_path / "run2", steps=1, progress=False)
    loras = [tmp_path / run / "weights" / "pytorch_lora_weights.safetensors" for run in ("run", "run2")]
    kept = [path.read_bytes() for path in loras if path.exists()]
    assert len(kept) == (2 if kind == "lora" else 0)
    assert len(set(kept)) <= 1
    pictures = []
    for run in ("run", "run2"):
        pipeline = open_checkpoint(str(tmp_path / run))
        flowalign.personal(pipeline, tmp_path / run, "ann")
        pictures += [picture for _, picture in sample(pipeline, ["a"], [0], SamplerSettings(steps=2), progress=False)]
    assert np.array_equal(*map(np.asarray, pictures))


def test_a_new_user_inherits_no_average_no_schedule_and_no_start(
    settings: Callable[..., Config], tastes: dict[str, Path], data: Any, tmp_path: Path
) -> None:
    """Of so few steps a slow average would keep next to nothing, and a run that starts from adapters trains adapters."""
    runs.align(settings(tmp_path / "first", *data, "train.steps=1"), progress=False)
    begun = (f"trainable.start={tmp_path / 'first'}", "train.ema=0.9999", "train.schedule=linear")
    runs.align(settings(tmp_path / "run", USED[0], *data, *begun, "train.steps=1"), progress=False)
    eve = str(tastes["eve"])
    runs.adapt(tmp_path / "run", eve, "eve", tmp_path / "run2", steps=3, learning_rate=0.2, progress=False)
    embeddings = load_file(tmp_path / "run2" / "weights" / USERS)["embeddings"]
    moved = (embeddings[2] - embeddings[:2].mean(0)).abs()
    assert 0.19 < moved.max() <= 3 * 0.2 + 1e-4  # the first step of AdamW is as long as the rate
    lines = [json.loads(line) for line in (tmp_path / "run2" / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/lr"] for line in lines if "train/lr" in line] == [0.2, 0.2, 0.2]
    kept = ["train.ema=0.5", "train.schedule=cosine"]
    runs.adapt(tmp_path / "run", eve, "eve", tmp_path / "run3", steps=1, overrides=kept, progress=False)
    train = load(tmp_path / "run3" / "config.yaml", []).train
    assert (train.ema, train.schedule) == (0.5, "cosine")


def test_a_resumed_run_ends_as_if_it_never_had_stopped(settings: Callable[..., Config], data: Any, tmp_path: Path) -> None:
    for folder, parts in (("whole", (4,)), ("parts", (2, 4))):
        for steps in parts:
            config = settings(tmp_path / folder, *USED, *data, f"train.steps={steps}", "users.tokens=1")
            assert runs.align(config, resume=True, progress=False)["finished"]
    files = [(tmp_path / folder / "weights" / USERS).read_bytes() for folder in ("whole", "parts")]
    assert files[0] == files[1]


def test_a_plan_counts_what_is_read_of_users(settings: Callable[..., Config], data: Any, tmp_path: Path) -> None:
    named = "users={tokens: 2, names: [ann, bob]}"
    found = runs.plan(settings(tmp_path / "run", named, "trainable.kind=none", *data))
    width, inner = 32, (32, 32, 32, 64)  # channels of the four attentions that read a prompt
    assert found["parameters"]["trained"] == 2 * 2 * width + sum(2 * width * each for each in inner)
    rounded = runs.plan(settings(tmp_path / "run", named, "trainable.kind=none", "train.precision=bf16", *data))
    assert rounded["parameters"] == found["parameters"]


def test_a_card_and_a_report_are_written_without_any_adapter(run: Path) -> None:
    card = (run / "weights" / "README.md").read_text()
    assert "Embeddings of users for" in card
    assert "flowalign.personal(pipe, folder," in card
    assert "load_lora_weights" not in card
    assert "flowalign.personal" in card
    pipe = drawn_by_the_card(run)["pipe"]
    assert steering_of(pipe).rows is not None  # type: ignore[union-attr]
    assert (run / "report.html").is_file()


def test_what_does_not_go_together_is_one_sentence(prepared: Make, data: Any) -> None:
    ready = prepared(*USED, *data)
    cached = [each.cached for each in (ready.train, ready.held_out) if each is not None]

    def refused(**changes: Any) -> str:
        parts = {}
        for name, value in changes.items():
            own = getattr(ready.config, name)
            parts[name] = value if own is None or value is None else own.model_copy(update=value)
        config = ready.config.model_copy(update=parts)
        with pytest.raises(ConfigError) as caught:
            check(config, ready.family, *load_objective(config), *cached)
        return str(caught.value)

    assert "nothing of the denoiser" in refused(users=None)
    assert "go together" in refused(users={"new": "eve"})
    assert "follows it" in refused(reference={"kind": "ema"}, trainable={"kind": "lora"})
    assert "is like it" in refused(reference={"kind": "start"}, trainable={"kind": "lora", "start": "runs/earlier"})
    assert "leaves out 'bob'" in refused(users={"names": ("ann",)})
    assert "names 'bob' more than once" in refused(users={"names": ("bob", "ann", "bob")})
    assert "compiles" in refused(train={"compile": True})


def test_a_row_without_annotator_is_refused(prepared: Make, votes: Path) -> None:
    with pytest.raises(ConfigError, match="12 of the 12 comparisons do not say"):
        prepared(*USED, f"data.train={votes}", f"data.validation={votes}")
