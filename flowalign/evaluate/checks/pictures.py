"""Checks of pictures: damaged ones, equal sides, near-duplicates, sizes."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from flowalign.data.likeness import near_duplicates
from flowalign.evaluate.checks.base import EXAMPLES, Check, graded, many, percent, together, worst
from flowalign.evaluate.compare import mean_with_interval
from flowalign.evaluate.survey import Survey

ASPECT = 0.02
"""Proportions that differ by more than this share are cut differently to a square."""


def damaged(survey: Survey) -> Check:
    """Pictures that are missing or cannot be decoded."""
    drop = {
        vote.place: next(survey.why[number] for number in vote.pictures if number in survey.why)
        for vote in survey.votes
        if not survey.readable(vote)
    }
    share = len(drop) / len(survey.votes)
    says = (
        f"{many(len(survey.why), 'picture')} of {len(survey.refs):,} cannot be decoded, in {many(len(drop), 'comparison')} "
        f"({percent(share)})."
        if survey.why
        else f"All {len(survey.refs):,} pictures can be decoded."
    )
    numbers = {"pictures": len(survey.refs), "damaged": len(survey.why), "comparisons": len(drop), "share": share}
    notes = tuple(f"{survey.refs[number].name}: {why}" for number, why in list(survey.why.items())[:EXAMPLES])
    return Check("pictures", "Damaged pictures", graded(share, 0, 0.01), says, numbers, drop, (), notes)


def same_picture(survey: Survey) -> Check:
    """The same bytes on both sides of a comparison."""
    drop, examples = {}, []
    for vote in filter(survey.readable, survey.votes):
        chosen, rejected = ({int(survey.content[number]) for number in side} for side in (vote.chosen, vote.rejected))
        if both := chosen & rejected:
            drop[vote.place] = "the same picture on both sides"
            examples.append(tuple(number for number in vote.pictures if survey.content[number] in both)[:2])
    share = len(drop) / len(survey.votes)
    says = (
        f"{many(len(drop), 'comparison')} ({percent(share)}) {'has' if len(drop) == 1 else 'have'} the same picture, byte by "
        "byte, on both sides."
        if drop
        else "No comparison has the same picture on both sides."
    )
    numbers = {"comparisons": len(drop), "share": share}
    return Check(
        "same_picture", "Same picture on both sides", graded(share, 0, 0.01), says, numbers, drop, together(survey, examples)
    )


def duplicates(survey: Survey) -> Check:
    """Files of equal content under several names, and pictures that are nearly the same, see `data.likeness`."""
    copies = Counter(int(content) for content in survey.content if content >= 0)
    extra = sum(count - 1 for count in copies.values())
    pairs = near_duplicates(survey.looks())
    near = {(int(survey.content[a]), int(survey.content[b])) for a, b in pairs}
    alike = {content for pair in near for content in pair}
    drop, examples, others = {}, [], []
    for vote in filter(survey.readable, survey.votes):
        for winner in vote.chosen:
            for loser in vote.rejected:
                a, b = sorted((int(survey.content[winner]), int(survey.content[loser])))
                if (a, b) in near:
                    drop[vote.place] = "chosen and rejected are nearly the same picture"
                    examples.append((winner, loser))
    inside = {tuple(sorted(map(int, survey.content[list(pair)]))) for pair in examples}
    others = [(int(a), int(b)) for a, b in pairs if (int(survey.content[a]), int(survey.content[b])) not in inside]
    by_content: dict[int, list[int]] = {}
    for number, content in enumerate(survey.content):
        by_content.setdefault(int(content), []).append(number)
    equal = [tuple(by_content[content][:2]) for content, count in copies.items() if count > 1]
    total = len(copies)
    share, within = len(alike) / max(total, 1), len(drop) / len(survey.votes)
    parts = []
    if extra:
        copy = "is a byte-by-byte copy" if extra == 1 else "are byte-by-byte copies"
        parts.append(f"{many(extra, 'picture')} {copy} under another name")
    if near:
        parts.append(
            f"{many(len(alike), 'picture')} of {total:,} ({percent(share)}) nearly equal another: re-encoded, resized, "
            "slightly cropped, or different in a detail"
        )
    if drop:
        parts.append(
            f"in {many(len(drop), 'comparison')} ({percent(within)}) chosen and rejected are such a pair, from which little "
            "can be learned unless the detail is the point"
        )
    says = "; ".join(parts) + "." if parts else "No two pictures are equal or nearly equal."
    verdict = worst(graded(within, 0, 0.05), graded(share, 0.01, 1.0), graded(extra / max(total, 1), 0.01, 1.0))
    numbers = {
        "pictures": total,
        "copies": extra,
        "near_pairs": len(near),
        "near_pictures": len(alike),
        "comparisons": len(drop),
        "share": share,
        "share_of_comparisons": within,
    }
    shown = (*examples[: EXAMPLES // 2], *equal[: EXAMPLES // 4], *others)[:EXAMPLES]
    return Check(
        "duplicates", "Copies and near-duplicates", verdict, says[0].upper() + says[1:], numbers, drop, together(survey, shown)
    )


def sizes(survey: Survey) -> Check:
    """Whether both sides of a comparison have one size and one shape, and whether size tells the vote."""
    differ = cut = 0
    larger, prompts, examples = [], [], []
    votes = [vote for vote in survey.votes if survey.readable(vote)]
    for vote in votes:
        sides = survey.sizes[list(vote.pictures)]
        aspect = np.log(sides[:, 0] / sides[:, 1])
        unequal = bool((sides != sides[0]).any())
        differ += unequal
        if aspect.max() - aspect.min() > np.log1p(ASPECT):
            cut += 1
            examples.append((vote.chosen[0], (vote.rejected or vote.chosen)[0]))
        if unequal and vote.rejected and not vote.is_tie:
            area = [survey.sizes[list(side)].prod(1).mean() for side in (vote.chosen, vote.rejected)]
            larger.append(0.5 + 0.5 * np.sign(area[0] - area[1]))
            prompts.append(vote.prompt)
    total = max(len(votes), 1)
    share = differ / total
    numbers = {"comparisons": len(votes), "sizes_differ": differ, "shapes_differ": cut, "share": share}
    sizes_seen = _common(survey.sizes)
    if not differ:
        says = f"Both sides of every comparison have one size ({sizes_seen})."
        return Check("sizes", "Sizes and shapes", "ok", says, numbers)
    says = f"In {percent(share)} of comparisons ({differ:,}) the pictures differ in size"
    says += f", in {percent(cut / total)} also in shape, so that they are cut differently" if cut else ""
    verdict = graded(share, 0.01, 1.0)
    if larger:
        told = mean_with_interval(larger, prompts)
        numbers |= {"chosen_is_larger": {"value": told.value, "low": told.low, "high": told.high}}
        says += (
            f"; there the chosen one is the larger in {100 * told.value:.0f} % [{100 * told.low:.0f}, {100 * told.high:.0f}]"
        )
        if share > 0.2 and len(larger) >= 20 and not told.low <= 0.5 <= told.high:
            verdict = "bad"
            says += ": size tells the vote, and a model may learn size instead of preference"
    return Check("sizes", "Sizes and shapes", verdict, says + ".", numbers, examples=together(survey, examples))


def _common(found: NDArray[np.int64]) -> str:
    counts = Counter(map(tuple, found[found[:, 0] > 0].tolist()))
    return ", ".join(f"{width} × {height}" for (width, height), _ in counts.most_common(3)) + (" …" if len(counts) > 3 else "")
