"""The settings of a run: one typed, frozen tree, each with its default, its range and one line of text."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from flowalign.sections import Below1, Data, Fraction, Loop, Model, Natural, Positive, Rate, Section, Seed, word

AUTO = "auto"
"""As `objective.beta`: found by a probe before the run begins."""


def _ascending(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] >= ends[1]:
        raise ValueError("the first end must be below the second")
    return ends


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
    seed: Seed = 0
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
