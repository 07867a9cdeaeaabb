"""Shared fixtures, and an environment in which no test reaches the network or the user's own cache."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from flowalign.settings import Config
    from flowalign.setup import Prepared

ROOT = Path(__file__).resolve().parents[1]

# Set before any test module imports torch or a Hugging Face library: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "2")  # tiny tensors: more threads only get in each other's way
os.environ.setdefault("MKL_NUM_THREADS", os.environ["OMP_NUM_THREADS"])


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The default cache folder of the whole test session."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWALIGN_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def emoji() -> Path:
    """The bundled pictures, comparisons and models."""
    return ROOT / "samples" / "emoji"


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Published weights and numbers that the project does not ship; tests that need them skip without."""
    folder = Path(os.environ.get("FLOWALIGN_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set FLOWALIGN_TEST_DATA to the folder of test data")
    return folder


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """install("losses", source, "mine = losses:mine", ...): a third party's package of one module that offers objectives."""

    def make(module: str, source: str, *objectives: str) -> None:
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("\n".join(["[flowalign.objectives]", *objectives]))
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

    return make


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums are added in the same order, as in processes that were forked."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bitsandbytes() -> Any:
    """The package of the extra cuda, which computes on CPUs as well."""
    return pytest.importorskip("bitsandbytes", reason="the extra cuda is not installed")


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def schedulers() -> dict[str, Any]:
    """One scheduler per kind of prediction, and by that one tiny checkpoint per kind."""
    from diffusers import DDIMScheduler, PNDMScheduler

    return {
        "epsilon": PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
            set_alpha_to_one=False,
        ),
        "v_zero_snr": DDIMScheduler(  # fewer times than the usual 1000, and a last one that is all noise
            num_train_timesteps=250,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            clip_sample=False,
            steps_offset=1,
        ),
        "sample": DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False, steps_offset=1),
    }


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=16)


def tiny_pipeline(kind: str, scheduler: Any) -> StableDiffusionPipeline:
    """A Stable Diffusion of the real classes with random weights: 16 letters of text, 32 px pictures, latents of 16 x 16."""
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=2 + 2 * len(LETTERS),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=32,
        scaling_factor=0.3,
        shift_factor=0.07 if kind == "sample" else None,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=clip_tokenizer(),
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A diffusers folder of a tiny random Stable Diffusion per kind of prediction."""
    root = tmp_path_factory.mktemp("checkpoints")
    for kind, scheduler in schedulers().items():
        tiny_pipeline(kind, scheduler).save_pretrained(root / kind)
    return {kind: root / kind for kind in schedulers()}


@pytest.fixture(scope="session")
def votes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve comparisons of noisy pictures: a reddish one is preferred to a bluish one, over six prompts."""
    import numpy as np
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("votes"), np.random.default_rng(0)
    lines = []
    for place in range(12):
        row = {"prompt": f"{LETTERS[place % 6]} thing"}
        for side, tint in (("chosen", (200, 60, 40)), ("rejected", (40, 60, 200))):
            pixels = np.clip(rng.normal(tint, 50, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{place}-{side}.png")
            row[side] = f"{place}-{side}.png"
        lines.append(json.dumps(row) + "\n")
    (folder / "votes.jsonl").write_text("".join(lines))
    return folder / "votes.jsonl"


@pytest.fixture(scope="session")
def settings(folders: dict[str, Path], votes: Path) -> Callable[..., Config]:
    """settings(output, "train.steps=3", ...): a tiny run on the CPU, with overrides as on the command line."""
    from flowalign.config import parse

    def make(output: Path, *overrides: str) -> Config:
        tree = {
            "model": {"checkpoint": str(folders["epsilon"])},
            "data": {"train": str(votes), "validation": str(votes), "resolution": 16},
            "objective": {"beta": 500.0},
            "trainable": {"rank": 4},
            "train": {
                "steps": 4,
                "batch_size": 2,
                "learning_rate": 1e-3,
                "precision": "fp32",
                "validation_draws": 1,
                "log_every": 1,
                "device": "cpu",
            },
            "sample": {"count": 1, "steps": 1},
            "output": str(output),
        }
        return parse(tree, "test", overrides)

    return make


@pytest.fixture
def prepared(settings: Callable[..., Config], tmp_path: Path) -> Callable[..., Prepared]:
    """prepared("trainable.kind=full", ...): the parts of a tiny run, ready to train."""
    from flowalign.device import make_accelerator
    from flowalign.setup import prepare

    def make(*overrides: str) -> Prepared:
        config = settings(tmp_path / "run", *overrides)
        return prepare(config, make_accelerator(config, tmp_path / "run"), progress=False)

    return make


@pytest.fixture
def no_read_back() -> Callable[[], AbstractContextManager[Any]]:
    """A context in which it fails where a tensor's value is read by Python, which on a GPU waits for all work before it."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoReadBack(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal):
                raise AssertionError(f"{func} reads back from the device")
            return func(*args, **(kwargs or {}))

    def refuse(self: torch.Tensor, *_: Any) -> Any:
        raise AssertionError("tolist or numpy reads back from the device")

    @contextmanager
    def forbidden() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch, NoReadBack():
            for name in ("tolist", "numpy"):  # no operators, so that a dispatch mode does not see them
                patch.setattr(torch.Tensor, name, refuse)
            yield

    return forbidden
