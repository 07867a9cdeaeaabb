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
from flowalign.scoring.engine import BLOCK, Counts, Scorer, cells, write_blocks
from flowalign.scoring.rewards.base import Card
from flowalign.scoring.sources import Items

Open = Callable[[], tuple[Items, Scorer]]
"""Opens a source and what scores it; is sent to the workers."""


class Worker:
    """One worker's source and rewards."""

    def __init__(self, open_all: Open) -> None:
        self.items, self.scorer = open_all()
        self.cards = {reward.card.name: reward.card for reward in self.scorer.rewards}

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        places = [int(place) for place in batch["id"]]
        return cells(list(self.scorer.rows(self.items, places)), self.cards)


def score_on_ray(
    open_all: Open,
    cards: Mapping[str, Card],
    count: int,
    out: Path,
    *,
    replicas: int = 2,
    gpus: float = 0.0,
    block: int = BLOCK // 4,
    progress: bool = True,
) -> Counts:
    """Score rows 0 to `count` with as many `replicas`, each with so many `gpus`, on the cluster that Ray finds or starts.

    block: rows that a worker gets at a time. Raises MissingExtraError where Ray is not installed.
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
    work = ray.data.range(count, override_num_blocks=max(1, -(-count // block))).map_batches(
        Worker,
        fn_constructor_args=(open_all,),
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
