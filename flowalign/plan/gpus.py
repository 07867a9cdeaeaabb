"""GPUs by name: what their makers say they reach, and what an hour is assumed to cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peaks are dense, without structured sparsity, in TFLOP/s."""

    half: float
    """bf16 and fp16 with float32 accumulation"""
    tf32: float
    fp32: float
    gib: int
    usd_per_hour: float
    """An assumption, not a quotation: prices differ by provider and by the week."""
    source: str

    def peak(self, precision: str, tf32: bool) -> float:
        """FLOP per second of products in a `train.precision`, float32 ones as TF32 where that is allowed."""
        return 1e12 * (self.half if precision != "fp32" else self.tf32 if tf32 else self.fp32)


GPUS = {
    "H100": Gpu(989.4, 494.7, 66.9, 80, 3.00, "NVIDIA H100 SXM5 80 GB, H100 architecture whitepaper"),
    "A100": Gpu(312.0, 156.0, 19.5, 80, 1.80, "NVIDIA A100 SXM4 80 GB, A100 datasheet"),
    "4090": Gpu(165.2, 82.6, 82.6, 24, 0.50, "NVIDIA GeForce RTX 4090 24 GB, Ada architecture whitepaper"),
}
EFFICIENCY = 0.3
"""Share of the peak that a run reaches, an assumption: no run of this project has been measured on a GPU."""
USABLE = 0.9
"""Share of a GPU's memory that a plan may fill: workspaces and the allocator need the rest."""
