"""What does not go together: settings with each other, with an objective, with a family, with the comparisons.

Every rule gives the sentences that say why not and what to set instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowalign.align.carried import Carried, loss_at_start
from flowalign.align.reference import BEGINNING, MOVING
from flowalign.align.switches import reads
from flowalign.align.terms import Objective, Terms
from flowalign.data.cached import Cached
from flowalign.errors import ConfigError
from flowalign.families.base import Family
from flowalign.settings import Config


@dataclass(frozen=True)
class Facts:
    """What the rules look at."""

    config: Config
    family: Family
    objective: Objective
    knobs: dict[str, Any]
    comparisons: tuple[Cached, ...]
    """Of training, then those held out, if any."""

    @property
    def name(self) -> str:
        """The objective's."""
        return self.config.objective.name

    @property
    def anchored(self) -> bool:
        """The objective looks at a reference."""
        return bool(self.objective.needs & {"reference", "drift"})

    @property
    def alone(self) -> bool:
        """Each picture was judged by itself."""
        return any(pictures == 1 for pictures, _ in self.shapes)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(pictures, how many of them are chosen) of comparisons, each once."""
        return sorted({(each.pictures.shape[1], each.num_chosen) for each in self.comparisons})

    def loss(self, terms: Terms) -> Tensor:
        """The objective as it is before the first step."""
        return loss_at_start(self.objective, self.knobs, terms)


def check(config: Config, family: Family, objective: Objective, knobs: dict[str, Any], *comparisons: Cached) -> None:
    """Raise ConfigError for the first thing that does not go together; comparisons: of training, then those held out."""
    facts = Facts(config, family, objective, knobs, comparisons)
    for rule in RULES:
        for sentence in rule(facts):
            raise ConfigError(sentence)


def _safeguard(facts: Facts) -> Iterator[str]:
    for pictures, _ in facts.shapes:
        if facts.config.switches.safeguard is not None and pictures != 2:
            yield (
                f"switches.safeguard weighs one rejected picture against one chosen, but these comparisons have {pictures} "
                "pictures; set switches.safeguard=null."
            )


def _mask(facts: Facts) -> Iterator[str]:
    if facts.config.switches.mask == "given" and "mask" not in facts.comparisons[0].attached:
        yield (
            "switches.mask is 'given', but no comparison of data.train has a mask; fill in the column mask, or set "
            "switches.mask=none."
        )


def _noise(facts: Facts) -> Iterator[str]:
    noise, one, zero = facts.config.switches.noise, torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    if noise == "stored" and facts.config.data.flip:
        yield (
            "switches.noise 'stored' trains pictures on the noise they were drawn from, and a mirrored picture was drawn from "
            "none; set data.flip=false."
        )
    if noise == "inverted" and not facts.family.implied(one, one, one, zero).isfinite().all():
        yield (
            f"switches.noise 'inverted' starts at the picture itself, and {facts.config.model.checkpoint} predicts just that, "
            "which says nothing about noise there; set switches.noise=shared, or take a checkpoint that predicts ε, v or a "
            "velocity."
        )


def _bare_rows(facts: Facts) -> Iterator[str]:
    for need in sorted((facts.objective.needs | reads(facts.config.switches)) & {"scores", "grades"}):
        who = f"objective.name {facts.name!r}" if need in facts.objective.needs else "switches.pair_scale 'gap'"
        bare = sum(int(np.isnan(getattr(each, need)).any(1).sum()) for each in facts.comparisons)
        if bare:
            several = ", or several rewards: name those that count in data.rewards" if need == "scores" else ""
            yield (f"{who} reads {need}, and {bare} comparisons have none{several}; give every row {need}, or choose another.")


def _moving_reference(facts: Facts) -> Iterator[str]:
    kind = facts.config.reference.kind
    if kind in MOVING and not facts.anchored:
        yield (
            f"reference.kind {kind!r} moves a reference, but objective.name {facts.name!r} needs none; set reference.kind=auto."
        )


def _start(facts: Facts) -> Iterator[str]:
    config = facts.config
    if config.trainable.start is None:
        if config.reference.kind == "start":
            yield (
                "reference.kind 'start' is what trainable.start names, and that is null; name a run there, or set "
                "reference.kind=auto."
            )
    elif config.switches.annotator_types > 1:
        yield (
            f"trainable.start {config.trainable.start} holds one policy, but switches.annotator_types "
            f"{config.switches.annotator_types} trains one for each type; set trainable.start=null."
        )
    elif config.reference.kind == "start" and not facts.anchored:
        yield f"reference.kind 'start' is a reference, but objective.name {facts.name!r} needs none; set reference.kind=auto."


def _merged_reference(facts: Facts) -> Iterator[str]:
    settings = facts.config.reference
    if settings.kind != "merged":
        if settings.checkpoints:
            yield (
                f"reference.checkpoints names {len(settings.checkpoints)} models, and reference.kind {settings.kind!r} reads "
                "none of them; set reference.kind=merged."
            )
    elif not facts.anchored:
        yield (
            f"reference.kind 'merged' holds several references, but objective.name {facts.name!r} needs none; set "
            "reference.kind=auto."
        )
    elif settings.merge == "harmonic" and "drift" in facts.objective.needs:
        yield (
            f"reference.merge 'harmonic' merges errors, and objective.name {facts.name!r} reads the predictions of one "
            "reference; set reference.merge=predictions."
        )


def _steer(facts: Facts) -> Iterator[str]:
    config, steer = facts.config, facts.config.steer
    if steer is None:
        return
    said = f"steer makes one policy of {len(steer.objectives)} objectives"
    reference, types = config.reference.kind, config.switches.annotator_types
    like = "is like it" if reference == "start" else "follows it"
    refused = {
        f"reference.kind {reference!r} {like}, and it is held against a model that is told no weights": reference in BEGINNING,
        f"switches.annotator_types {types} trains several": types > 1,
        "train.compile compiles a denoiser that is called by itself": config.train.compile and steer.form == "tokens",
        "steer.form 'prompt' says the same of all pictures of a comparison, and steer.condition 'scores' of each its own": (
            steer.form == "prompt" and steer.condition == "scores"
        ),
        f"steer.contrast {steer.contrast:g} tells it other weights in the middle of a step, which steer.form 'prompt' and "
        "steer.condition 'scores' cannot": steer.contrast > 0 and (steer.form, steer.condition) != ("tokens", "weights"),
        f"objective.name {facts.name!r} holds pictures against a reference, and steer.condition 'scores' tells each its own, "
        "which sft learns from": facts.anchored and steer.condition == "scores",
    }
    for why, holds in refused.items():
        if holds:
            yield f"{said}, but {why}; change it, or set steer=null."
    bare = sum(int(np.isnan(each.objective_weights).any(1).sum()) for each in facts.comparisons)
    if bare:
        yield (
            f"{said}, and {bare} comparisons have no objective_weights to say what they hold under; give every row some, as "
            "flowalign select --by steered does, or set steer=null."
        )


def _users(facts: Facts) -> Iterator[str]:
    config, users = facts.config, facts.config.users
    reference, types, kind = config.reference.kind, config.switches.annotator_types, config.trainable.kind
    like = "is like it" if reference == "start" else "follows it"
    if users is None:
        if kind == "none":
            yield "trainable.kind 'none' trains nothing of the denoiser, and there is no section users to learn; give one."
        return
    if (users.known is None) != (users.new is None):
        yield "users.known and users.new go together: a run with users, and who is taken in; give both, or neither."
    refused = {
        "steer tells it something else": config.steer is not None,
        f"reference.kind {reference!r} {like}, and it is held against a model that knows nobody": reference in BEGINNING,
        f"switches.annotator_types {types} trains several": types > 1,
        "train.compile compiles a denoiser that is called by itself": config.train.compile,
        f"trainable.kind {kind!r} changes the run that users.known names": users.known is not None and kind != "none",
    }
    for why, holds in refused.items():
        if holds:
            yield f"users makes one policy of many people, but {why}; change it, or set users=null."
    if twice := sorted(name for name in set(users.names) if users.names.count(name) > 1):
        yield f"users.names names {twice[0]!r} more than once; name each user once."
    train = facts.comparisons[0]
    bare = int((np.array(train.annotators)[train.annotator] == "").sum())
    if bare and users.new is None:
        yield (
            f"users must know who judged, and {bare} of the {len(train)} comparisons do not say; give every row an annotator, "
            "or name its column, such as data.columns={annotator: user_id}."
        )
    strangers = sorted(set(train.annotators) - {"", *users.names}) if users.names and users.new is None else []
    if strangers:
        yield (
            f"users.names leaves out {strangers[0]!r}, who judged comparisons of data.train; name everybody, or leave it empty."
        )


def _annotators(facts: Facts) -> Iterator[str]:
    config, train = facts.config, facts.comparisons[0]
    if config.switches.annotator_types == 1:
        return
    types = f"switches.annotator_types {config.switches.annotator_types}"
    reference, trainable = config.reference.kind, config.trainable.kind
    refused = {
        f"objective.name {facts.name!r} carries averages over all policies at once": facts.objective.carry is not None,
        f"trainable.kind {trainable!r} has no adapters to be a policy of each type": trainable != "lora",
        f"reference.kind {reference!r} follows one policy": reference in MOVING,
        "train.timesteps 'importance' learns from the gradients of one policy": config.train.timesteps == "importance",
        "train.compile compiles one policy": config.train.compile,
        "train.backward 'chunked' divides the pictures of one policy": config.train.backward == "chunked",
        f"switches.beta {config.switches.beta!r} moves β by the margins of all at once": config.switches.beta != "fixed",
    }
    for why, holds in refused.items():
        if holds:
            yield f"{types} trains a policy for each type, but {why}; change it, or set switches.annotator_types=1."
    if "reference" not in facts.objective.needs or "beta" not in facts.knobs or facts.alone:
        yield (
            f"{types} reads from βΔ what an annotator is like, but with objective.name {facts.name!r} and these data there is "
            "no β, no reference or no pair; take an objective such as dpo, and comparisons."
        )
    bare = int((np.array(train.annotators)[train.annotator] == "").sum())
    if bare:
        yield (
            f"{types} must know who judged, and {bare} of the {len(train)} comparisons do not say; give every row an "
            "annotator, or name its column, such as data.columns={annotator: user_id}."
        )


def _moving_beta(facts: Facts) -> Iterator[str]:
    how = facts.config.switches.beta
    if how == "fixed":
        return
    own = Carried.of(facts.objective, facts.knobs, torch.device("cpu"))
    refused = {
        "has no beta": "beta" not in facts.knobs,
        "needs no reference, so that there is no margin to move it by": "reference" not in facts.objective.needs,
        "moves it already": own is not None and "beta" in own.scalars,
        "has pictures here that were each judged alone": facts.alone,
    }
    for why, holds in refused.items():
        if holds:
            said = f"switches.beta {how!r} moves objective.beta, but objective.name {facts.name!r} {why}"
            yield f"{said}; set switches.beta=fixed."


def _pair_scale(facts: Facts) -> Iterator[str]:
    if facts.config.switches.pair_scale == "gap" and (facts.alone or facts.objective.takes in ("lists", "unpaired")):
        yield (
            f"switches.pair_scale 'gap' scales chosen against rejected pictures, and objective.name {facts.name!r} or its data "
            "compare none; set switches.pair_scale=one."
        )


def _shape(facts: Facts) -> Iterator[str]:
    if facts.alone and facts.objective.takes != "unpaired":
        yield (
            f"objective.name {facts.name!r} compares pictures, and in these data each was judged alone; take an objective for "
            "unpaired pictures (flowalign objectives lists them), or data of pairs."
        )
    for pictures, num_chosen in facts.shapes:
        ones = torch.ones(1, pictures)
        needs = facts.objective.needs - {"reference", "drift"}
        given = {each: ones[:, 0] if each == "residual_dot" else ones for each in needs}
        try:
            facts.loss(Terms(ones, ones, ones, ones[:, 0], num_chosen, **given))
        except ValueError as error:
            yield f"objective.name {facts.name!r} cannot be used with these data: {error}."


def _label_noise(facts: Facts) -> Iterator[str]:
    switches = facts.config.switches
    if not switches.label_noise:
        return
    said = f"switches.label_noise {switches.label_noise:g} turns votes around"
    if switches.safeguard is not None or switches.winner_nll:
        yield (
            f"{said}, and switches.safeguard and switches.winner_nll hold the first picture for the chosen one whatever the "
            "vote; set them to null and 0, or switches.label_noise=0."
        )
    if not _reads_votes(facts):
        yield (
            f"{said}, but objective.name {facts.name!r} reads none; set switches.label_noise=0, or choose another objective."
        )


def _reads_votes(facts: Facts) -> bool:
    """Whether the loss of a comparison depends on its label."""
    pictures, num_chosen = facts.shapes[-1]
    falling = torch.linspace(1, 0, pictures, dtype=torch.float64)[None]
    error = 1 - 1e-4 * falling  # so near the reference's that no loss is saturated
    given = {"scores": falling, "grades": falling, "residual_dot": error[:, 0]}
    labels = falling.new_tensor([[0.0], [1.0]])
    losses = [facts.loss(Terms(error, torch.ones_like(error), 1 - error, label, num_chosen, **given)) for label in labels]
    return not torch.equal(*losses)


RULES: tuple[Callable[[Facts], Iterator[str]], ...] = (
    _safeguard,
    _mask,
    _noise,
    _bare_rows,
    _start,
    _moving_reference,
    _merged_reference,
    _steer,
    _users,
    _annotators,
    _moving_beta,
    _shape,
    _pair_scale,
    _label_noise,
)
