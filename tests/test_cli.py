from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flowalign
from flowalign import cli
from flowalign.errors import DataError, RunError
from flowalign.settings import Config

VERBS = ("adapt", "align", "merge", "plan", "generate", "evaluate", "report", "cache_list", "cache_clear")
RESULT = {"summary": "all is well", "value": 0.5, "name": "é"}


class Runs:
    """Stands where the verbs of `flowalign.runs` do: notes calls, checks them against the real signatures, answers `RESULT`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.act: Callable[[], None] = lambda: None

    def verb(self, real: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
        signature = inspect.signature(real)

        def call(*args: Any, **kwargs: Any) -> dict[str, Any]:
            signature.bind(*args, **kwargs)
            self.calls.append((real.__name__, args, kwargs))
            self.act()
            return RESULT

        return call


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    stand_in = Runs()
    for verb in VERBS:
        monkeypatch.setattr(flowalign.runs, verb, stand_in.verb(getattr(flowalign.runs, verb)))
    for name in ("demo", "demo_flow"):
        module = importlib.import_module(f"flowalign.{name}")
        monkeypatch.setattr(module, name, stand_in.verb(getattr(module, name)))
    return stand_in


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("model: {checkpoint: tiny-sd}\ndata: {train: pairs.jsonl}\noutput: runs/mine\n")
    return path


def only(runs: Runs) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    (call,) = runs.calls
    return call


def test_align_passes_the_configuration_with_its_overrides(runs: Runs, yaml: Path) -> None:
    assert cli.main(["align", str(yaml), "--set", "train.batch_size=3", "objective.beta=5e2", "--set", "train.seed=9"]) == 0
    name, (config,), kwargs = only(runs)
    assert (name, kwargs) == ("align", {"resume": False})
    assert isinstance(config, Config)
    assert (config.train.batch_size, config.train.seed, config.objective.knobs) == (3, 9, {"beta": 500.0})
    assert config.output == "runs/mine"


def test_align_takes_another_output_folder_and_resumes_there(runs: Runs, yaml: Path) -> None:
    assert cli.main(["align", str(yaml), "--output", "elsewhere", "--resume"]) == 0
    _, (config,), kwargs = only(runs)
    assert (config.output, kwargs) == ("elsewhere", {"resume": True})


def test_plan_passes_the_configuration_and_its_assumptions(runs: Runs, yaml: Path) -> None:
    assert cli.main(["plan", str(yaml), "--set", "train.batch_size=3"]) == 0
    words = "--comparisons 9 --efficiency 0.5 --price H100=2.5 4090=1 --price A100=3 --processes 8"
    assert cli.main(["plan", str(yaml), *words.split()]) == 0
    (first, (config,), plain), (_, _, told) = runs.calls
    assert (first, config.train.batch_size) == ("plan", 3)
    assert plain == {"efficiency": 0.3, "prices": {}, "comparisons": None, "processes": 1}
    prices = {"H100": 2.5, "4090": 1.0, "A100": 3.0}
    assert told == {"efficiency": 0.5, "prices": prices, "comparisons": 9, "processes": 8}


def test_a_run_folder_is_continued_where_it_lies_now(runs: Runs, yaml: Path) -> None:
    assert cli.main(["align", str(yaml.parent), "--resume", "--set", "train.steps=5"]) == 0
    _, (config,), kwargs = only(runs)
    assert (config.output, config.train.steps, kwargs) == (str(yaml.parent), 5, {"resume": True})


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["{run}"], "add --resume"),
        (["{run}", "--resume", "--output", "x"], "--output x cannot be given"),
        (["{run}/empty", "--resume"], "holds no config.yaml"),
        (["{run}/none.yaml"], "does not exist"),
        (["{run}/config.yaml", "--set", "train.stepz=1"], "did you mean 'steps'?"),
    ],
)
def test_align_refuses_what_it_cannot_use(
    runs: Runs, yaml: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    (yaml.parent / "empty").mkdir()
    assert cli.main(["align", *(argument.format(run=yaml.parent) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert part in err
    assert err.count("\n") == 1
    assert runs.calls == []


SAMPLING = {
    "seeds": [0],
    "steps": 25,
    "guidance": 5.0,
    "batch_size": 16,
    "sampler": "default",
    "precision": "fp32",
    "device": "auto",
}


def test_generate_passes_prompts_and_settings(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    assert cli.main(["generate", "tiny-sd", "--prompts", "a cat", str(tmp_path / "p.txt")]) == 0
    assert only(runs) == (
        "generate",
        ("tiny-sd", ["a cat", "one", "two"]),
        {"out": Path("runs/generate"), "weights": None, "flow": None, **SAMPLING},
    )


def test_generate_takes_a_mix_and_a_negative_run(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--mix", "runs/a=0.25", "b=x=0.75", "--negative", "runs/c", "--prompts", "p"]) == 0
    name, given, settings = runs.calls.pop()
    assert (name, given) == ("generate", (None, ["p"]))
    assert settings["mix"] == {"runs/a": 0.25, "b=x": 0.75}
    assert (settings["negative"], settings["negative_strength"]) == ("runs/c", 1.0)
    assert cli.main(["generate", "m", "--negative", "runs/c", "--negative-strength", "0", "--prompts", "p"]) == 0
    assert runs.calls.pop()[2]["negative_strength"] == 0
    assert cli.main(["generate", "m", "--negative-strength", "0.5", "--prompts", "p"]) == 2
    assert "says how much --negative RUN counts" in capsys.readouterr().err
    for wrong in ("runs/a", "=0.5", "runs/a=much"):
        with pytest.raises(SystemExit):
            cli.main(["generate", "--mix", wrong, "--prompts", "p"])
        assert "is not RUN=W, such as runs/my=0.5" in capsys.readouterr().err


def test_merge_passes_runs_and_weights(runs: Runs) -> None:
    how = ["--how", "warp", "--back", "0.25", "--rank", "8"]
    assert cli.main(["merge", "a", "b", "--weights", "0.7", "0.3", *how, "--out", "c"]) == 0
    told = {"out": Path("c"), "weights": [0.7, 0.3], "how": "warp", "back": 0.25, "rank": 8}
    assert only(runs) == ("merge", (["a", "b"],), told)


def test_settings_are_taken_with_dashes_and_underscores(runs: Runs) -> None:
    words = (
        "--seeds 3 4 --out o --steps 9 --guidance 0 --batch{0}size 2 --sampler euler --precision bf16 --device cpu --limit 1"
    )
    for mark in "-_":
        assert cli.main(["generate", "m", "--prompts", "a_b", *words.format(mark).split()]) == 0
    first, second = runs.calls
    assert first == second
    assert first[1] == ("m", ["a_b"])
    assert first[2] == {
        "out": Path("o"),
        "weights": None,
        "flow": None,
        "seeds": [3, 4],
        "steps": 9,
        "guidance": 0.0,
        "batch_size": 2,
        "sampler": "euler",
        "precision": "bf16",
        "device": "cpu",
    }


def test_weights_are_a_number_for_each_name(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "m", "--prompts", "a", "--weights", "clip=0.7,style=3e-1"]) == 0
    assert only(runs)[2]["weights"] == {"clip": 0.7, "style": 0.3}
    for wrong in ("clip", "=1", "clip=-1", "clip=1,,style=2", "clip=1,style"):
        with pytest.raises(SystemExit):
            cli.main(["generate", "m", "--prompts", "a", "--weights", wrong])
        assert "is not" in capsys.readouterr().err


def test_underscores_in_values_stay() -> None:
    argv = ["--batch_size=a_b", "--set", "train.batch_size=4", "a_b", "--", "--x_y"]
    assert cli._dashes(argv) == ["--batch-size=a_b", "--set", "train.batch_size=4", "a_b", "--", "--x_y"]


def test_evaluate_passes_both_models(runs: Runs) -> None:
    assert cli.main(["evaluate", "base", "runs/a", "--prompts", "x", "--judges", "j", "--seed", "7", "--out", "e"]) == 0
    expected = {"judges": Path("j"), "out": Path("e"), **SAMPLING, "seeds": [7]}
    assert only(runs) == ("evaluate", ("base", "runs/a", ["x"]), expected)


def test_prompts_are_for_what_is_drawn(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "pictures", "others", "--judges", "j"]) == 0
    assert only(runs)[1] == ("pictures", "others", [])
    assert cli.main(["evaluate", "pictures", "others", "--limit", "3"]) == 2
    assert "--limit 3 says how many of --prompts are drawn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "call"),
    [
        ("report runs/a", ("report", (Path("runs/a"),), {})),
        ("cache", ("cache_list", (None,), {})),
        ("cache list --folder f", ("cache_list", (Path("f"),), {})),
        ("cache clear", ("cache_clear", (None, None, None), {})),
        ("cache clear --fingerprint ab --folder f", ("cache_clear", (Path("f"), "ab", None), {})),
        ("cache clear --kind bank", ("cache_clear", (None, None, "bank"), {})),
        ("demo", ("demo", (Path("runs/demo"),), {})),
        ("demo --out d", ("demo", (Path("d"),), {})),
        ("demo flow", ("demo_flow", (Path("runs/demo-flow"),), {})),
        ("demo flow --out d", ("demo_flow", (Path("d"),), {})),
    ],
)
def test_the_other_commands(runs: Runs, argv: str, call: tuple[str, tuple[Any, ...], dict[str, Any]]) -> None:
    assert cli.main(argv.split()) == 0
    assert only(runs) == call


def test_objectives_are_listed_without_torch(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = "import sys; from flowalign import cli; cli.main(['objectives']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, loaded = done.stdout.splitlines()
    assert loaded == "False"
    assert "  dpo                  Direct preference optimisation. [reference]" in lines
    assert cli.main(["objectives", "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["objectives"]}
    assert listed["kto"]["carries"] is True
    assert listed["dpo"]["knobs"] == {"beta": "2000.0", "label_smoothing": "0.0"}
    assert cli.main(["objectives", "--markdown", str(tmp_path / "none.md")]) == 2


@pytest.mark.parametrize("restriction", [("--fingerprint", "ab"), ("--kind", "bank")])
def test_what_restricts_clearing_is_not_dropped_silently(
    runs: Runs, capsys: pytest.CaptureFixture[str], restriction: tuple[str, str]
) -> None:
    assert cli.main(["cache", *restriction]) == 2
    assert f"cache clear {' '.join(restriction)}" in capsys.readouterr().err


def test_every_kind_of_store_can_be_cleared_alone() -> None:
    from flowalign.data.cache import ENTRIES

    assert set(cli.files.KINDS) == set(ENTRIES)


def test_people_read_the_summary(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "r"]) == 0
    assert capsys.readouterr() == ("all is well\n", "")


def test_machines_read_one_line_of_json(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.act = lambda: print("working")
    assert cli.main(["report", "r", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == RESULT
    assert out.count("\n") == 1
    assert err == "working\nall is well\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("The data is odd."), 2, "The data is odd."),
        (RunError("It broke."), 1, "It broke."),
        (KeyboardInterrupt(), 1, "interrupted"),
        (ZeroDivisionError("by\nzero"), 1, "ZeroDivisionError: by zero (unexpected; add --debug for the traceback)"),
    ],
)
def test_errors_are_one_sentence_and_an_exit_code(
    runs: Runs, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    def fail() -> None:
        raise error

    runs.act = fail
    assert cli.main(["report", "r"]) == code
    assert capsys.readouterr() == ("", f"error: {message}\n")
    assert cli.main(["report", "r", "--json"]) == code
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": {"type": type(error).__name__, "message": message}}
    assert err == f"error: {message}\n"


def test_debug_shows_the_traceback_of_the_unexpected_only(runs: Runs) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    runs.act = fail
    with pytest.raises(ZeroDivisionError):
        cli.main(["report", "r", "--debug"])
    runs.act = lambda: (_ for _ in ()).throw(DataError("odd"))
    assert cli.main(["report", "r", "--debug"]) == 2


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "fly",
        "align",
        "generate m",
        "generate m --prompts a --steps 0",
        "generate m --prompts a --steps 1.5",
        "generate m --prompts a --seeds -1",
        "generate m --prompts a --seeds 9223372036854775808",
        "select t --by random --out o --seed 99999999999999999999",
        "generate m --prompts a --seed 1 --seeds 2",
        "generate m --prompts a --guidance nan",
        "generate m --prompts a --guidance -1",
        "generate m --prompts a --precision fp8",
        "generate m --prompts a --limit 0",
        "generate m --prompts a --batch 3",
        "evaluate a --prompts x",
        "plan c.yaml --comparisons 0",
        "plan c.yaml --processes 0",
        "plan c.yaml --price 2",
        "plan c.yaml --price H100=dear",
        "cache drop",
    ],
)
def test_arguments_that_cannot_be_parsed_exit_with_2(runs: Runs, capsys: pytest.CaptureFixture[str], argv: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv.split())
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert "usage: flowalign" in err
    assert out == ""
    assert runs.calls == []


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ("align --json", "CONFIG"),
        ("--json align", "CONFIG"),
        ("fly --json", "fly"),
        ("flow fit --json", "CONFIG"),
        ("report r --json --wrong", "--wrong"),
        ("generate m --prompts a --steps 0 --json", "0 is too few"),
    ],
)
def test_machines_read_what_cannot_be_parsed(runs: Runs, capsys: pytest.CaptureFixture[str], argv: str, part: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv.split())
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    (said,) = json.loads(out).values()
    assert said["type"] == "UsageError"
    assert part in said["message"]
    assert err.splitlines()[-1] == f"error: {said['message']}"


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["align", "--help"], ["plan", "--help"], ["evaluate", "--help"]])
def test_help_loads_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import sys\nfrom flowalign.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit as end: assert end.code == 0\n"
        "print(sorted({'torch', 'numpy', 'pydantic', 'yaml', 'diffusers', 'flowalign.runs'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
    *text, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    assert "flowalign" in text[0]


def test_the_module_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flowalign", "generate", "m", "--prompts", str(tmp_path / "none.txt"), "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "--guidance" in done.stdout


def test_a_user_is_a_name_or_shares_of_several(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    for text, told in (("ann", {"ann": 1.0}), ("ann=0.5,bob=0.5", {"ann": 0.5, "bob": 0.5})):
        assert cli.main(["generate", "m", "--prompts", "a", "--user", text]) == 0
        assert runs.calls.pop()[2]["user"] == told
    assert cli.main(["generate", "m", "--prompts", "a", "--targets", "clip=0.9,style=0.8"]) == 0
    settings = only(runs)[2]
    assert settings["targets"] == {"clip": 0.9, "style": 0.8}
    assert "user" not in settings
    with pytest.raises(SystemExit):
        cli.main(["generate", "m", "--prompts", "a", "--user", "ann=much"])
    assert "is not" in capsys.readouterr().err


def test_adapt_passes_who_is_taken_in(runs: Runs) -> None:
    assert cli.main(["adapt", "runs/a", "four.jsonl", "--user", "eve", "--out", "b", "--set", "train.seed=3"]) == 0
    how = {"steps": 60, "learning_rate": 0.05, "overrides": ["train.seed=3"], "resume": False}
    assert only(runs) == ("adapt", (Path("runs/a"), "four.jsonl", "eve", Path("b")), how)
    runs.calls.clear()
    assert cli.main(["adapt", "runs/a", "four.jsonl", "--user", "eve", "--out", "b", "--resume"]) == 0
    assert only(runs)[2]["resume"] is True
