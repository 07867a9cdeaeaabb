"""What is chosen for the device that a run computes on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flowalign import setup
from flowalign.device import choose_device, choose_workers
from flowalign.errors import ConfigError
from flowalign.runs import flow_parts
from flowalign.settings import Config
from flowalign.setup import Prepared
from tests.data.test_pipeline import assert_same, rows_of


def on(device: str) -> Any:
    """As much of an accelerator as a stream asks for."""
    return SimpleNamespace(num_processes=1, process_index=0, device=torch.device(device))


@pytest.mark.parametrize(
    ("given", "device", "workers"),
    [("null", "cuda", 2), ("null", "cpu", 0), ("null", "mps", 0), ("0", "cuda", 0), ("3", "cuda", 3), ("3", "cpu", 3)],
)
def test_a_gpu_has_processes_that_read_ahead(
    settings: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, device: str, workers: int
) -> None:
    config = settings(tmp_path, f"data.workers={given}")
    assert choose_workers(config.data, torch.device(device)) == workers
    asked: list[int] = []
    for module in (setup, flow_parts):
        monkeypatch.setattr(module, "PairStream", lambda *_, workers, **more: asked.append(workers) or ())
    setup.pair_stream(config, on(device), SimpleNamespace())  # type: ignore[arg-type]
    flow_parts._stream(config, on(device), SimpleNamespace())(0)  # type: ignore[arg-type]
    assert asked == [workers] * 2


def test_by_default_a_run_reads_as_it_is_told_for_its_device(settings: Callable[..., Config], tmp_path: Path) -> None:
    assert settings(tmp_path).data.workers is None


def test_a_run_sees_the_same_with_processes_that_read_ahead(prepared: Callable[..., Prepared]) -> None:
    drawn = ("train.caption_dropout=0.5", "data.flip=true")
    own, ahead = (
        rows_of(list(islice(prepared(*drawn, f"data.workers={workers}").batches(0), 12))) for workers in ("null", "2")
    )
    for left, right in zip(own, ahead, strict=True):
        assert_same(left, right)


@pytest.mark.parametrize("here", [(), ("cuda",), ("mps",)])
def test_only_devices_that_are_here_are_offered(monkeypatch: pytest.MonkeyPatch, here: tuple[str, ...]) -> None:
    """Of any kind there is none with this number."""
    for kind, module in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        monkeypatch.setattr(module, "is_available", lambda kind=kind: kind in here)
    for name in ("cuda:77", "mps:77", "gpu"):
        with pytest.raises(ConfigError) as caught:
            choose_device(name)
        assert str(caught.value).endswith(f"allowed: {', '.join(sorted(('auto', 'cpu', *here)))}.")
        assert f"did you mean {name!r}" not in str(caught.value)
