"""Checks of votes: rows, ties, repeats, contradictions, cycles, roles, prompts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping

from flowalign.evaluate.checks.base import EXAMPLES, Check, be, graded, many, percent
from flowalign.evaluate.survey import Survey, Vote


def rows(survey: Survey) -> Check:
    """Comparisons whose fields cannot be used."""
    bad = len(survey.bad)
    share = bad / survey.rows
    says = (
        f"{many(bad, 'comparison')} of {survey.rows:,} cannot be read ({percent(share)})." if bad else "All rows can be read."
    )
    notes = tuple(row.reason for row in survey.bad[:EXAMPLES])
    drop = {row.row: row.reason for row in survey.bad}
    return Check(
        "rows", "Rows that cannot be read", graded(share, 0, 0.01), says, {"rows": survey.rows, "bad": bad}, drop, (), notes
    )


def ties(survey: Survey) -> Check:
    count, total = sum(vote.is_tie for vote in survey.votes), len(survey.votes)
    share = count / total
    says = f"{percent(share)} of comparisons are ties ({count:,})." if count else "There are no ties."
    if share > 0.2:
        says += " Ties teach little to most objectives: data.tie_policy: drop leaves them out."
    return Check("ties", "Ties", graded(share, 0.2, 0.8), says, {"ties": count, "share": share})


def _sides(survey: Survey, vote: Vote) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Contents of both sides, in an order that does not depend on the file."""
    chosen, rejected = (tuple(sorted(int(survey.content[number]) for number in side)) for side in (vote.chosen, vote.rejected))
    return chosen, rejected


def repeated(survey: Survey) -> Check:
    """The same prompt, pictures and vote by the same annotator as in an earlier row. By content, not by name."""
    seen: dict[tuple[object, ...], str] = {}
    drop: dict[int, str] = {}
    for vote in filter(survey.readable, survey.votes):
        chosen, rejected = _sides(survey, vote)
        sides = tuple(sorted((chosen, rejected))) if vote.is_tie else (chosen, rejected)
        key = (vote.question, sides, vote.is_tie, vote.annotator)
        if key in seen:
            drop[vote.place] = f"repeats {seen[key]}"
        else:
            seen[key] = vote.source
    share = len(drop) / len(survey.votes)
    says = (
        f"{many(len(drop), 'comparison')} ({percent(share)}) repeat an earlier one: same prompt, same pictures, same vote"
        + (", same annotator." if any(vote.annotator for vote in survey.votes) else ".")
        if drop
        else "No comparison occurs twice."
    )
    return Check(
        "repeated", "Repeated comparisons", graded(share, 0.01, 0.1), says, {"repeated": len(drop), "share": share}, drop
    )


def contradictions(survey: Survey) -> Check:
    """Two sides of one prompt that were voted both ways."""
    votes: dict[tuple[object, ...], set[bool]] = defaultdict(set)
    for vote in filter(survey.readable, survey.votes):
        chosen, rejected = _sides(survey, vote)
        if not vote.is_tie and chosen != rejected:
            votes[vote.question, min(chosen, rejected), max(chosen, rejected)].add(chosen < rejected)
    both = sum(len(ways) == 2 for ways in votes.values())
    share = both / max(len(votes), 1)
    says = (
        f"{many(both, 'pair')} of {len(votes):,} ({percent(share)}) {'was' if both == 1 else 'were'} voted both ways; where "
        "several people judge, this is disagreement, and a preference between 0 and 1 can say it in one row."
        if both
        else "No pair was voted both ways."
    )
    numbers = {"pairs": len(votes), "both_ways": both, "share": share}
    return Check("contradictions", "Contradictions", graded(share, 0.02, 0.2), says, numbers)


def has_cycle(better: Mapping[int, Collection[int]]) -> bool:
    """Whether a directed graph {node: what it is better than} has a cycle, a loop and a pair of opposite edges included.

    Nodes without worse ones are taken away until none is left, or none can be (Kahn 1962).
    """
    above: dict[int, list[int]] = defaultdict(list)
    left: dict[int, int] = {node: len(set(below)) for node, below in better.items()}
    for node, below in better.items():
        for other in set(below):
            above[other].append(node)
            left.setdefault(other, 0)
    ready = [node for node, count in left.items() if not count]
    removed = 0
    while ready:
        node = ready.pop()
        removed += 1
        for over in above[node]:
            left[over] -= 1
            if not left[over]:
                ready.append(over)
    return removed < len(left)


