"""What a set of comparisons consists of, counted without opening a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from flowalign.data.records import Comparison, key63
from flowalign.errors import DataError

CHOSEN, REJECTED = 1, 2


def audit(comparisons: Sequence[Comparison], indices: Iterable[int] | None = None) -> dict[str, Any]:
    """Counts for a report; pictures are told apart by their names in the source, not by their pixels.

    comparisons, bad_rows (fields that cannot be used), ties, prompts and pictures (distinct), pictures_per_comparison
    {N: count}, pictures_in_both_roles (chosen here, rejected there, ties aside), same_picture (one picture on both
    sides of a comparison), duplicates (a prompt with pictures and vote that occurred before), contradictions (pairs that
    occur with both votes), largest_prompt_share (share of comparisons that belong to the most frequent prompt).
    """
    total = bad = ties = same = duplicates = 0
    prompts: Counter[int] = Counter()
    per_comparison: Counter[int] = Counter()
    roles: dict[int, int] = {}
    seen: set[int] = set()
    contradictions: set[int] = set()
    for place in range(len(comparisons)) if indices is None else indices:
        try:
            comparison = comparisons[int(place)]
        except DataError:
            bad += 1
            continue
        names = [image.name for image in comparison.images]
        chosen, rejected = names[: comparison.num_chosen], names[comparison.num_chosen :]
        total += 1
        ties += comparison.is_tie
        prompts[key63(comparison.prompt)] += 1
        per_comparison[len(names)] += 1
        same += not set(chosen).isdisjoint(rejected)
        for role, part in ((CHOSEN, chosen), (REJECTED, rejected)):
            for name in part:
                roles[key63(name)] = roles.get(key63(name), 0) | (0 if comparison.is_tie else role)
        told = [f"{name}={value}" for name, value in sorted((comparison.objective_weights or {}).items())]
        pair = key63(comparison.prompt, *told, *chosen, "over", *rejected)
        reverse = key63(comparison.prompt, *told, *rejected, "over", *chosen)
        duplicates += pair in seen
        if reverse in seen and reverse != pair and not comparison.is_tie:
            contradictions.add(min(pair, reverse))
        seen.add(pair)
    return {
        "comparisons": total,
        "bad_rows": bad,
        "ties": ties,
        "prompts": len(prompts),
        "largest_prompt_share": max(prompts.values(), default=0) / total if total else 0.0,
        "pictures": len(roles),
        "pictures_per_comparison": dict(sorted(per_comparison.items())),
        "pictures_in_both_roles": sum(role == CHOSEN | REJECTED for role in roles.values()),
        "same_picture": same,
        "duplicates": duplicates,
        "contradictions": len(contradictions),
    }
