"""Pipelines of every family that draw for a user: what attentions read, who is told, and that it goes away again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign import personal, unsteered
from flowalign.align.personal import Personal
from flowalign.data.weights import WEIGHTS
from flowalign.errors import CheckpointError, ConfigError
from flowalign.families.base import CONTEXT, Family
from flowalign.families.loading import USERS
from flowalign.families.personal import read_users, write_users
from flowalign.families.sampling import SamplerSettings, generator_id, sample
from flowalign.families.users import Reading, Users, attentions_of
from flowalign.settings import Users as Settings
from tests.families.test_every_family import PROMPTS, SIDE, latents, load, plainly, told

ANN_AND_BOB = Settings(names=("ann", "bob"), tokens=3)


@pytest.fixture
def family(checkpoint: Path) -> Family:
    return load(checkpoint)


def some_users(family: Family, *, fresh: bool = False) -> Users:
    """Two users, of whom attentions read something unless they are fresh."""
    width = told(family, PROMPTS[:1]).tensors[CONTEXT].shape[-1]
    inner = [each.to_q.out_features for each in attentions_of(family.denoiser, family.attentions)]
    users = Users(2, 3, width, inner)
    if not fresh:
        generator = torch.Generator().manual_seed(1)
        for reading in users.readings:
            reading.to_v.weight.data.normal_(std=0.5, generator=generator)
    return users.requires_grad_(False)


def saved(folder: Path, users: Users) -> Path:
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / USERS).write_bytes(write_users(ANN_AND_BOB, users))
    return folder


def test_before_training_it_is_the_base_and_for_nobody_it_stays(family: Family) -> None:
    conditioning, x_t, t = told(family, PROMPTS), latents(family), torch.full((4,), 0.6)
    who = conditioning.joined(WEIGHTS, torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.0, 0.0], [0.0, 1.0]]))
    attentions = attentions_of(family.denoiser, family.attentions)
    assert attentions
    with torch.no_grad():
        base = family.predict(family.denoiser, x_t, t, conditioning)
        fresh = some_users(family, fresh=True)
        policy = Personal(family.denoiser, fresh, attentions)
        assert torch.equal(policy(family, x_t, t, who), base)
        other = load(family.located.folder)
        moved = Personal(other.denoiser, some_users(family), attentions_of(other.denoiser, other.attentions))
        found = moved(other, x_t, t, who)
    assert torch.equal(found[2], base[2])
    assert all((found[place] - base[place]).abs().max() > 1e-4 for place in (0, 1, 3))


def test_a_pipeline_tells_prompts_and_no_negative_prompts(checkpoint: Path, family: Family, tmp_path: Path) -> None:
    pipeline, users = plainly(checkpoint), some_users(family)
    before = generator_id(pipeline)
    denoiser = getattr(pipeline, family.component)
    lengths: list[list[int]] = []

    def note(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        lengths.append([len(row) for row in named.get(family.context, given[2] if len(given) > 2 else None)])

    def draw(guidance: float = 3.0, weights: Any = None) -> list[Any]:
        settings = SamplerSettings(steps=2, guidance=guidance, height=SIDE, width=SIDE)
        kept = sample(pipeline, PROMPTS[:2], [0, 1], settings, weights=weights, progress=False)
        return [torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8) for _, picture in kept]

    plain = draw()
    personal(pipeline, saved(tmp_path / "run", users), "ann")
    seen: list[torch.Tensor] = []
    readings = list(pipeline._flowalign_steering.users.readings)
    hook = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    watch = denoiser.register_forward_hook(lambda *_: seen.append(readings[0].tokens.clone()))
    ann = draw()
    hook.remove()
    watch.remove()
    assert not all(torch.equal(*pair) for pair in zip(plain, ann, strict=True))
    told_of = [bool(row.any()) for row in torch.cat(seen)]
    assert told_of.count(True) * 2 == len(told_of) or (family.name == "flux" and all(told_of))  # half are negative prompts
    for row in torch.cat(seen):
        assert not row.any() or torch.allclose(row, users.embeddings[0])
    assert all(torch.equal(*pair) for pair in zip(ann, draw(weights=[{"ann": 2.0}] * 2), strict=True))
    assert all(torch.equal(*pair) for pair in zip(plain, draw(weights=[None] * 2), strict=True))
    bob = draw(weights=[{"bob": 1.0}] * 2)
    mixed = draw(weights=[{"ann": 0.5, "bob": 0.5}, {"bob": 1.0}])
    assert not torch.equal(mixed[0], ann[0]) or not torch.equal(mixed[0], bob[0])
    assert torch.equal(mixed[1], bob[1])
    assert generator_id(pipeline) != before
    unsteered(pipeline)
    assert generator_id(pipeline) == before
    assert all(torch.equal(*pair) for pair in zip(plain, draw(), strict=True))


def test_users_go_where_their_pipeline_goes(checkpoint: Path, family: Family, tmp_path: Path) -> None:
    """It may be moved after they were put into it; the meta device stands for another one."""
    pipeline = personal(plainly(checkpoint), saved(tmp_path / "run", some_users(family)), "ann")
    conditioning, x_t, t = told(family, PROMPTS), latents(family), torch.full((4,), 0.6)
    denoiser, telling = getattr(pipeline, family.component).to("meta"), pipeline._flowalign_steering

    def tell(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (tokens,) = telling.told((named.get(family.context, given[2] if len(given) > 2 else None),), negative=False, both=False)
        return (given, named | {family.context: tokens}) if family.context in named else ((*given[:2], tokens), named)

    denoiser.register_forward_pre_hook(tell, with_kwargs=True, prepend=True)
    tensors = {name: tensor.to("meta") for name, tensor in conditioning.tensors.items()}
    assert family.predict(denoiser, x_t.to("meta"), t.to("meta"), type(conditioning)(tensors)).is_meta
    assert {parameter.device.type for parameter in telling.users.parameters()} == {"meta"}


def test_what_is_read_is_attention_written_out() -> None:
    class Attention(torch.nn.Module):
        heads = 2

        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_out = torch.nn.Linear(5, 8), torch.nn.ModuleList([torch.nn.Linear(8, 5)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.to_q(x)
            return self.to_out[0](x.new_zeros(*x.shape[:2], 8))

    attention, users = Attention(), Users(2, 3, 6, [8])
    reading: Any = users.readings[0]
    assert isinstance(reading, Reading)
    reading.to_v.weight.data.normal_()
    handles = users.attach([attention])
    x = torch.randn(1, 4, 5)
    shares = torch.tensor([[0.25, 0.75]])
    users.tell(users.of(shares))
    tokens = 0.25 * users.embeddings[0] + 0.75 * users.embeddings[1]
    q = x[0] @ attention.to_q.weight.T + attention.to_q.bias
    k, v = tokens @ reading.to_k.weight.T, tokens @ reading.to_v.weight.T
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        weight = (q[:, part] @ k[:, part].T / 2).exp()
        heads.append(weight / weight.sum(1, keepdim=True) @ v[:, part])
    expected = torch.cat(heads, 1) @ attention.to_out[0].weight.T + attention.to_out[0].bias
    torch.testing.assert_close(attention(x)[0], expected)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(attention(x)[0], attention.to_out[0].bias.expand(4, 5))


def test_what_does_not_fit_is_one_sentence(checkpoint: Path, family: Family, tmp_path: Path) -> None:
    pipeline, run = plainly(checkpoint), saved(tmp_path / "run", some_users(family))
    with pytest.raises(ConfigError, match="the user 'eve' is not known to the run; allowed: ann, bob"):
        personal(pipeline, run, "eve")
    with pytest.raises(CheckpointError, match=r"holds no users\.safetensors"):
        personal(pipeline, tmp_path, "ann")
    settings, users = read_users(run)
    assert settings.names == ("ann", "bob")
    other = Users(2, 3, users.embeddings.shape[-1], [reading.to_k.out_features + 1 for reading in users.readings])
    with pytest.raises(CheckpointError, match="take the checkpoint that the run was trained on"):
        personal(pipeline, saved(tmp_path / "other", other), "ann")
    (run / "weights" / USERS).write_bytes(b"0" * 64)
    with pytest.raises(CheckpointError, match="cannot be read"):
        personal(pipeline, run, "ann")
