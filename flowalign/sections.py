"""Sections that the settings of every kind of run have, and the kinds of values in them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]
"""Pictures' seeds are counted up from there, and their tables and generators know numbers below 2**63."""
Rate = Annotated[float, Field(gt=0)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def word(value: Any) -> Any:
    """What YAML 1.1 makes of the word off, back."""
    return "off" if value is False else value


class Section(BaseModel):
    """A part of the tree: it cannot be changed, and refuses keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Model(Section):
    """The generator to align."""

    checkpoint: str
    """a diffusers folder, a single .safetensors file or a hub id"""
    family: str = "auto"
    """kind of generator; auto reads it from the checkpoint"""
    revision: str | None = None
    """branch, tag or commit on the hub"""
    variant: str | None = None
    """weights variant, such as fp16"""
    quantize: Literal["nf4"] | None = None
    """hold the denoiser's frozen linear layers in 4 bits; for LoRA, and needs the extra cuda"""


class Data(Section):
    """The comparisons to learn from."""

    train: str
    """a file, a folder, an address such as s3://… or a hub id of comparisons"""
    validation: str | None = None
    """comparisons to validate on; null holds some prompts of `train` out"""
    held_out: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """fraction of the prompts held out where `validation` is null, 0 to 0.5"""
    validation_limit: Positive | None = 1000
    """validate on at most so many comparisons; prompts of `train` that would be held out beyond them are trained on"""
    format: Literal["auto", "folder", "jsonl", "parquet", "webdataset", "datasets"] = "auto"
    """how `train` and `validation` are stored"""
    columns: dict[str, str] = {}
    """flowalign's column name: the file's column name, where they differ"""
    rewards: dict[str, float] = {}
    """of the scores in the data, those that count and their weights; empty takes the only one"""
    split: str = "train"
    """split of a hub dataset"""
    tie_policy: Literal["soft", "drop"] = "soft"
    """a tie trains with the label 0.5, or is left out"""
    order: Literal["given", "reversed"] = "given"
    """pictures from the best to the worst as the data say, or the other way round: what to move away from"""
    on_bad_row: Literal["skip", "error"] = "skip"
    """a row that cannot be read is counted and skipped, or ends the run"""
    limit: Positive | None = None
    """use the first so many comparisons"""
    resolution: Positive | None = None
    """side in pixels; null is the checkpoint's own"""
    flip: bool = False
    """mirror both pictures of a comparison at random, together"""
    cache: str | None = None
    """folder of encoded pictures and prompts; null is $FLOWALIGN_CACHE or ~/.cache/flowalign"""
    workers: Natural | None = None
    """processes that read data; 0 reads in the training process; null is 2 on a GPU and 0 on a CPU"""


class Loop(Section):
    """What the training loop needs to know, whatever is trained."""

    steps: Positive = 1000
    """optimizer steps"""
    batch_size: Positive = 8
    """comparisons per device and micro-step"""
    accumulation: Positive = 1
    """micro-steps per optimizer step"""
    learning_rate: Rate = 1e-5
    """peak learning rate"""
    warmup_steps: Natural = 0
    """steps of linear warm-up"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """learning rate after the warm-up"""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW with 32-bit or 8-bit state"""
    adam_betas: tuple[Below1, Below1] = (0.9, 0.999)
    """decay of the first and second moment"""
    adam_eps: Rate = 1e-8
    """added to the root of the second moment"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """decoupled weight decay"""
    clip_norm: Rate | None = 1.0
    """largest gradient norm; null does not clip"""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """decay of an exponential moving average of the weights, between 0 and 1; null keeps none"""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """of the forward passes; trained weights stay fp32"""
    compile: bool = False
    """run the denoiser through torch.compile"""
    tf32: bool = True
    """allow TF32 matrix products on the GPU"""
    seed: Seed = 0
    """key of all randomness of the run"""
    log_every: Positive = 10
    """steps between two lines of metrics"""
    validate_every: Positive | None = None
    """steps between validations; null validates at the start and the end"""
    validation_draws: Positive = 4
    """fixed (timestep, noise) draws per validation comparison"""
    sample_every: Positive | None = None
    """steps between sample pictures; null draws them at the start and the end"""
    save_every: Positive | None = 500
    """steps between saved states; null saves at the end"""
    keep_checkpoints: Positive = 2
    """saved states kept, newest first"""
    trackers: tuple[str, ...] = ()
    """trackers of accelerate, such as tensorboard; metrics.jsonl is always written"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    threads: Positive | None = None
    """CPU threads; null is torch's choice"""
    timeout: Rate = 1800.0
    """seconds after which a process that does not answer the others counts as lost"""
