"""The guard in whole runs that collapse: what each policy does, and that a kill changes nothing of it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flowalign import cli, config, runs, watch
from flowalign.errors import CollapseError
from flowalign.evaluate.guard import TIMES
from flowalign.settings import Config
from flowalign.setup import Prepared
from flowalign.train.checkpoint import states
from flowalign.train.rundir import RunDir
from flowalign.train.trainable import trained
from tests.train.test_resume import FILES, forks, free_port, metrics

Make = Callable[..., Config]
COLLAPSE = (
    "trainable.kind=full",
    "train.steps=6",
    "train.learning_rate=2e-2",
    "train.warmup_steps=6",
    "train.validate_every=2",
    "train.save_every=2",
    "guard.winner_error=0.2",
    "guard.accuracy_drop=null",  # of twelve comparisons
    "guard.negative_margins=null",
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(settings: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """whole("rollback"): the folder of a run with this policy that nothing else happened to."""
    made: dict[str, Path] = {}

    def run(policy: str) -> Path:
        if policy not in made:
            made[policy] = tmp_path_factory.mktemp("guarded") / policy
            runs.align(settings(made[policy], *COLLAPSE, f"guard.policy={policy}"), progress=False)
        return made[policy]

    return run


def events(run: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(run) if "guard/watch" in line]


def rates(run: Path) -> list[float]:
    """What the learning rate of each step was multiplied with."""
    return [line["train/lr"] / (2e-2 * min(line["step"], 6) / 6) for line in metrics(run) if "train/lr" in line]


def rises(run: Path) -> dict[int, float]:
    """Of the chosen pictures' held-out error above its lowest until then, by step."""
    found = {int(line["step"]): line["eval/winner/error"] for line in metrics(run) if "eval/winner/error" in line}
    return {step: (error - min(e for s, e in found.items() if s <= step)) / found[0] for step, error in found.items()}


def assert_same(one: Path, other: Path) -> None:
    """Weights, states and metrics of two runs."""
    assert (one / "weights" / FILES["full"]).read_bytes() == (other / "weights" / FILES["full"]).read_bytes()
    assert [path.name for path in states(one / "state")] == [path.name for path in states(other / "state")]
    for left, right in zip(states(one / "state"), states(other / "state"), strict=True):
        assert (left / "state.safetensors").read_bytes() == (right / "state.safetensors").read_bytes()
        assert (left / "about.json").read_text() == (right / "about.json").read_text()
    assert metrics(one) == metrics(other)


def kill_once(patch: pytest.MonkeyPatch, owner: Any, name: str, *, before: bool, when: Callable[..., bool]) -> None:
    """The process dies in the first such call: before it, or when it is done."""
    call, left = getattr(owner, name), iter([True])

    def dying(*arguments: Any, **more: Any) -> Any:
        dies = when(*arguments) and next(left, False)
        if dies and before:
            raise Killed
        done = call(*arguments, **more)
        if dies:
            raise Killed
        return done

    patch.setattr(owner, name, dying)


class Killed(BaseException):
    """Nothing catches it, and nothing is saved on the way out."""


def resumed(made: Config, *kills: tuple[Any, str, bool, Callable[..., bool]]) -> None:
    """Run it through these kills, one after the other, and then to its end."""
    for owner, name, before, when in kills:
        with pytest.MonkeyPatch.context() as patch:
            kill_once(patch, owner, name, before=before, when=when)
            with pytest.raises(Killed):
                runs.align(made, resume=True, progress=False)
    runs.align(made, resume=True, progress=False)


