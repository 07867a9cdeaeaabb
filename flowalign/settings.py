"""The settings of a run: one typed, frozen tree, each with its default, its range and one line of text."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
AUTO = "auto"
"""As `objective.beta`: found by a probe before the run begins."""


def _ascending(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] >= ends[1]:
        raise ValueError("the first end must be below the second")
    return ends


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
    workers: Natural = 0
    """processes that read data; 0 reads in the training process"""


class Objective(Section):
    """The loss by name; every other key is one of its knobs, such as `beta`."""

    model_config = ConfigDict(extra="allow")

    name: str = "dpo"
    """a module of flowalign.align.objectives, or an installed plugin"""

    @property
    def knobs(self) -> dict[str, Any]:
        """What is written beside `name`; see `check_knobs`."""
        return dict(self.model_extra or {})


class Reference(Section):
    """The model that the policy is compared with."""

    kind: Literal["auto", "adapters_off", "copy", "start", "ema", "refresh", "merged"] = "auto"
    """the pretrained model, as the policy with its adapters off or as a frozen copy (auto takes the first where there are
    adapters); or what `trainable.start` names (start); or one that follows the policy from there: at every step (ema), or every
    so many (refresh); or several models (merged)"""
    decay: Below1 = 0.995
    """ema: what the reference keeps of itself at every step"""
    every: Positive = 100
    """refresh: steps from one refresh to the next"""
    mix: Annotated[float, Field(gt=0, le=1)] = 1.0
    """refresh: how far the reference moves to the policy; 1 makes them equal"""
    checkpoints: tuple[str, ...] = ()
    """merged: run folders and checkpoints of the model's family, the model itself among them if it shall count"""
    weights: tuple[Rate, ...] = ()
    """merged: the share of each, summing to 1; empty shares evenly"""
    merge: Literal["predictions", "harmonic"] = "predictions"
    """merged: the weighted mean of their predictions, or MRPO's weighted harmonic mean of their likelihoods"""
    sharpness: Rate = 2000.0
    """harmonic: κ, nats of log-likelihood for a unit of h; towards 0 the mean error counts, towards infinity the largest"""
    clip: Annotated[float, Field(gt=0, lt=1)] | None = 0.1
    """harmonic: η, how far errors may lie from that of the first checkpoint, as a share of it; null does not clip"""
    bank: Positive | None = None
    """train each comparison on so many fixed draws of time and noise, with the reference's errors stored; null draws anew"""


class Switches(Section):
    """What any objective can be combined with, see docs/switches.md."""

    safeguard: Fraction | None = None
    """μ of SDPO: how much of the chosen picture's gain is protected from the rejected one's loss, 0 to 1; null protects none"""
    winner_nll: Annotated[float, Field(ge=0)] = 0.0
    """λ: adds λ times the chosen pictures' own error to the loss"""
    time_weight: Literal["constant", "min_snr", "sigmoid"] = "constant"
    """factor on a comparison's loss by its noise level"""
    min_snr_gamma: Rate = 5.0
    """γ of min_snr"""
    sigmoid_bias: float = 0.0
    """b of sigmoid, which is σ(b − log SNR)"""
    noise: Literal["shared", "independent", "stored", "inverted"] = "shared"
    """pictures of a comparison get one noise, or each its own: drawn anew, the one it was made from (stored), or the one that
    the reference takes it to (inverted)"""
    inversion_steps: Positive = 10
    """inverted: forward passes of the reference from the picture to its time"""
    mask: Literal["none", "given"] = "none"
    """given: errors count where the masks in the data are white"""
    label_noise: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """probability that a training comparison's vote is turned around, once and for all, 0 to 0.5; for experiments"""
    annotator_types: Positive = 1
    """K of EM-DPO: a policy for each kind of annotator, all adapters over one model, see docs/methods/em_dpo.md"""
    annotator_every: Positive | None = None
    """steps from one guess of who is of which type to the next; null is once all comparisons were trained on"""
    annotator_first: Natural | None = None
    """no such guess before this step, when the policies have hardly moved; null is three times annotator_every"""
    beta: Literal["fixed", "batch", "target", "cosine"] = "fixed"
    """β stays as it is, follows how far the pairs of the last step were apart, moves towards `target_factor`, or falls to ½"""
    target_factor: Annotated[float, Field(gt=0, lt=0.5)] = 0.3
    """target: the mean of σ(−βΔ) that β is moved towards; `objective.beta: auto` aims at it too"""
    pair_scale: Literal["one", "gap"] = "one"
    """gap: the errors of a pair, and so its βΔ, count 2σ(gap of its scores) − 1 times"""


class Trainable(Section):
    """What of the model is trained."""

    kind: Literal["lora", "full", "none"] = "lora"
    """low-rank adapters, all weights, or nothing of it: then what the section users adds learns alone"""
    rank: Positive = 16
    """rank of the adapters"""
    alpha: Rate | None = None
    """scale of the adapters times `rank`; null is `rank`"""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """names of the modules to adapt, or patterns such as up_blocks.*.to_q; null is the family's choice"""
    start: str | None = None
    """a run folder from whose weights training begins; null begins at the model itself"""
    gradient_checkpointing: bool = False
    """less memory for more time"""


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("it names each once")
    return names


