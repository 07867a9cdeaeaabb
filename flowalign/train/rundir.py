"""The run folder: configuration, environment, metrics, weights and state of one run, safe to kill at any instant."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from flowalign.files import text_lines, write_text

PACKAGES = ("flowalign", "torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "safetensors")


class RunDir:
    """`config.yaml`, `environment.json`, `data.json`, `model.json`, `metrics.jsonl`, `weights/`, `state/`, `samples/`,
    `report.html`.

    A run with a policy for each type of annotator has `annotators.json`, and in `types/` a run folder for each, with
    `config.yaml`, `weights/`, `samples/` and `report.html`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.weights = path / "weights"
        self.states = path / "state"
        self.samples = path / "samples"
        self.types = path / "types"

    def write_environment(self, device: torch.device) -> None:
        """Versions, threads and device, so that figures can be read later."""
        versions = {}
        for package in PACKAGES:
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                versions[package] = "not installed"
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        about = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": gpu or str(device),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "packages": versions,
        }
        self.write_json("environment.json", about)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write one JSON file of the folder atomically."""
        write_text(self.path / name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line to `metrics.jsonl`."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def rewind(self, step: int) -> None:
        """Drop metric lines after `step`: a resumed run writes them again. A line cut by a kill is dropped too.

        So is one that is there twice: what the guard did is written before the state that remembers it.
        """
        if not self.metrics.exists():
            return
        kept = []
        for line in text_lines(self.metrics):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except ValueError:
                continue
        write_text(self.metrics, "".join(line + "\n" for line in dict.fromkeys(kept)))
