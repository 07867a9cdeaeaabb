"""A pipeline that draws for a user: what a run with a section users saved, put into any family's pipeline and taken out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import pad

from flowalign import plugins
from flowalign.errors import CheckpointError, ConfigError, allowed
from flowalign.families.loading import FAILURES, USERS, digest, family_of
from flowalign.families.steer import Plain, Telling, folder_of, put
from flowalign.families.users import Users, attentions_of
from flowalign.settings import Users as Settings

Tokens = Tensor | list[Tensor]
"""A prompt's tokens as `encode_prompt` gives them: `[B, L, D]`, or a list of `[l, D]`."""


def write_users(settings: Settings, users: Users) -> bytes:
    """The file of a run with users: embeddings and projections, and as metadata the settings with all names."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in users.state_dict().items() if name != "new"}
    state["embeddings"] = users.table.detach().cpu().contiguous()
    return save(state, {"users": settings.model_copy(update={"known": None, "new": None}).model_dump_json()})


def read_users(run: str | Path) -> tuple[Settings, Users]:
    """What a run with a section users saved, its names complete. Raises CheckpointError."""
    path = folder_of(run, USERS) / USERS
    try:
        with safe_open(path, "pt") as file:
            settings = Settings.model_validate_json(file.metadata()["users"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        inner = [state[f"readings.{place}.to_k.weight"].shape[0] for place in range((len(state) - 1) // 2)]
        users = Users(*state["embeddings"].shape, inner)
        users.load_state_dict(state)
    except (*FAILURES, ValidationError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}); copy the run's weights again.") from error
    return settings, users.requires_grad_(False).eval()


class Personal(Telling):
    """What tells one pipeline who looks at its pictures. A user is told as weights are, all of it on the user's name.

    A user's tokens travel behind those of the prompt from `encode_prompt` to the denoiser, which never sees them: so they
    reach the right rows, however a pipeline puts prompts and negative prompts together. Behind the latter are zeros, nobody.
    """

    def __init__(self, settings: Settings, users: Users) -> None:
        super().__init__(settings.names)
        self.users = users
        self._handles: list[Any] = []

    @property
    def fingerprint(self) -> str:
        return digest(list(self.names), Plain(self.users))

    def named(self, row: Sequence[float]) -> dict[str, float]:
        """Shares by user, of those who have any."""
        return {name: share for name, share in super().named(row).items() if share}

    def row(self, weights: Mapping[str, float] | None) -> tuple[float, ...]:
        for name in weights or ():
            if name not in self.names:
                raise ConfigError(f"the user {name!r} is not known to the run; {allowed(name, self.names)}.")
        return super().row(weights)

    def attach(self, pipeline: Any) -> None:
        """Stand between the pipeline and its encoding of prompts, and beside its denoiser's attentions.

        LoRAs are loaded before: what they adapt are other modules than those before them. Raises CheckpointError.
        """
        family = plugins.load("families", family_of(type(pipeline).__name__))
        denoiser = getattr(pipeline, family.component)
        self._handles = self.users.attach(attentions_of(denoiser, family.attentions))
        place = list(inspect.signature(denoiser.forward).parameters).index(family.context)

        def take(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if self.rows is None:
                self.users.tell(None)
                return given, named
            if family.context in named:
                return given, named | {family.context: self._taken(named[family.context])}
            return (*given[:place], self._taken(given[place]), *given[place + 1 :]), named

        self._handles.append(denoiser.register_forward_pre_hook(take, with_kwargs=True))
        super().attach(pipeline)

    def detach(self, pipeline: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self.users.attached = self.users.attached and len(self._handles) == 1  # the denoiser's alone: others attached the rest
        super().detach(pipeline)

    def said(self, prompt: str | list[str] | None) -> str | list[str] | None:
        return prompt

    def told(self, encoded: tuple[Any, ...], *, negative: bool, both: bool) -> tuple[Any, ...]:
        """With T tokens behind those of each prompt."""
        tokens, *others = encoded
        if negative:
            return (self._with_nobody(tokens), *others)
        if both and others[0] is not None:
            others[0] = self._with_nobody(others[0])
        rows = torch.tensor(self.each(len(tokens)), device=self.users.embeddings.device)
        theirs = self.users.of(rows)
        width = (tokens[0] if isinstance(tokens, list) else tokens).shape[-1]
        if theirs.shape[-1] != width:
            raise CheckpointError(
                f"the run's users are tokens of {theirs.shape[-1]} numbers, and this pipeline's prompts have {width}; take a "
                "pipeline of the checkpoint that the run was trained on."
            )
        if isinstance(tokens, list):
            pairs = zip(tokens, theirs, strict=True)
            return ([torch.cat([each, own.to(each)]) for each, own in pairs], *others)
        return (torch.cat([tokens, theirs.to(tokens)], dim=1), *others)

    def _with_nobody(self, tokens: Tokens) -> Tokens:
        count = self.users.embeddings.shape[1]
        return [pad(each, (0, 0, 0, count)) for each in tokens] if isinstance(tokens, list) else pad(tokens, (0, 0, 0, count))

    def _taken(self, tokens: Tokens) -> Tokens:
        """Tell the users what is theirs of a denoiser's tokens; what is left is the prompt's.

        The pipeline may have been moved since they were put into it.
        """
        count = self.users.embeddings.shape[1]
        self.users.to((tokens[0] if isinstance(tokens, list) else tokens).device)
        if isinstance(tokens, list):
            self.users.tell(torch.stack([each[-count:] for each in tokens]))
            return [each[:-count] for each in tokens]
        self.users.tell(tokens[:, -count:])
        return tokens[:, :-count]


def personal(pipeline: Any, run: str | Path, user: str | Mapping[str, float] | None = None) -> Any:
    """Make a diffusers pipeline draw for a user of a run with a section users; returns the pipeline.

    run: the run folder, or its weights/. The run's LoRA, if it has one, is applied beside those that are, and loaded
    unless it is there.
    user: a name, or shares of several in any scale, such as {"ann": 0.5, "bob": 0.5}, whose embeddings are then averaged;
    None draws for nobody. Call it again for another user, and `unsteered` to have the pipeline as it was.
    Raises CheckpointError and ConfigError.
    """
    shares = {user: 1.0} if isinstance(user, str) else user
    return put(pipeline, folder_of(run, USERS), Personal(*read_users(run)), shares)