class Steer(Section):
    """One policy for many trade-offs between objectives, which a user weighs when drawing, see docs/steer.md."""

    objectives: Annotated[tuple[str, ...], Field(min_length=2), AfterValidator(_once)]
    """names of the objectives, as the column objective_weights of the comparisons has them"""
    form: Literal["tokens", "prompt"] = "tokens"
    """how the policy is told their weights: by what a small network adds to the prompt's tokens, or in words before it"""
    condition: Literal["weights", "scores"] = "weights"
    """weights: under which a comparison holds; or each picture's own scores, 0 to 1, of which targets are given when drawing"""
    hidden: Positive = 64
    """tokens: width of the network"""
    gain: Rate = 10.0
    """tokens: what the network says is multiplied with this, so that it is heard as soon as the denoiser's weights learn"""
    dropout: Fraction = 0.1
    """probability that a comparison trains without its weights; with the empty prompt it always does"""
    contrast: Annotated[float, Field(ge=0)] = 0.0
    """tokens: β_w of MI-EPO's contrast between a comparison's weights and others, half a forward more; 0 has none"""


class Users(Section):
    """One policy for many people, each with an embedding that the denoiser reads, see docs/personal.md."""

    names: tuple[str, ...] = ()
    """who, as the column annotator of the comparisons has them; empty takes all of data.train"""
    tokens: Positive = 4
    """of a user's embedding, each as wide as the prompt's"""
    dropout: Fraction = 0.1
    """probability that a comparison trains for nobody; with the empty prompt it always does"""
    known: str | None = None
    """folder of a run with users to take in one more: nothing of it changes, and only the new one's embedding learns"""
    new: str | None = None
    """name of that user, who judged all comparisons"""


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
    seed: Natural = 0
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


class Train(Loop):
    """How a generator is aligned."""

    backward: Literal["joint", "chunked"] = "joint"
    """keep the activations of a whole micro-step, or of `chunk` pictures at a time for one more forward"""
    chunk: Positive = 8
    """chunked: pictures that go through the denoiser together"""
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    """probability that a comparison trains with the empty prompt"""
    timesteps: Literal["auto", "uniform", "stratified", "antithetic", "logit_normal", "shifted", "importance"] = "auto"
    """how times are drawn, see docs/families.md; auto is the family's, importance learns where gradients are large"""
    timestep_range: Annotated[tuple[Fraction, Fraction], AfterValidator(_ascending)] = (0.0, 1.0)
    """times to train at, 0 clean and 1 noise: layout and style are decided near 1, detail near 0"""


class Guard(Section):
    """What is watched while a run trains, so that it does not collapse unseen, see docs/guard.md."""

    policy: Annotated[Literal["off", "warn", "lower_lr", "rollback", "stop"], BeforeValidator(word)] = "warn"
    """beyond a limit: nothing, a sentence, a lower learning rate, back to the last good state at a lower rate, or the end"""
    winner_error: Rate | None = 0.05
    """largest rise of the chosen pictures' error above its lowest, relative to before training; null does not watch it"""
    negative_margins: Annotated[float, Field(gt=0.5, lt=1)] | None = 0.6
    """largest share of negative margins, in training and in any quarter of the times held out; null does not watch it"""
    accuracy_drop: Annotated[float, Field(gt=0, lt=1)] | None = 0.1
    """largest fall of the held-out accuracy from its best; null does not watch it"""
    spike: Annotated[float, Field(gt=1)] | None = 10.0
    """largest norm of the gradient, and of the way from the first weights, in its running mean; null does not watch it"""
    window: Positive = 500
    """comparisons over which figures of training are averaged, and before which they are not judged"""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """lower_lr and rollback: what the learning rate is multiplied with"""
    lowest: Annotated[float, Field(gt=0, le=1)] = 0.1
    """share of the learning rate that it never goes below; a rollback that would ends the run instead"""


class Sample(Section):
    """Pictures drawn along the way."""

    prompts: tuple[str, ...] | str = ()
    """prompts, or a .txt or .jsonl file of them; empty takes prompts from the validation comparisons"""
    count: Positive = 8
    """pictures at a time"""
    steps: Positive = 25
    """denoising steps"""
    guidance: Annotated[float, Field(ge=0)] = 5.0
    """classifier-free guidance scale"""
    seed: Natural = 0
    """key of the starting noise"""
    batch_size: Positive = 16
    """pictures drawn together"""


class Config(Section):
    """A whole alignment run. Relative paths are relative to the working directory."""

    model: Model
    """a section with a checkpoint"""
    data: Data
    """a section with train"""
    objective: Objective = Objective()
    reference: Reference = Reference()
    switches: Switches = Switches()
    trainable: Trainable = Trainable()
    train: Train = Train()
    steer: Steer | None = None
    """weights of several objectives as an input of the policy; null has none"""
    users: Users | None = None
    """who looks at the pictures as an input of the policy; null has none"""
    guard: Guard = Guard()
    sample: Sample = Sample()
    judges: str | None = None
    """folder of the judges that compare the run with its base; null when there are none"""
    output: str = "runs/align"
    """the run folder"""
