"""The settings of a flow: what it moves, what it knows, how it is trained and how it is applied."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from flowalign.sections import Data, Fraction, Loop, Positive, Rate, Section, Seed


class Model(Section):
    """The checkpoint whose autoencoder and text encoders are used; its denoiser is not."""

    checkpoint: str
    """a diffusers folder, a single .safetensors file or a hub id"""
    family: str = "auto"
    """kind of generator; auto reads it from the checkpoint"""
    revision: str | None = None
    """branch, tag or commit on the hub"""
    variant: str | None = None
    """weights variant, such as fp16"""


class Space(Section):
    """What is moved."""

    kind: Literal["latents", "pixels"] = "latents"
    """the latents of an autoencoder, or small pictures themselves"""
    autoencoder: str | None = None
    """latents: folder or hub id of a diffusers autoencoder; null takes that of model.checkpoint"""
    fit: Literal["scale", "tile"] = "scale"
    """pictures of other sizes: change them at the resolution trained on and scale up what changed, or work in tiles of it"""


class Context(Section):
    """What the field is told about a picture."""

    kind: Literal["prompt", "class", "none"] = "prompt"
    """the prompt as the checkpoint's text encoder sees it, the prompt as one of those in the training data, or nothing"""
    dropout: Fraction = 0.1
    """probability that a pair trains without it, which guidance needs"""


class Velocity(Section):
    """The network that the field is."""

    width: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    """channels of its first level"""
    levels: Annotated[int, Field(ge=1, le=6)] = 3
    """resolutions that it works at, each half the one before"""
    blocks: Positive = 1
    """residual blocks a level"""


class Match(Section):
    """How rejected and chosen pictures are joined."""

    coupling: Literal["paired", "independent", "ot", "ot_per_context"] = "paired"
    """the given pairs; any with any; the nearest of a batch; the nearest of a batch among those of one prompt"""
    sigma: Annotated[float, Field(ge=0)] = 0.1
    """σ, standard deviation of the noise around the path"""


class Solve(Section):
    """How the flow is applied."""

    solver: Literal["euler", "midpoint", "heun2", "rk4", "dopri5"] = "midpoint"
    """of fixed steps, all but dopri5, which chooses its own"""
    steps: Positive = 8
    """steps of an iteration; dopri5 takes none"""
    strength: Fraction = 1.0
    """how far along the path pictures are moved: 0 leaves them as they are, 1 goes to the end"""
    iterations: Positive = 1
    """how often the flow is applied, one after the other"""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """scale of classifier-free guidance; 1 is none and needs half the evaluations"""
    tolerance: Rate = 1e-4
    """dopri5: absolute and relative error of a step"""
    max_evaluations: Positive = 1000
    """dopri5: evaluations of the field in an iteration after which it gives up"""
    batch_size: Positive = 16
    """pictures moved together"""


class Domain(Section):
    """What happens to pictures unlike those trained on."""

    quantile: Annotated[float, Field(gt=0.5, lt=1)] | None = 0.99
    """share of held-out training pictures moved at full strength; beyond, strength falls smoothly; null never lowers it"""


class Scores(Section):
    """Comparisons made from a score table: the best and the worst of each n pictures of a prompt."""

    table: str
    """a Parquet file that flowalign score wrote"""
    reward: str | None = None
    """which reward counts; null takes the combined score, or the only reward"""
    n: Annotated[int, Field(ge=2)] | None = None
    """pictures that are compared at a time; null takes all of a prompt"""


class Train(Loop):
    """How the field is trained."""

    learning_rate: Rate = 1e-3
    """peak learning rate"""
    batch_size: Positive = 32
    """comparisons per device and micro-step"""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = 0.995
    """decay of an exponential moving average of the weights, between 0 and 1; null keeps none"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """of the forward passes; trained weights stay fp32"""


class Pairs(Data):
    """The comparisons to learn from."""

    train: str = ""
    """a file, a folder, an address such as s3://… or a hub id of comparisons; empty where `scores` is given"""


class Fitting(Section):
    """How a flow is fitted and applied, whatever to."""

    space: Space = Space()
    context: Context = Context()
    field: Velocity = Velocity()
    match: Match = Match()
    train: Train = Train()
    solve: Solve = Solve()
    domain: Domain = Domain()


class FlowConfig(Fitting):
    """A whole flow. Relative paths are relative to the working directory."""

    model: Model | None = None
    """a section with a checkpoint; null where neither its autoencoder nor its text encoders are used"""
    data: Pairs = Pairs()
    """a section with train"""
    scores: Scores | None = None
    """make the comparisons from a score table instead; null takes data.train"""
    seed: Seed = 0
    """key of what is drawn when pairs are made from scores"""
    judges: str | None = None
    """folder of the judges that compare pictures before and after; null when there are none"""
    output: str = "runs/flow"
    """the run folder"""
