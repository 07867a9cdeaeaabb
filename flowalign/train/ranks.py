"""The processes of one run: what all of them agree on, what one of them does, and how weights in shards come together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from flowalign.errors import ConfigError, PeerError

LOST = ("connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "gloo", "nccl")
"""Words of the messages with which torch.distributed reports a process that is gone or hangs."""


class Ranks:
    """The processes of a run, seen from one of them. What they tell each other goes over CPUs and never waits for a GPU."""

    def __init__(self, accelerator: Accelerator, timeout: float) -> None:
        """timeout: seconds after which a process that does not answer counts as lost."""
        self.count, self.index = accelerator.num_processes, accelerator.process_index
        self.main = self.index == 0
        self._group: Any = None
        if self.count > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any of the processes; each of them must ask."""
        return flag if self.count == 1 else any(self.gather(flag))

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in their order; what JSON can hold."""
        if self.count == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=self._group)
        longest = int(max(sizes))
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.count)]
        dist.all_gather(texts, torch.nn.functional.pad(data, (0, longest - len(data))), group=self._group)
        return [json.loads(bytes(text[: int(size)].tolist())) for text, size in zip(texts, sizes, strict=True)]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes of a tensor on the CPU, in place."""
        if self.count > 1:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier(group=self._group)

    def agree(self, values: Mapping[str, Any]) -> None:
        """Raise ConfigError in every process, with the first difference by name, unless all were given equal values."""
        first, *others = self.gather(values)
        for index, other in enumerate(others, 1):
            for name, value, here in differences(first, other):
                raise ConfigError(
                    f"the processes of this run are not alike: {name} is {value} in process 0 and {here} in process {index}; "
                    "start all of them with the same configuration, the same files and one shared output folder."
                )


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, one's value, other's value) of what differs between two trees of plain values, for all names of `other`."""
    for key, value in other.items():
        before = one.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            yield from differences(before, value, f"{prefix}{key}.")
        elif before != value:
            yield f"{prefix}{key}", before, value


@contextmanager
def peers(count: int) -> Iterator[None]:
    """Raise PeerError where torch.distributed fails because another of `count` processes is gone or hangs."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if count == 1 or not (isinstance(error, dist.DistError) or any(word in text.lower() for word in LOST)):
            raise
        raise PeerError(
            f"another process of this run ended or stopped answering ({text[:200]}); the last saved state is whole: look for "
            "that process's own message, then start all of them again with --resume."
        ) from error


@runtime_checkable
class Sharded(Protocol):
    """What lies over the processes in parts: a DTensor, or a moment that DeepSpeed keeps."""

    def full_tensor(self) -> Tensor:
        """The whole of it; every process must ask."""


def gathered(tensor: Tensor | Sharded) -> Tensor:
    """The whole of a tensor that lies in shards; every process must ask. Others come back as they are."""
    return tensor.full_tensor() if isinstance(tensor, Sharded) else tensor


def scattered(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole tensor, laid out as `like`; the tensor itself where `like` is whole."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
