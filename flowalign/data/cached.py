"""`Cached`: comparisons whose pictures and prompts lie in the cache, as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flowalign.data.readers import BadRow


@dataclass(frozen=True)
class Cached:
    """n comparisons whose N pictures and prompt are all in a cache. About 40·N + 70 bytes a comparison."""

    indices: np.ndarray
    """int64 `[n]`: places in the Comparisons."""
    pictures: np.ndarray
    """uint8 `[n, N, 32]`: sha256 of each picture's bytes, best first, and of what is attached to it."""
    prompts: tuple[str, ...]
    """Distinct prompts."""
    prompt: np.ndarray
    """int64 `[n]`: place of the comparison's prompt in `prompts`."""
    ids: np.ndarray
    """int64 `[n]`."""
    preference: np.ndarray
    """float32 `[n]`."""
    weight: np.ndarray
    """float32 `[n]`."""
    scores: np.ndarray
    """float32 `[n, N]`: the weighted sum of each picture's scores; NaN where a row lacks one of them."""
    grades: np.ndarray
    """float32 `[n, N]`; NaN where a row has none."""
    annotators: tuple[str, ...]
    """Who judged, each once; "" stands for rows that do not say."""
    annotator: np.ndarray
    """int64 `[n]`: place of the comparison's annotator in `annotators`."""
    objective_weights: np.ndarray
    """float32 `[n, K]`: weights of the run's objectives, of sum 1; NaN where a row has none. K = 0 where none are read.
    Or `[n, N·K]`, each picture's own scores by the objectives, picture by picture, see `Steer.condition`."""
    told: np.ndarray
    """int64 `[n]`: place in `prompts` of what the policy is told, where the weights are put in words; else as `prompt`."""
    num_chosen: int
    flips: tuple[bool, ...]
    """Which variants of each picture are cached: upright (False), mirrored (True)."""
    bad: tuple[BadRow, ...]
    """Rows that were asked for and cannot be used."""
    inside: bool
    """Whether every picture lies in the row that names it, so that it cannot change without the source's own files."""
    attached: tuple[str, ...] = ()
    """What entries hold beside latents: noise, or masks, which some may lack."""

    def __len__(self) -> int:
        return len(self.indices)
