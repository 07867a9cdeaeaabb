"""Fields: what they are told, that rows are apart, and that a folder is enough to have one again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flowalign.errors import CheckpointError, ConfigError
from flowalign.flow.field import Field, FieldSettings, load_field, make_field, save_field

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("none", "class", "vector", "tokens")
SHAPES = {"vector": (5,), "picture": (2, 8, 8)}
SIZE = {"none": 0, "class": 3, "vector": 8, "tokens": 8}


def settings(shape: str, kind: str) -> FieldSettings:
    return FieldSettings(SHAPES[shape], kind, SIZE[kind], width=16, levels=2)  # type: ignore[arg-type]


def stirred(shape: str, kind: str) -> Field:
    """A field whose last layer and null are not 0."""
    field = make_field(settings(shape, kind), seed=1)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        for parameter in field.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return field.eval()


def told(kind: str, count: int = 4) -> torch.Tensor | None:
    made = torch.Generator().manual_seed(5)
    return {
        "none": None,
        "class": torch.arange(count) % 3,
        "vector": torch.randn(count, 8, generator=made),
        "tokens": torch.randn(count, 6, 8, generator=made),
    }[kind]


each = pytest.mark.parametrize(("shape", "kind"), [(shape, kind) for shape in SHAPES for kind in KINDS])


@each
def test_a_new_field_is_zero_and_depends_on_its_seed_alone(shape: str, kind: str) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (make_field(settings(shape, kind), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    pairs = list(zip(first.state_dict().values(), again.state_dict().values(), other.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)
    y = torch.randn(2, *SHAPES[shape])
    assert not first(torch.rand(2), y, told(kind, 2)).any()


@each
@torch.no_grad()
def test_rows_are_apart(shape: str, kind: str) -> None:
    field, y, s, context = stirred(shape, kind), torch.randn(4, *SHAPES[shape]), torch.rand(4), told(kind)
    together = field(s, y, context)
    alone = [field(s[n : n + 1], y[n : n + 1], None if context is None else context[n : n + 1]) for n in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, field(s.flip(0), y, context), atol=1e-4)  # time is seen


@each
@torch.no_grad()
def test_what_is_told_counts_and_what_is_dropped_does_not(shape: str, kind: str) -> None:
    field, y, s, context = stirred(shape, kind), torch.randn(4, *SHAPES[shape]), torch.rand(4), told(kind)
    here, dropped = field(s, y, context), torch.tensor([True, False, True, False])
    partly, nothing = field(s, y, context, dropped), field(s, y)
    if kind == "none":
        assert torch.equal(here, nothing)
        return
    assert not torch.allclose(here, field(s, y, context.flip(0)), atol=1e-5)
    torch.testing.assert_close(partly[~dropped], here[~dropped], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(partly[dropped], nothing[dropped], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(partly[dropped], here[dropped], atol=1e-5)
    if kind == "class":
        torch.testing.assert_close(field(s, y, torch.full((4,), -1)), nothing)  # none of the known ones


@each
def test_a_folder_is_enough(shape: str, kind: str, tmp_path: Path) -> None:
    field, y, s = stirred(shape, kind), torch.randn(4, *SHAPES[shape]), torch.rand(4)
    save_field(field, tmp_path, {"more": 1})
    again = load_field(tmp_path)
    assert again.settings == field.settings
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert torch.equal(field(s, y, told(kind)).detach(), again(s, y, told(kind)))
    assert {path.name for path in tmp_path.iterdir()} == {"field.json", "field.safetensors"}
    assert json.loads((tmp_path / "field.json").read_text())["more"] == 1


@pytest.mark.parametrize("broken", ["missing", "json", "weights", "other"])
def test_a_broken_folder_is_one_sentence(broken: str, tmp_path: Path) -> None:
    save_field(stirred("vector", "class"), tmp_path)
    if broken == "missing":
        (tmp_path / "field.json").unlink()
    elif broken == "json":
        (tmp_path / "field.json").write_text("{")
    elif broken == "weights":
        (tmp_path / "field.safetensors").write_bytes(b"nothing")
    else:
        about = json.loads((tmp_path / "field.json").read_text())
        about["field"]["width"] = 32
        (tmp_path / "field.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_field(tmp_path)


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"the shape \[2, 3\] is neither"):
        FieldSettings((2, 3))
    with pytest.raises(ConfigError, match="3 levels halves 10 x 10 2 times"):
        FieldSettings((4, 10, 10), levels=3)
    with pytest.raises(ConfigError, match="'class' does not go with context_size 0"):
        FieldSettings((4,), "class")


@torch.no_grad()
def test_a_unet_takes_pictures_of_other_sizes() -> None:
    assert stirred("picture", "tokens")(torch.rand(1), torch.randn(1, 2, 12, 16), told("tokens", 1)).shape == (1, 2, 12, 16)