def test_a_warning_changes_no_number_and_is_said_everywhere(
    settings: Make, whole: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    off = whole("off")
    assert events(off) == []
    assert "The guard was off." in (off / "report.html").read_text()
    (tmp_path / "warn.yaml").write_text(config.dump(settings(tmp_path / "warn", *COLLAPSE)))
    capsys.readouterr()
    assert cli.main(["align", str(tmp_path / "warn.yaml"), "--json"]) == 0  # warn is the default
    said = capsys.readouterr()
    (event,) = events(tmp_path / "warn")
    assert (event["guard/watch"], event["guard/action"], event["guard/rate"]) == ("winner_error", "warn", 1.0)
    assert (event["step"], event["guard/step"]) == (4, 4)
    assert event["guard/value"] == pytest.approx(rises(off)[4])
    assert rises(off)[2] < event["guard/limit"] == 0.2
    assert (off / "weights" / FILES["full"]).read_bytes() == (tmp_path / "warn" / "weights" / FILES["full"]).read_bytes()
    assert metrics(off) == [line for line in metrics(tmp_path / "warn") if "guard/watch" not in line]
    result = json.loads(said.out.splitlines()[-1])["guard"]
    assert result["events"] == [{name.removeprefix("guard/"): value for name, value in event.items() if name != "step"}]
    assert said.err.count(f"guard: {result['says']}") == 1
    assert result["says"] in (tmp_path / "warn" / "report.html").read_text()


def test_a_healthy_run_says_that_nothing_was_seen(settings: Make, tmp_path: Path) -> None:
    found = runs.align(settings(tmp_path / "run"), progress=False)
    assert found["guard"] == {"policy": "warn", "events": [], "says": "The guard saw nothing."}
    assert "The guard saw nothing." in (tmp_path / "run" / "report.html").read_text()
    assert set(found["metrics"]) >= {f"eval/rewards/margins/{label}" for label in TIMES}
    assert found["metrics"]["train/update_norm"] > 0
    assert not [path for path in states(tmp_path / "run" / "state") if path.name == "step-00000000"]


def test_lower_lr_lowers_the_rate_and_a_kill_changes_nothing(
    settings: Make, whole: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = whole("lower_lr")
    assert [(event["guard/step"], event["guard/rate"]) for event in events(run)] == [(4, 0.5), (6, 0.25)]
    assert rates(run) == pytest.approx([1, 1, 1, 1, 0.5, 0.5])
    assert rises(run) != rises(whole("off"))
    made = settings(tmp_path / "run", *COLLAPSE, "guard.policy=lower_lr")
    resumed(
        made,
        (RunDir, "record", False, lambda run, step, values: "guard/watch" in values),
        (RunDir, "record", True, lambda run, step, values: step == 5),
    )
    assert_same(run, tmp_path / "run")
    assert cli.main(["align", str(tmp_path / "run"), "--resume", "--set", "guard.factor=0.25"]) == 2
    assert "guard.factor was 0.5 and is 0.25" in capsys.readouterr().err


def test_rollback_goes_back_to_the_good_state_and_a_kill_in_the_middle_of_it_changes_nothing(
    settings: Make, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    """Twice: half the rate is too much as well. The end is that of a run with a quarter of it from step 2 on."""
    run = whole("rollback")
    assert [(event["step"], event["guard/step"], event["guard/rate"]) for event in events(run)] == [(2, 4, 0.5), (2, 4, 0.25)]
    assert rates(run) == pytest.approx([1, 1, 0.25, 0.25, 0.25, 0.25])
    assert max(rises(run).values()) < 0.2 < rises(whole("off"))[4]
    lines = Counter((next(name for name in line if "/" in name).partition("/")[0], line["step"]) for line in metrics(run))
    assert {count for (kind, _), count in lines.items() if kind != "guard"} == {1}
    made = settings(tmp_path / "run", *COLLAPSE, "guard.policy=rollback")
    resumed(
        made,
        (watch, "go_back", False, lambda *_: True),
        (watch, "save", True, lambda *_: True),
        (watch, "save", False, lambda *_: True),
        (RunDir, "record", True, lambda run, step, values: step == 6),
    )
    assert_same(run, tmp_path / "run")


def test_stop_ends_the_run_with_the_weights_of_the_good_state(
    settings: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (tmp_path / "stop.yaml").write_text(config.dump(settings(run, *COLLAPSE, "guard.policy=stop")))
    assert cli.main(["align", str(tmp_path / "stop.yaml"), "--json"]) == 1
    said = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert said["type"] == "CollapseError"
    assert said["message"].startswith(f"the guard ended the run; weights of step 2, the last good state, are in {run}/weights.")
    assert "; the run was ended; next time raise objective.beta" in said["message"]
    weights = load_file(run / "weights" / FILES["full"])
    good = load_file(run / "state" / "step-00000002" / "state.safetensors")
    assert weights
    assert all(torch.equal(tensor, good[f"parameter/{name}"]) for name, tensor in weights.items())
    assert "the run was ended" in (run / "report.html").read_text()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(CollapseError, match=r"resume with --set guard\.policy=warn"):
        runs.align(config.load(run / "config.yaml"), resume=True, progress=False)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert cli.main(["align", str(run), "--resume", "--set", "guard.policy=warn"]) == 0
    assert [line["step"] for line in metrics(run) if "train/lr" in line] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_was_never_good_leaves_no_weights(settings: Make, tmp_path: Path) -> None:
    made = settings(tmp_path / "run", *COLLAPSE, "guard.policy=stop", "train.save_every=null", "train.warmup_steps=0")
    with pytest.raises(CollapseError, match=r"^the guard ended the run; no weights are written\. At step 4 "):
        runs.align(made, progress=False)
    assert not (tmp_path / "run" / "weights").exists()
    assert "the run was ended; next time" in (tmp_path / "run" / "report.html").read_text()
    assert [path.name for path in states(tmp_path / "run" / "state")] == ["step-00000000", "step-00000004"]


def broken_after(patch: pytest.MonkeyPatch, step: int) -> list[int]:
    """Weights turn NaN when so many steps are finished; the numbers of all steps, as they are."""
    call, done = Prepared.after, list[int]()

    def after(self: Prepared, finished: int) -> None:
        call(self, finished)
        done.append(finished)
        if finished == step:
            next(iter(trained(self.policy).values())).data.fill_(math.nan)

    patch.setattr(Prepared, "after", after)
    return done


@pytest.mark.parametrize(
    ("policy", "more", "seen"),
    [
        ("stop", ("train.log_every=1",), 3),  # in how far the weights are from their start
        ("stop", ("train.log_every=2",), 4),  # in the loss
        ("rollback", ("train.log_every=2", "guard.factor=0.05"), 4),  # another rate would be below the lowest
    ],
)
def test_a_run_that_ended_broken_is_not_resumed_into_the_same(
    settings: Make, tmp_path: Path, policy: str, more: tuple[str, ...], seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    more = ("train.steps=5", "train.save_every=2", *more)
    done = broken_after(monkeypatch, 3)
    said = rf"^the guard ended the run; weights of step 2, .*At step {seen} a metric became NaN .*guard\.policy=warn\.$"
    with pytest.raises(CollapseError, match=said):
        runs.align(settings(run, *more, f"guard.policy={policy}"), progress=False)
    assert done[-1] == seen
    saved = [load_file(path / "state.safetensors") for path in states(run / "state")]
    assert [path.name for path in states(run / "state")] == ["step-00000000", "step-00000002"]
    weights = load_file(run / "weights" / FILES["lora"])
    assert all(tensor.isfinite().all() for each in (*saved, weights) for tensor in each.values())
    (event,) = events(run)
    assert (event["step"], event["guard/step"], event["guard/action"]) == (2, seen, "stop")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done.clear()
    with pytest.raises(CollapseError, match=said):
        runs.align(config.load(run / "config.yaml"), resume=True, progress=False)
    assert done == []
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    monkeypatch.undo()  # what broke it was nothing of its own
    assert runs.align(settings(run, *more, "guard.policy=warn"), resume=True, progress=False)["finished"]
    runs.align(settings(tmp_path / "whole", *more), progress=False)
    assert [line for line in metrics(run) if "guard/watch" not in line] == metrics(tmp_path / "whole")
    ours, theirs = (folder / "weights" / FILES["lora"] for folder in (run, tmp_path / "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_run_without_a_good_state_ends_broken_as_the_newest_one(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    runs.align(settings(run, "train.steps=2"), progress=False)  # under `warn` none is good
    done = broken_after(monkeypatch, 3)
    for _ in range(2):
        with pytest.raises(CollapseError, match=r"^the guard ended the run; .* At step 4 a metric became NaN"):
            runs.align(settings(run, "train.steps=4", "train.log_every=2", "guard.policy=stop"), resume=True, progress=False)
    assert done == [3, 4]
    assert [path.name for path in states(run / "state")] == ["step-00000002"]


@pytest.mark.slow
def test_two_processes_decide_alike(settings: Make, whole: Callable[[str], Path], tmp_path: Path) -> None:
    made = settings(tmp_path / "run", *COLLAPSE, "guard.policy=rollback", "train.batch_size=1")
    codes, said = forks("ranks", made, tmp_path, 2, free_port())
    assert codes == {"ranks": 0}, said
    one, both = events(whole("rollback")), events(tmp_path / "run")
    assert [event["guard/step"] for event in both] == [event["guard/step"] for event in one]
    assert [event["guard/value"] for event in both] == pytest.approx([event["guard/value"] for event in one], rel=1e-2)
    assert rates(tmp_path / "run") == pytest.approx([1, 1, 0.25, 0.25, 0.25, 0.25])
