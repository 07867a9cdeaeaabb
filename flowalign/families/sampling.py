"""Drawing pictures with a diffusers pipeline so that each depends on its own seed, not on its batch neighbours."""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from flowalign import plugins
from flowalign.errors import ConfigError, DataError, allowed
from flowalign.families.base import Family
from flowalign.families.latent import compute_dtype
from flowalign.families.loading import digest, family_of
from flowalign.families.steer import Rows, Telling, rows_for, steering_of
from flowalign.files import atomic, text_lines, write_text
from flowalign.rng import starting_noise

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""Sampler name -> diffusers scheduler class and what is set besides the checkpoint's own schedule. For diffusion, not flows."""
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class SamplerSettings:
    """How pictures are drawn. Raises ConfigError."""

    sampler: str = "default"
    """One of `SAMPLERS`, or "default": the checkpoint's own."""
    steps: int = 25
    guidance: float = 5.0
    """Classifier-free guidance scale; 1 or less is none."""
    height: int | None = None
    """Pixels; None: what the checkpoint was trained for."""
    width: int | None = None
    precision: str = "fp32"
    """fp32, fp16 or bf16: that of the pipeline's weights, or of autocast over fp32 weights."""

    def __post_init__(self) -> None:
        if self.sampler not in ("default", *SAMPLERS):
            raise ConfigError(f"sampler {self.sampler!r} is unknown; {allowed(self.sampler, ('default', *SAMPLERS))}.")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision {self.precision!r} is unknown; {allowed(self.precision, PRECISIONS)}.")
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; it must be at least 1.")
        for name, side in (("height", self.height), ("width", self.width)):
            if side is not None and (side < 8 or side % 8):
                raise ConfigError(f"{name} is {side}; it must be a multiple of 8 pixels.")


def picture_size(pipeline: Any, settings: SamplerSettings) -> tuple[int, int]:
    """Height and width in pixels of what `sample` draws. Raises ConfigError if the pipeline cannot draw the size asked for."""
    canvas = _family(pipeline).canvas(pipeline)
    height, width = settings.height or canvas.native, settings.width or canvas.native
    if height % canvas.multiple or width % canvas.multiple:
        raise ConfigError(
            f"height x width is {height} x {width}; both must be multiples of {canvas.multiple} pixels for this checkpoint."
        )
    return height, width


def _family(pipeline: Any) -> type[Family]:
    return plugins.load("families", family_of(type(pipeline).__name__))


def generator_id(pipeline: Any, *others: Any) -> str:
    """What drew a picture: 12 hex digits over all weights, adapters, tokenizers, what steers it, the scheduler's settings.

    others: modules and JSON values that had a part in it and that the pipeline does not hold.
    """
    parts = [part for _, part in sorted(pipeline.components.items()) if part is not None]
    return digest(
        # A scheduler's settings are all there is to it; an image processor's only `to_dict` gives, which `digest` asks for.
        *(dict(part.config) if hasattr(part, "config") and not isinstance(part, nn.Module) else part for part in parts),
        *(() if (steering := steering_of(pipeline)) is None else (steering.fingerprint,)),
        *others,
    )[:12]


def sample(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SamplerSettings,
    *,
    weights: Sequence[Mapping[str, float] | None] | None = None,
    batch_size: int = 4,
    progress: bool = True,
) -> Iterator[tuple[int, Image.Image]]:
    """Yield (index, picture) for each prompt and seed, in order; see `drawn`."""
    for each in drawn(pipeline, prompts, seeds, settings, weights=weights, batch_size=batch_size, progress=progress):
        yield each.index, each.picture


class Drawn(NamedTuple):
    """One picture as it comes from a pipeline."""

    index: int
    seed: int
    picture: Image.Image
    latents: Tensor
    """`[C, h, w]`, what the sampler ended at, in the denoiser's scale and dtype, on its device: decoded, the picture."""


