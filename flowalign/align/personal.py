"""One policy for many people: a denoiser that reads, beside the prompt, who looks at its pictures.

PPD, Dang et al. 2025, arXiv 2501.06655, see docs/personal.md.
"""

from __future__ import annotations

from torch import Tensor, nn

from flowalign.align.steer import Steered
from flowalign.data.batch import Conditioning
from flowalign.data.cached import Cached
from flowalign.data.weights import WEIGHTS
from flowalign.errors import ConfigError
from flowalign.families.base import Family
from flowalign.families.loading import LORA, USERS, LoraRun, add_lora
from flowalign.families.personal import read_users
from flowalign.families.steer import folder_of
from flowalign.families.users import Users, attentions_of
from flowalign.rng import key
from flowalign.settings import Users as Settings

NOBODY = ("",)
"""In place of names that only the data say."""


class Personal(Steered):
    """A denoiser whose attentions read a user beside the prompt; before training they read nothing."""

    def __init__(self, denoiser: nn.Module, users: Users, attentions: list[nn.Module]) -> None:
        nn.Module.__init__(self)
        self.denoiser, self.shift = denoiser, users
        users.attach(attentions)

    def forward(self, family: Family, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's prediction `[R, C, h, w]`; `conditioning` holds shares of users `[R, U]` under `WEIGHTS`."""
        self.shift.tell(self.shift.of(conditioning.tensors[WEIGHTS]))
        return family.predict(self.denoiser, x_t, t, conditioning)


def names_of(settings: Settings | None, train: Cached) -> tuple[str, ...]:
    """Who a policy knows, in the order of its embeddings; nobody without settings. Raises ConfigError and CheckpointError."""
    expected = expected_names(settings)
    return expected if expected != NOBODY else tuple(sorted(name for name in train.annotators if name))


def expected_names(settings: Settings | None) -> tuple[str, ...]:
    """The same without any data: where only they say who there is, one user, whose embedding weighs next to nothing."""
    if settings is None:
        return ()
    if settings.known is None or settings.new is None:
        return settings.names or NOBODY
    names = read_users(settings.known)[0].names
    if settings.new in names:
        raise ConfigError(
            f"users.new is {settings.new!r}, whom {settings.known} knows already; give the new user another name."
        )
    return (*names, settings.new)


def personal_policy(
    policy: nn.Module, settings: Settings | None, names: tuple[str, ...], family: Family, width: int, seed: int
) -> nn.Module:
    """A policy that is ready to train, as the settings make it personal. width: D of the prompt's tokens.

    Raises ConfigError where the family's denoiser has no attention to read by.
    """
    if settings is None:
        return policy
    device = next(policy.parameters()).device
    if settings.known is not None:
        folder = folder_of(settings.known, USERS)
        add_lora(policy, LoraRun(folder, "the run's checkpoint", None, None), family.component)
        policy.requires_grad_(False)
        _, users = read_users(settings.known)
        users.adopt()
    attentions = attentions_of(policy, family.attentions)
    if settings.known is None:
        inner = [attention.to_q.out_features for attention in attentions]
        users = Users(len(names), settings.tokens, width, inner, key(seed, "users"))
    if not attentions:
        raise ConfigError(
            f"users are read by attentions, and a denoiser of the family {family.name!r} has none of the names "
            f"{', '.join(family.attentions)}; set users=null, or take another checkpoint."
        )
    return Personal(policy, users.to(device), attentions)


def kept_lora(settings: Settings | None) -> dict[str, bytes]:
    """The LoRA of the run that a user is taken into, as a file to be written beside what was learned."""
    path = None if settings is None or settings.known is None else folder_of(settings.known, USERS) / LORA
    return {LORA: path.read_bytes()} if path is not None and path.is_file() else {}


def in_turn(names: tuple[str, ...], new: str | None, most: int = 4) -> list[dict[str, float]]:
    """Whom sample pictures are drawn for: a new user, or the first few."""
    return [{name: 1.0} for name in ((new,) if new is not None else names[:most])]
