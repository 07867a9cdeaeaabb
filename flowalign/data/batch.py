"""What the training side receives: `Conditioning` and `Batch`, two of the four types that cross a border."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

GEOMETRY = "geometry"
"""Name in a Conditioning of what pictures were cut from, see `Batch.geometry`; not a name for a family's own tensors."""


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser is told about its pictures: named tensors, each `[B, ...]`; only the family knows the names."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: Tensor | slice) -> Conditioning:
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """Moved without blocking; `dtype` applies to floating-point tensors only."""
        return Conditioning(
            {n: t.to(device, dtype if t.is_floating_point() else None, non_blocking=True) for n, t in self.tensors.items()}
        )

    def repeat(self, times: int) -> Conditioning:
        """Each row `times` times in a row: `[B, ...] -> [B*times, ...]`."""
        return Conditioning({name: tensor.repeat_interleave(times, dim=0) for name, tensor in self.tensors.items()})

    def joined(self, name: str, tensor: Tensor) -> Conditioning:
        """With one more tensor `[B, ...]`."""
        return Conditioning({**self.tensors, name: tensor})

    def pin(self) -> Conditioning:
        return Conditioning({name: tensor.pin_memory() for name, tensor in self.tensors.items()})

    @staticmethod
    def stack(rows: Sequence[Mapping[str, Tensor]]) -> Conditioning:
        """Unbatched tensors of several examples -> one batch."""
        return Conditioning({name: torch.stack([row[name] for row in rows]) for name in rows[0]})


@dataclass(frozen=True)
class Batch:
    """B comparisons of N pictures, best first, as latents. A pair has N = 2: chosen, rejected."""

    mean: Tensor
    """`[B, N, C, H, W]` posterior mean of the latents, in the denoiser's scale."""
    std: Tensor
    """`[B, N, C, H, W]` posterior standard deviation; zero where an encoder is deterministic."""
    geometry: Tensor
    """`[B, N, 6]` float32 pixels: original height and width, top and left of the cut in the resized picture, target
    height and width."""
    conditioning: Conditioning
    """`[B, ...]`, one row per comparison."""
    preference: Tensor
    """`[B]` float32, the probability that chosen is preferred: 1 for a plain vote, 0.5 for a tie."""
    weight: Tensor
    """`[B]` float32 factor on the comparison's loss."""
    ids: tuple[int, ...]
    """Which comparison: the key of its randomness."""
    draws: tuple[int, ...]
    """How often each comparison was drawn before."""
    positions: tuple[int, ...]
    """Place in the run's endless sequence of comparisons, or number of the draw among all where draws are repeated."""
    scores: Tensor | None = None
    """`[B, N]` float32, a reward of each picture, see `Data.rewards`; NaN where there is none."""
    grades: Tensor | None = None
    """`[B, N]` float32, relevance of each picture in a ranked list; NaN where there is none."""
    mask: Tensor | None = None
    """`[B, N, H, W]` float32, how much each place of a picture counts, with mean 1; None where no row has a mask."""
    noise: Tensor | None = None
    """`[B, N, C, H, W]` float32, the noise that each picture gets; None where it is drawn."""
    annotators: tuple[int, ...] = ()
    """`records.key63` of who judged each comparison; -1 where the data do not say."""
    objective_weights: Tensor | None = None
    """`[B, K]` float32 weights of the run's objectives, or shares of users, of sum 1; zeros where the policy is told none.
    Or `[B, N, K]`, each picture's own scores by the objectives, see `Steer.condition`."""
    policy_conditioning: Conditioning | None = None
    """`[B, ...]`, what the policy is told where that is something else than `conditioning`, which the reference is told."""

    def __len__(self) -> int:
        return len(self.ids)

    def pin_memory(self) -> Batch:
        """Called by `torch.utils.data.DataLoader(pin_memory=True)`."""
        return Batch(
            self.mean.pin_memory(),
            self.std.pin_memory(),
            self.geometry.pin_memory(),
            self.conditioning.pin(),
            self.preference.pin_memory(),
            self.weight.pin_memory(),
            self.ids,
            self.draws,
            self.positions,
            *(None if each is None else each.pin_memory() for each in (self.scores, self.grades, self.mask, self.noise)),
            self.annotators,
            None if self.objective_weights is None else self.objective_weights.pin_memory(),
            None if self.policy_conditioning is None else self.policy_conditioning.pin(),
        )

    def tiled(self, times: int) -> Batch:
        """All comparisons, so many times one after another: `[B, ...] -> [times*B, ...]`."""
        places = torch.arange(len(self)).repeat(times)
        names = ("mean", "std", "geometry", "conditioning", "preference", "weight", "scores", "grades", "mask", "noise")
        names += ("objective_weights", "policy_conditioning")
        tensors = {name: value[places] for name in names if (value := getattr(self, name)) is not None}
        numbers = {name: getattr(self, name) * times for name in ("ids", "draws", "positions", "annotators")}
        return replace(self, **tensors, **numbers)