def drawn(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SamplerSettings,
    *,
    weights: Sequence[Mapping[str, float] | None] | None = None,
    batch_size: int = 4,
    progress: bool = True,
) -> Iterator[Drawn]:
    """Draw each prompt with its seed, in order.

    A picture starts from float32 noise made on the CPU by a generator of its own, which a stochastic sampler goes on
    with: it is the picture that the pipeline draws alone with `generator=torch.Generator().manual_seed(seed)`. The
    pipeline's scheduler is put back at the end. weights: of objectives, for each picture, where the pipeline is steered; None
    draws it without, and without any list all are drawn as the pipeline is. Raises ConfigError and DataError.
    """
    _check_lengths(prompts, seeds)
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1.")
    height, width = picture_size(pipeline, settings)
    family = _family(pipeline)
    steering, rows = rows_for(pipeline, weights, len(prompts))
    canvas, denoiser = family.canvas(pipeline), getattr(pipeline, family.component)
    wanted, held = PRECISIONS[settings.precision], compute_dtype(denoiser)
    if held not in (wanted, torch.float32):
        raise ConfigError(f"precision is {settings.precision!r}, but the weights are {held}; open the checkpoint in {wanted}.")
    device = denoiser.device
    shape: tuple[int, int, int] = (canvas.channels, height // canvas.factor, width // canvas.factor)
    own = pipeline.scheduler
    last: dict[str, Tensor] = {}

    def remember(_: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        last["latents"] = given["latents"]
        return given

    pipeline.set_progress_bar_config(disable=True)  # one bar over pictures instead of one per batch
    try:
        pipeline.scheduler = _scheduler(own, settings.sampler, settings.steps)
        with tqdm(total=len(prompts), unit="picture", disable=not progress) as bar:
            for start in range(0, len(prompts), batch_size):
                chosen = range(start, min(start + batch_size, len(prompts)))
                starts, generators = zip(*(starting_noise(seeds[index], shape) for index in chosen), strict=True)
                noise, told = torch.stack(starts), rows and tuple(rows[index] for index in chosen)
                under = nullcontext() if steering is None else steering.under(told)
                with under, torch.no_grad(), _autocast(pipeline, device, wanted) if held != wanted else nullcontext():
                    pictures = pipeline(
                        [prompts[index] for index in chosen],
                        height=height,
                        width=width,
                        num_inference_steps=settings.steps,
                        latents=family.pack(noise).to(device, held),
                        generator=list(generators),
                        callback_on_step_end=remember,
                        **family.call(settings.guidance, len(chosen)),
                    ).images
                bar.update(len(chosen))
                ended = family.unpack(last["latents"], shape[1:])
                own_seeds = [seeds[index] for index in chosen]
                yield from (Drawn(*each) for each in zip(chosen, own_seeds, pictures, ended, strict=True))
    finally:
        pipeline.scheduler = own


@contextmanager
def _autocast(pipeline: Any, device: torch.device, wanted: torch.dtype) -> Iterator[None]:
    """Over float32 weights; a VAE that half precision may overflow, as its settings say, still decodes in float32."""
    vae = pipeline.vae
    with torch.autocast(device.type, wanted):
        if wanted != torch.float16 or not vae.config.get("force_upcast", True):
            yield
            return
        plain = vae.decode

        def decode(latents: Tensor, *given: Any, **named: Any) -> Any:
            with torch.autocast(device.type, enabled=False):
                return plain(latents.to(vae.dtype), *given, **named)

        vae.decode = decode
        try:
            yield
        finally:
            del vae.decode


def _check_lengths(prompts: Sequence[str], seeds: Sequence[int]) -> None:
    if len(prompts) != len(seeds):
        raise DataError(f"there are {len(prompts)} prompts and {len(seeds)} seeds; give one seed for each prompt.")


def _scheduler(own: Any, sampler: str, steps: int) -> Any:
    if own.config.get("shift_terminal") and steps == 1:  # its only level would have to be both the first and the last
        raise ConfigError(
            "steps is 1, and the checkpoint's scheduler has a shift_terminal, which takes at least 2; set steps=2."
        )
    if sampler == "default":
        return type(own).from_config(own.config)
    import diffusers

    name, options = SAMPLERS[sampler]
    if type(own).__name__.startswith("FlowMatch"):
        raise ConfigError(
            f"sampler {sampler!r} is for diffusion models, but the checkpoint is a flow with a {type(own).__name__}; "
            "choose 'default'."
        )
    kind = getattr(diffusers, name)
    if own.config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in inspect.signature(kind).parameters:
        raise ConfigError(f"sampler {sampler!r} knows no zero-terminal-SNR schedule, which this checkpoint has; choose 'ddim'.")
    return kind.from_config(own.config, **options)


def write_images(
    folder: str | Path,
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SamplerSettings,
    *,
    weights: Sequence[Mapping[str, float] | None] | None = None,
    generator: str | None = None,
    keep: Callable[[bytes, Drawn], None] | None = None,
    batch_size: int = 4,
    progress: bool = True,
) -> list[Path]:
    """Draw into `folder` as `INDEX-SEED.png` with a `metadata.jsonl` beside, as `datasets`' image folders have it.

    `generator` names what draws; unless given it is `generator_id(pipeline)`. weights: as of `sample`; an entry holds those of
    its picture. A picture whose entry in `metadata.jsonl` is what would be written again is left alone, so a killed call goes
    on where it was, and one with more prompts at the end draws those. Entries of what this call was not asked for leave the
    table; their files stay. `keep` gets the bytes of each file, and what is in it, before it is written. Returns the paths in
    order. Raises ConfigError and DataError.
    """
    _check_lengths(prompts, seeds)
    folder = Path(folder)
    height, width = picture_size(pipeline, settings)
    how = asdict(settings) | {"height": height, "width": width, "generator": generator or generator_id(pipeline)}
    steering, rows = rows_for(pipeline, weights, len(prompts))
    wanted = [
        {"file_name": f"{index:05d}-{seed}.png", "prompt": prompt, "seed": seed} | how | _under(steering, rows, index)
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    table = folder / "metadata.jsonl"
    before = {name: entry for name, entry in _entries(table).items() if (folder / name).is_file()}
    missing = [index for index, entry in enumerate(wanted) if before.get(entry["file_name"]) != entry]
    # Without what an earlier call asked for, or it would be compared and scored as if this one had.
    known = {entry["file_name"]: entry for entry in wanted if before.get(entry["file_name"]) == entry}
    _write_entries(table, known)  # before any picture is replaced: the table never describes a picture it does not fit
    pictures = drawn(
        pipeline,
        [prompts[index] for index in missing],
        [seeds[index] for index in missing],
        settings,
        weights=None if weights is None else [weights[index] for index in missing],
        batch_size=batch_size,
        progress=progress,
    )
    for each in pictures:
        position, entry, encoded = each.index, wanted[missing[each.index]], io.BytesIO()
        each.picture.save(encoded, format="PNG")
        if keep is not None:
            keep(encoded.getvalue(), each)
        with atomic(folder / entry["file_name"]) as temporary:
            temporary.write_bytes(encoded.getvalue())
        known[entry["file_name"]] = entry
        if position % batch_size == batch_size - 1 or position == len(missing) - 1:
            _write_entries(table, known)
    return [folder / entry["file_name"] for entry in wanted]


def _under(steering: Telling | None, rows: Rows | None, index: int) -> dict[str, dict[str, float]]:
    if steering is None or rows is None or not any(rows[index]):
        return {}
    return {"weights": steering.named(rows[index])}


def _entries(table: Path) -> dict[str, dict[str, Any]]:
    if not table.exists():
        return {}
    try:
        rows = [json.loads(line) for line in text_lines(table) if line.strip()]
        return {row["file_name"]: row for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{table} is not a table of pictures ({error}); move it away or choose another folder.") from error


def _write_entries(table: Path, entries: dict[str, dict[str, Any]]) -> None:
    write_text(table, "".join(json.dumps(entries[name], ensure_ascii=False) + "\n" for name in sorted(entries)))
