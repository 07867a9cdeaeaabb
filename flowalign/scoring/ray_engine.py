"""The same scoring on a Ray cluster: each worker opens the source, loads the rewards once, and scores its share of the rows.

A worker that is lost is replaced and its rows are scored again, but for what it had put into a cache that all workers see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from flowalign.errors import MissingExtraError
from flowalign.scoring.engine import Scorer
from flowalign.scoring.rewards.base import Card
from flowalign.scoring.scored import Counts, cells, write_blocks
from flowalign.scoring.sources import Items

Open = Callable[[], tuple[Items, Scorer]]
"""Opens a source and what scores it; is sent to the workers."""


class Worker:
    """One worker's source and rewards."""

    def __init__(self, open_all: Open, count: int, block: int) -> None:
        self.items, self.scorer = open_all()
        self.count, self.block = count, block

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        """Blocks by their number -> their rows, scored."""
        places = [place for number in batch["id"] for place in range(self.count)[self.block * number :][: self.block]]
        return cells(list(self.scorer.rows(self.items, places)), self.scorer.cards)


def score_on_ray(
    open_all: Open,
    cards: Mapping[str, Card],
    count: int,
    out: Path,
    *,
    block: int,
    replicas: int = 2,
    gpus: float | None = None,
    progress: bool = True,
) -> Counts:
    """Score rows 0 to `count` with as many `replicas`, each with so many `gpus`, on the cluster that Ray finds or starts.

    gpus: None for one if the cluster has any. block: rows that a worker gets at a time; the scorer's `stretch` makes the
    batches of the local engine. Raises MissingExtraError where Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("ray", "scale", "scoring on a cluster") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    if gpus is None:
        gpus = float(ray.cluster_resources().get("GPU", 0) > 0)
    blocks = -(-count // block)
    work = ray.data.range(blocks, override_num_blocks=blocks).map_batches(
        Worker,
        fn_constructor_args=(open_all, count, block),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=replicas),
        num_gpus=gpus,
    )
    with tqdm(total=count, unit="picture", desc="score", disable=not progress) as bar:
        return write_blocks(_blocks(work, bar), cards, out)


def _blocks(work: Any, bar: Any) -> Iterator[pa.Table]:
    for block in work.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield block
        bar.update(block.num_rows)