def preference_graphs(survey: Survey) -> dict[str, dict[int, set[int]]]:
    """Prompt, under its weights -> {content: contents that it was preferred to}. Ties and equal pictures give no edge."""
    graphs: dict[str, dict[int, set[int]]] = {}
    for vote in filter(survey.readable, survey.votes):
        graph = graphs.setdefault(vote.question, {})
        if not vote.is_tie:
            for winner in vote.chosen:
                below = {int(survey.content[loser]) for loser in vote.rejected} - {int(survey.content[winner])}
                graph.setdefault(int(survey.content[winner]), set()).update(below)
    return graphs


def _could_cycle(graph: Mapping[int, Collection[int]]) -> bool:
    """Whether turning votes round could close a cycle: some part has as many edges as pictures, or a pair voted twice."""
    edges = [(winner, loser) for winner, below in graph.items() for loser in below]
    undirected = {(min(edge), max(edge)) for edge in edges}
    if len(undirected) < len(edges):
        return True
    parent: dict[int, int] = {}

    def root(node: int) -> int:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for a, b in undirected:
        if root(a) == root(b):
            return True
        parent[root(a)] = root(b)
    return False


def cycles(survey: Survey) -> Check:
    """Prompts whose votes go round in a circle, as A over B over C over A: no score can agree with them all."""
    graphs = preference_graphs(survey)
    cyclic = [prompt for prompt, graph in graphs.items() if has_cycle(graph)]
    possible = sum(map(_could_cycle, graphs.values()))
    rate = len(cyclic) / max(possible, 1)
    if not possible:
        says = "No prompt has votes enough to go round in a circle."
    elif not cyclic:
        says = f"The votes of no prompt go round in a circle, of {possible:,} where they could."
    else:
        says = (
            f"The votes of {many(len(cyclic), 'prompt')} go round in a circle, which is {percent(rate)} of the {possible:,} "
            f"where they could and {percent(len(cyclic) / len(graphs))} of all: no single score agrees with them."
        )
    numbers = {
        "prompts": len(graphs),
        "with_cycle": len(cyclic),
        "possible": possible,
        "rate": len(cyclic) / max(len(graphs), 1),
        "rate_where_possible": rate,
    }
    return Check("cycles", "Cycles of preference", graded(rate, 0.02, 0.2), says, numbers, notes=tuple(cyclic[:EXAMPLES]))


def roles(survey: Survey) -> Check:
    """Pictures that are chosen in one comparison and rejected in another. By content, ties aside."""
    won: dict[int, set[str]] = defaultdict(set)
    lost: dict[int, set[str]] = defaultdict(set)
    pictures: set[int] = set()
    for vote in filter(survey.readable, survey.votes):
        pictures.update(_contents(survey, vote.pictures))
        if not vote.is_tie:
            for side, found in ((vote.chosen, won), (vote.rejected, lost)):
                for content in _contents(survey, side):
                    found[content].add(vote.prompt)
    both = won.keys() & lost.keys()
    across = sum(not won[content] & lost[content] for content in both)
    share = len(both) / max(len(pictures), 1)
    if both:
        says = (
            f"{many(len(both), 'picture')} of {len(pictures):,} ({percent(share)}) {be(len(both))} chosen "
            f"here and rejected there, {across:,} of them only under different prompts. In rankings the middle is both; "
            "objectives that weigh pictures one by one pull at them from both sides."
        )
    else:
        says = "No picture is chosen in one comparison and rejected in another."
    numbers = {"pictures": len(pictures), "both": len(both), "across_prompts": across, "share": share}
    return Check("roles", "Pictures in both roles", graded(share, 0.3, 1.0), says, numbers)


def _contents(survey: Survey, numbers: Iterable[int]) -> list[int]:
    return [int(survey.content[number]) for number in numbers]


def balance(survey: Survey) -> Check:
    """Whether a few prompts make up the set."""
    counts = Counter(vote.prompt for vote in survey.votes)
    prompt, most = counts.most_common(1)[0]
    share = most / len(survey.votes)
    says = (
        f"{many(len(survey.votes), 'comparison')} of {many(len(counts), 'prompt')}; the most frequent prompt has "
        f"{many(most, 'comparison')} ({percent(share)})."
    )
    verdict = graded(share, max(0.05, 4 / len(counts)), 1.0)
    numbers = {"comparisons": len(survey.votes), "prompts": len(counts), "largest": most, "largest_share": share}
    return Check("balance", "Prompts", verdict, says, numbers, notes=(prompt,) if verdict != "ok" else ())
