"""The settings of an improvement loop: what is drawn, scored, selected, trained and measured in every round."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from flowalign.flow.settings import Fitting
from flowalign.sections import Below1, Model, Natural, Positive, Rate, Section, Seed, word
from flowalign.settings import Guard, Objective, Reference, Sample, Steer, Switches, Train, Trainable

Several = Annotated[int, Field(ge=2)]


def _odd(count: int) -> int:
    if count % 2 == 0:
        raise ValueError("it must be odd, so that even weights are among them")
    return count


class Generator(Section):
    """An images API in OpenAI's form that draws instead of a checkpoint, see docs/improve.md."""

    url: str
    """its address up to and with /v1, such as https://api.openai.com/v1"""
    model: str
    """the name of its model"""
    key: str | None = None
    """name of the environment variable that holds the key; null takes FLOWALIGN_UPSTREAM_KEY where that is set"""
    size: str | None = None
    """such as 1024x1024; null leaves it to the API"""
    response_format: Literal["b64_json", "url"] | None = None
    """for models that have a choice"""
    seed_field: str | None = None
    """name under which seeds are sent; null sends none, as most such APIs take none"""
    hosts: tuple[str, ...] = ()
    """from which pictures are fetched besides that of `url`, where an answer holds their address"""
    timeout: Rate = 720.0
    """seconds without a byte after which a request has failed"""
    retries: Natural = 3
    """tries after the first, where no picture was drawn for sure"""
    parallel: Positive = 4
    """requests under way at a time"""


class Draw(Section):
    """The pictures of a round."""

    prompts: Positive | None = None
    """prompts of a round, in turn; null takes all of them every time"""
    images: Several = 4
    """pictures of a prompt, under each of its weights where `steer` has any"""
    weights: Positive = 1
    """steer: draws of objective weights that a prompt gets in a round"""
    alpha: Rate = 1.0
    """steer: α of the Dirichlet that they are drawn from; small ones draw corners, large ones the middle"""
    when: Literal["in_turn", "ahead"] = "in_turn"
    """ahead: another process draws the next round while one trains, with a policy that is one round older"""
    steps: Positive = 25
    """denoising steps"""
    guidance: Annotated[float, Field(ge=0)] = 5.0
    """classifier-free guidance scale"""
    sampler: str = "default"
    """as for flowalign generate"""
    batch_size: Positive = 16
    """pictures drawn together"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """of the generator when it draws"""
    resolution: Positive | None = None
    """side in pixels, of drawing and training; null is the checkpoint's own"""
    seed: Seed = 0
    """key of prompts, seeds and replay"""


class Calibrate(Section):
    """How scores become comparable, see docs/calibration.md."""

    pairs: str | None = None
    """labelled comparisons of the first pictures to fit on; null takes the spread of the base's scores within a prompt"""
    by: Literal["mean", "sum", "min", "majority"] = "mean"
    """how rewards are combined; a weighted sum where there are `weights`"""
    weights: dict[str, float] = Field(default_factory=dict)
    """weight of each reward in the sum; empty counts them evenly"""


class Select(Section):
    """Which pictures are held against each other, see docs/selection.md."""

    by: Literal["best_worst", "margin", "frs", "intersection", "majority", "random", "rso"] = "best_worst"
    """how pairs are picked"""
    score: str = "combined"
    """what orders pictures: combined, raw or one reward"""
    most: Positive | None = None
    """pairs of a prompt, the most telling first"""
    least: Annotated[float, Field(ge=0)] | None = None
    """smallest gap of the score"""
    ties: Literal["drop", "keep"] = "drop"
    """equal scores"""
    tie_width: Annotated[float, Field(ge=0)] = 0.0
    """gap up to which scores are equal"""
    temperature: Rate = 0.5
    """β of rso"""
    labels: Literal["votes", "rates"] = "votes"
    """rates: how far apart the scores are is the label, not that they are"""
    pair_weights: Literal["even", "histogram"] = "even"
    """histogram: pairs of rare gaps count more"""
    order: Literal["none", "random", "explicit", "implicit", "potential"] = "none"
    """which of the picked pairs are kept; the last two ask the policy for its margins"""
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.4
    """share of the pairs that an order keeps"""
    potential_weight: Annotated[float, Field(ge=0)] = 1.0
    """w of the alignment potential"""
    draws: Positive = 32
    """times and noises of the panel that margins are asked over"""


class Replay(Section):
    """Comparisons of earlier rounds that are trained on again."""

    rounds: Natural = 0
    """how many rounds back"""
    share: Below1 = 0.25
    """share of what is trained on that comes from them, at most"""


class Evaluate(Section):
    """What is measured after every round, on prompts that are not trained on, beside the rewards."""

    judges: str | None = None
    """folder of judges; null has none"""
    rewards: tuple[str | dict[str, Any], ...] = ()
    """rewards that nothing is trained on, as judges"""
    prompts: Positive | None = None
    """so many of the held-out prompts, evenly spread; null takes all"""
    images: Several = 2
    """pictures of a prompt, with the same seeds in all rounds"""
    weights: Annotated[int, Field(ge=3), AfterValidator(_odd)] = 3
    """steer: objective weights that each is drawn under, an odd number, of two objectives from corner to corner; of more always
    their corners and the middle"""
    seed: Seed = 7
    """the first seed"""
    features: Literal["pixels", "tower"] = "pixels"
    """in what the pictures of a prompt differ: small copies of them, or what an image tower sees (extra demo)"""


class Hacking(Section):
    """Signs between rounds that the rewards are pleased and nothing else, see docs/improve.md."""

    policy: Annotated[Literal["off", "warn", "stop"], BeforeValidator(word)] = "stop"
    """nothing, a sentence, or the end, with the best of the rounds before"""
    diversity_drop: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """largest fall of the diversity of a prompt's pictures, as a share of the base's"""


class ImproveConfig(Section):
    """A whole loop. Relative paths are relative to the working directory."""

    fit: Literal["weights", "flow"] = "weights"
    """what learns in a round: the model's weights, or a flow behind a generator that stays as it is"""
    model: Model | None = None
    """a section with a checkpoint, which draws; beside `generator` only its autoencoder and text encoders are used"""
    generator: Generator | None = None
    """fit=flow: an images API that draws; null draws with the model"""
    flow: Fitting = Fitting()
    """fit=flow: how the flow of each round is fitted and applied"""
    prompts: str | tuple[str, ...]
    """a .txt or .jsonl file of prompts, or prompts"""
    held_out: Positive | str = 32
    """a file of prompts to evaluate on, or how many of `prompts` are kept for that"""
    rounds: Positive = 4
    """how often"""
    rewards: Annotated[tuple[str | dict[str, Any], ...], Field(min_length=1)]
    """what flowalign score takes: names, settings or files of them"""
    draw: Draw = Draw()
    calibrate: Calibrate = Calibrate()
    select: Select = Select()
    replay: Replay = Replay()
    objective: Objective = Objective()
    reference: Reference = Reference()
    switches: Switches = Switches()
    trainable: Trainable = Trainable()
    train: Train = Train()
    steer: Steer | None = None
    """one policy for all weights of several rewards, trained on its own pictures, see docs/steer.md; null has none"""
    guard: Guard = Guard()
    sample: Sample = Sample(count=1, steps=1)
    evaluate: Evaluate = Evaluate()
    hacking: Hacking = Hacking()
    best: str = "combined"
    """which round is kept: the highest combined reward on held-out prompts, or the highest of one measure there, or of the
    hypervolume of several rewards"""
    output: str = "runs/improve"
    """the run folder"""
