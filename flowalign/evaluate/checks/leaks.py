"""Checks of two splits against each other: prompts and pictures that are in both."""

from __future__ import annotations

import unicodedata

from flowalign.data.likeness import near_between
from flowalign.evaluate.checks.base import EXAMPLES, Check, be, graded, many, percent, worst
from flowalign.evaluate.survey import Survey

MARKS = set(".,;:!?'\"`…")
"""Punctuation of sentences. Signs that can be what a prompt is about, such as # and *, are not among them."""


def normal(prompt: str) -> str:
    """A prompt without what does not change its meaning: case, width and composition of letters, punctuation, spaces."""
    text = unicodedata.normalize("NFKC", prompt).casefold()
    categories = {"Pd", "Ps", "Pe", "Pi", "Pf"}  # dashes, brackets, quotation marks
    kept = (" " if each in MARKS or unicodedata.category(each) in categories else each for each in text)
    return " ".join("".join(kept).split()) or " ".join(text.split())


def prompts(survey: Survey, against: Survey) -> Check:
    """Prompts that the other split has as well, once both are `normal`."""
    theirs = {normal(vote.prompt): vote.prompt for vote in against.votes}
    here = {normal(vote.prompt) for vote in survey.votes}
    shared = [prompt for prompt in theirs if prompt in here]
    drop = {vote.place: f"its prompt is also in {against.name}" for vote in survey.votes if normal(vote.prompt) in theirs}
    share = len(shared) / max(len(theirs), 1)
    says = (
        f"{many(len(shared), 'prompt')} of the {len(theirs):,} of {against.name} ({percent(share)}) "
        f"{be(len(shared))} here as well, in {many(len(drop), 'comparison')}: what is measured there is "
        "partly memory."
        if shared
        else f"No prompt of {against.name} is here."
    )
    numbers = {"prompts": len(here), "prompts_against": len(theirs), "shared": len(shared), "share": share}
    notes = tuple(theirs[prompt] for prompt in shared[:EXAMPLES])
    return Check("prompt_leakage", "Prompts in both splits", graded(share, 0, 0.01), says, numbers, drop, (), notes)


def pictures(survey: Survey, against: Survey) -> Check:
    """Pictures that the other split has as well, byte by byte or nearly, see `data.likeness`."""
    theirs = {digest for digest in against.digests if digest is not None}
    equal = {int(survey.content[number]) for number, digest in enumerate(survey.digests) if digest in theirs}
    near: dict[int, int] = {}
    for number, match in near_between(survey.looks(), against.looks()).tolist():
        if int(survey.content[number]) not in equal:
            near.setdefault(number, match)
    contents = {int(survey.content[number]) for number in near}
    drop = {}
    for vote in survey.votes:
        found = {int(survey.content[number]) for number in vote.pictures}
        if found & equal:
            drop[vote.place] = f"one of its pictures is also in {against.name}"
        elif found & contents:
            drop[vote.place] = f"one of its pictures is nearly one in {against.name}"
    total = len(survey.looks().rows)
    share, share_near = len(equal) / max(total, 1), len(contents) / max(total, 1)
    if equal or contents:
        parts = []
        if equal:
            there = f"{be(len(equal))} also in {against.name}"
            parts.append(f"{many(len(equal), 'picture')} of {total:,} ({percent(share)}) {there}")
        if contents:
            verb = "nearly equals" if len(contents) == 1 else "nearly equal"
            parts.append(
                f"{many(len(contents), 'more picture' if equal else 'picture')} ({percent(share_near)}) {verb} one there"
            )
        says = "; ".join(parts) + "."
    else:
        says = f"No picture is also in {against.name}, nor nearly."
    numbers = {"pictures": total, "equal": len(equal), "near": len(contents), "share": share, "share_near": share_near}
    verdict = worst(graded(share, 0, 0.01), graded(share_near, 0, 0.05))
    examples = tuple((survey.shown(mine), against.shown(its)) for mine, its in list(near.items())[:EXAMPLES])
    return Check("picture_leakage", "Pictures in both splits", verdict, says, numbers, drop, examples)
