"""Train `emoji-clip`, the CLIP-shaped reward model of the embedded pictures, and the linear head `style` on it.

    python samples/emoji/emoji_clip.py copies   drawings as `tiny-sd`'s autoencoder draws them; text states of captions
    python samples/emoji/emoji_clip.py train    the image tower and both projections; resumable
    python samples/emoji/emoji_clip.py export   fp16 open_clip folder, style head, card with held-out figures, curves

The text tower and the tokenizer are those of `tiny-sd`, locked (Zhai et al., 2022, arXiv:2111.07991): with 1,391 concepts to
learn from, a text tower that may move forgets what words mean that no caption has. The image tower starts from nothing.
Only train concepts are seen, as pictures or as captions. Stages meet in --work (default runs/emoji-clip-training). All three
take twenty minutes of one CPU core.
"""

from __future__ import annotations

import copy
import io
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pretrain
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from pretrain import HERE, STYLE_WORDS
from safetensors.torch import save_file
from torch import Tensor

from flowalign.files import atomic, atomic_folder, write_text

SIDE, EMBED, TOKENS = 64, 256, 32
COPIES = 3  # of each drawing, through the autoencoder
LATENT_NOISE = 0.3  # largest spread of the noise on latents, whose own spread is 1
TEXTS = 16  # prompts of each concept
SOFT = 0.2  # share of the target that goes to concepts of like meaning
MODEL = {
    "embed_dim": EMBED,
    "quick_gelu": True,
    "vision_cfg": {"image_size": SIDE, "layers": [2, 2, 2, 1], "width": 24, "head_width": 64},
    "text_cfg": {
        "context_length": TOKENS,
        "vocab_size": 3019,
        "width": 256,
        "heads": 4,
        "layers": 2,
        "hf_tokenizer_name": "emoji-clip",  # a folder of this layout brings its own; open_clip asks for a name all the same
    },
}
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
SIDED = ("left", "right", "clock", "o’clock")  # words that a mirror makes wrong
CURVES = {
    "train": ("loss", "contrastive loss, train"),
    "held_out": ("recall_at_1", "held-out captions to pictures: recall at 1"),
}


def drawings(split: str) -> list[dict]:
    """Rows of both files; skin-tone variants for training only, since held-out figures count each concept once."""
    rows = pretrain.load_rows(split)
    if split == "train":
        tones = pq.read_table(HERE / "skin_tones.parquet").to_pylist()
        rows += [row for row in tones if row["split"] == split]
    return rows


def pictures_of(rows: list[dict]) -> Tensor:
    """[N, 3, 64, 64] uint8"""
    pictures = [np.array(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def to_input(pictures: Tensor) -> Tensor:
    """uint8 [B, 3, 64, 64] -> what the image tower sees, [-1, 1]"""
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


# -------------------------------------------------------------------------------------------------------------- copies
@torch.inference_mode()
def decoded(pictures: Tensor, copies: int, seed: int) -> Tensor:
    """[N, 3, 64, 64] -> [N, copies, 3, 64, 64] uint8, from latents with noise of growing spread; the first from exact ones."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(HERE / "tiny-sd" / "vae", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for place, chunk in enumerate(pictures.split(32)):
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(to_input(chunk)).latent_dist.mean.float()
            spread = torch.rand(len(chunk), copies, 1, 1, 1, generator=generator) * LATENT_NOISE
            spread[:, 0] = 0
            noise = torch.randn(len(chunk), copies, *mean.shape[1:], generator=generator)
            pixels = vae.decode((mean[:, None] + spread * noise).flatten(0, 1)).sample.float()
        pixels = ((pixels + 1) * 127.5).round().clamp(0, 255).byte()
        found.append(pixels.contiguous().unflatten(0, (len(chunk), copies)))
        if place % 20 == 0:
            print(f"copies {place * 32}/{len(pictures)}", flush=True)
    return torch.cat(found)


def texts_of(row: dict, rng: random.Random) -> list[tuple[str, str]]:
    """TEXTS prompts of a concept and the style that each names, "" for none: half of them its caption."""
    found = [(row["caption"], "")] * (TEXTS // 2 - 2)
    found += [(f"{row['caption']}, {words}", style) for style, words in STYLE_WORDS.items() for _ in range(2)]
    while len(found) < TEXTS:
        prompts = pretrain.prompts_of(row, rng)
        found.append((prompts["tags" if len(found) % 2 else "both"], ""))
    return found


def make_copies(work: Path, steps: int) -> None:
    """Everything that training reads, in one file. `steps` counts copies of each drawing."""
    from transformers import CLIPTextModel, CLIPTokenizer

    rows, rng = drawings("train"), random.Random(5)
    pictures = pictures_of(rows)
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "tiny-sd" / "tokenizer")
    tower = CLIPTextModel.from_pretrained(HERE / "tiny-sd" / "text_encoder", dtype=torch.float32).eval()
    concepts = {row["concept"]: row for row in rows}  # in order of appearance
    texts = [texts_of(row, rng) for row in concepts.values()]
    number = {text: place for place, text in enumerate(dict.fromkeys(text for each in texts for text, _ in each))}
    states = []
    with torch.inference_mode():
        for start in range(0, len(number), 256):
            tokens = pretrain.tokenize(tokenizer, list(number)[start : start + 256])
            length = int((tokens != tokenizer.eos_token_id).sum(1).max()) + 1  # later places change nothing: causal
            states.append(tower(tokens[:, :length]).pooler_output)
    styles = {"": 0, "noto": 1, "fluent": 2}
    place = {concept: index for index, concept in enumerate(concepts)}
    mirrored = [
        row["group"] not in ("symbols", "flags") and not any(word in row["caption"].split() for word in SIDED) for row in rows
    ]
    torch.save(
        {
            "pictures": torch.cat([pictures[:, None], decoded(pictures, steps, seed=0)], 1),
            "concept": torch.tensor([place[row["concept"]] for row in rows]),
            "style": torch.tensor([styles[row["style"]] for row in rows]),
            "mirrored": torch.tensor(mirrored),
            "states": torch.cat(states),
            "texts": torch.tensor([[number[text] for text, _ in each] for each in texts]),
            "text_style": torch.tensor([[styles[style] for _, style in each] for each in texts]),
        },
        work / "copies.pt",
    )
    print(f"{len(rows)} drawings of {len(concepts)} concepts, {len(number)} prompts")


# --------------------------------------------------------------------------------------------------------------- train
@dataclass
class World:
    """What training draws from; see `make_copies`."""

    pictures: Tensor
    concept: Tensor
    style: Tensor
    mirrored: Tensor
    states: Tensor
    texts: Tensor
    text_style: Tensor

    def __post_init__(self) -> None:
        self.rows = [(self.concept == index).nonzero()[:, 0] for index in range(len(self.texts))]
        centred = self.states[self.texts[:, 0]] - self.states[self.texts[:, 0]].mean(0)
        meaning = F.normalize(centred, dim=1)
        self.alike = meaning @ meaning.T
        """How alike two captions are to the text tower, [concepts, concepts]"""

    def draw(self, concepts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Two drawings of each of so many concepts, in both styles where there are two: input [B, 3, 64, 64], text states
        [B, 256], target [B, B] of picture -> text and of text -> picture, rows adding up to 1."""
        chosen = torch.randperm(len(self.texts))[:concepts].tolist()
        index = []
        for concept in chosen:
            rows = self.rows[concept]
            noto, fluent = rows[self.style[rows] == 1], rows[self.style[rows] == 2]
            # The plain drawing comes first and is taken half the time, so that hands and people are not mostly brown.
            index.append(noto[0] if random.random() < 0.5 else random.choice(noto))
            index.append(fluent[0] if len(fluent) else random.choice(noto))
        rows = torch.stack(index)
        copies = torch.randint(self.pictures.shape[1], (len(rows),))
        copies[torch.rand(len(rows)) < 0.3] = 0
        x = augment(self.pictures[rows, copies].float() / 127.5 - 1, self.mirrored[rows])
        slot = torch.randint(self.texts.shape[1], (len(rows),))
        concept = self.concept[rows]
        text, named = self.texts[concept, slot], self.text_style[concept, slot]
        right = (concept[:, None] == concept) & ((named == 0) | (named == self.style[rows][:, None]))
        alike = (self.alike[concept][:, concept] / 0.1).masked_fill((named > 0) & (named != self.style[rows][:, None]), -30.0)
        to_text, to_picture = (
            (1 - SOFT) * hard / hard.sum(1, keepdim=True).clamp_min(1) + SOFT * soft.softmax(1)
            for hard, soft in ((right.float(), alike), (right.T.float(), alike.T))
        )
        return x.contiguous(memory_format=torch.channels_last), self.states[text], to_text, to_picture


def augment(x: Tensor, mirrored: Tensor) -> Tensor:
    """Pictures [B, 3, 64, 64] in [-1, 1], each moved, scaled, turned, recoloured, blurred, speckled or partly covered."""
    count = len(x)

    def spread(low: float, high: float) -> Tensor:
        return torch.empty(count).uniform_(low, high)

    def some(share: float) -> Tensor:
        return torch.rand(count) < share

    scale, turn = spread(0.85, 1.2), spread(-0.2, 0.2) * some(0.7)
    flip = torch.where(mirrored & some(0.5), -1.0, 1.0)
    cos, sin = turn.cos() * scale, turn.sin() * scale
    theta = torch.stack([cos * flip, -sin, spread(-0.15, 0.15), sin * flip, cos, spread(-0.15, 0.15)], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x - 1, grid, mode="bilinear", align_corners=False) + 1  # white around
    blurred = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    x = torch.where(some(0.3)[:, None, None, None], torch.lerp(x, blurred, spread(0, 1)[:, None, None, None]), x)
    gain = 1 + 0.15 * torch.randn(count, 3, 1, 1) * some(0.5)[:, None, None, None]
    x = (x - 1) * gain + 1 - 0.1 * torch.rand(count, 1, 1, 1) * some(0.3)[:, None, None, None]
    grey = x.mean(1, keepdim=True)
    x = torch.where(some(0.3)[:, None, None, None], torch.lerp(grey, x, spread(0.3, 1.5)[:, None, None, None]), x)
    x = x + torch.randn_like(x) * (spread(0, 0.12) * some(0.4))[:, None, None, None]
    for row in some(0.3).nonzero()[:, 0].tolist():
        height, width = random.randrange(8, 25), random.randrange(8, 25)
        top, left = random.randrange(SIDE - height), random.randrange(SIDE - width)
        x[row, :, top : top + height, left : left + width] = random.uniform(-1, 1)
    return x.clamp(-1, 1)


def build() -> torch.nn.Module:
    """The open_clip model with `tiny-sd`'s text tower in its place."""
    from open_clip.model import CLIP
    from transformers import CLIPTextModel

    text = {name: value for name, value in MODEL["text_cfg"].items() if name != "hf_tokenizer_name"}
    model = CLIP(EMBED, MODEL["vision_cfg"], text, quick_gelu=True)
    theirs = CLIPTextModel.from_pretrained(HERE / "tiny-sd" / "text_encoder", dtype=torch.float32).state_dict()
    state = {
        "token_embedding.weight": theirs["embeddings.token_embedding.weight"],
        "positional_embedding": theirs["embeddings.position_embedding.weight"],
        "ln_final.weight": theirs["final_layer_norm.weight"],
        "ln_final.bias": theirs["final_layer_norm.bias"],
    }
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    names["self_attn.out_proj"] = "attn.out_proj"
    for layer in range(MODEL["text_cfg"]["layers"]):
        here, there = f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
        for part in ("weight", "bias"):
            query, key, value = (theirs[f"{there}self_attn.{which}_proj.{part}"] for which in "qkv")
            state[f"{here}attn.in_proj_{part}"] = torch.cat([query, key, value])
            state |= {f"{here}{ours}.{part}": theirs[f"{there}{name}.{part}"] for name, ours in names.items()}
    missing, unknown = model.load_state_dict(state, strict=False)
    if unknown or any(not name.startswith(("visual.", "text_projection", "logit_scale")) for name in missing):
        raise SystemExit(f"the text tower does not fit: {unknown}, {missing}")
    return model.to(memory_format=torch.channels_last)


def retrieval(images: Tensor, texts: Tensor) -> dict[str, float]:
    """Unit vectors [M, D] of pictures and of their captions -> recall both ways and the mean score of right and wrong ones."""
    scores = texts @ images.T
    found: dict[str, float] = {"candidates": len(scores)}
    for name, table in (("caption_to_picture", scores), ("picture_to_caption", scores.T)):
        rank = (table > table.diagonal()[:, None]).sum(1)
        for k in (1, 5, 10):
            found[f"{name}_recall_at_{k}"] = (rank < k).float().mean().item()
    found["mean_right_caption"] = scores.diagonal().mean().item()
    found["mean_wrong_caption"] = ((scores.sum() - scores.diagonal().sum()) / (scores.numel() - len(scores))).item()
    return found


def train(work: Path, steps: int, concepts: int = 112, lr: float = 2e-3, decay: float = 0.99) -> None:
    """AdamW on image tower, projections and scale, with an average of the weights; logs how held-out concepts are found."""
    world = World(**torch.load(work / "copies.pt", weights_only=True))
    model = build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("visual.") or name in ("text_projection", "logit_scale"))
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained, everything = (sum(p.numel() for p in each) / 1e6 for each in (moving, model.parameters()))
    print(f"{trained:.2f} M of {everything:.2f} M parameters")
    groups = [
        {"params": [p for p in moving if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in moving if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    held = pretrain.load_rows("held_out")
    held = [row for row in held if row["style"] == "noto"]
    held_pictures, held_tokens = to_input(pictures_of(held)), tokens_of([row["caption"] for row in held])
    first, seconds, state_path = 0, 0.0, work / "train-state.pt"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
        print(f"continuing from step {first}")
    started, running = time.time() - seconds, []
    for step in range(first, steps):
        torch.manual_seed(step)  # a continued run draws what an uninterrupted one would
        random.seed(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * pretrain.warm_cosine(step, steps)
        x, texts, to_text, to_picture = world.draw(concepts)
        with torch.autocast("cpu", torch.bfloat16):
            images = model.visual(x)
        images = F.normalize(images.float(), dim=1)
        texts = F.normalize((texts + 0.05 * texts.std(0) * torch.randn_like(texts)) @ model.text_projection, dim=1)
        logits = model.logit_scale.exp().clamp(max=50) * images @ texts.T
        loss = (F.cross_entropy(logits, to_text) + F.cross_entropy(logits.T, to_picture)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(moving, 1.0)
        optimizer.step()
        rate = 1 - min(decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for old, new in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
                old.lerp_(new, rate) if old.is_floating_point() else old.copy_(new)
        running.append(loss.item())
        if step % 50 == 49 or step == steps - 1:
            elapsed = time.time() - started
            pretrain.log(work / "train.jsonl", step=step + 1, loss=sum(running) / len(running), seconds=elapsed)
            running = []
        if step % 200 == 199 or step == steps - 1:
            with torch.no_grad():
                found = retrieval(
                    F.normalize(ema.encode_image(held_pictures), dim=1), F.normalize(ema.encode_text(held_tokens), dim=1)
                )
            pretrain.log(work / "held_out.jsonl", step=step + 1, recall_at_1=found["caption_to_picture_recall_at_1"])
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            with atomic(state_path) as temporary:
                torch.save(state | {"step": step + 1, "seconds": time.time() - started}, temporary)


def tokens_of(texts: list[str]) -> Tensor:
    from transformers import CLIPTokenizer

    return pretrain.tokenize(CLIPTokenizer.from_pretrained(HERE / "tiny-sd" / "tokenizer"), texts)


# -------------------------------------------------------------------------------------------------------------- export
@torch.no_grad()
def settle(model: torch.nn.Module, pictures: Tensor) -> None:
    """Batch statistics of the averaged weights, over pictures as they are scored: not augmented."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the plain mean over all batches
    model.train()
    for chunk in pictures[torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))].split(256):
        model.visual(to_input(chunk))
    model.eval()


@torch.no_grad()
def embed(model: torch.nn.Module, pictures: Tensor) -> Tensor:
    """uint8 [N, 3, 64, 64] -> unit vectors [N, 256]"""
    return F.normalize(torch.cat([model.encode_image(to_input(chunk)) for chunk in pictures.split(256)]), dim=1)


def fit_style(x: Tensor, fluent: Tensor, l2: float = 1e-5) -> dict[str, Tensor]:
    """Logistic regression on unit vectors [M, D] with an L2 penalty, both styles weighing the same -> the head, a Linear."""
    weight, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")
    each = torch.where(fluent, 0.5 / fluent.sum(), 0.5 / (~fluent).sum())

    def closure() -> Tensor:
        solver.zero_grad()
        loss = (F.binary_cross_entropy_with_logits(x @ weight + bias, fluent.float(), reduction="none") * each).sum()
        loss = loss + l2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return {"weight": weight.detach()[None].clone(), "bias": bias.detach()[None].clone()}


def style_figures(logits: Tensor, fluent: Tensor) -> dict[str, float]:
    """Accuracy at 0, and how often a Fluent drawing scores above a Noto one (area under the ROC curve)."""
    above = (logits[fluent][:, None] > logits[~fluent]).float().mean()
    return {
        "accuracy": ((logits > 0) == fluent).float().mean().item(),
        "area_under_roc": above.item(),
        "mean_fluent": logits[fluent].mean().item(),
        "mean_noto": logits[~fluent].mean().item(),
    }


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def export(work: Path, out: Path, picture: Path) -> None:
    """An open_clip folder: `open_clip.create_model("local-dir:samples/emoji/emoji-clip")` builds it."""
    import open_clip
    from transformers import CLIPTokenizer

    world = World(**torch.load(work / "copies.pt", weights_only=True))
    state = torch.load(work / "train-state.pt", weights_only=True)
    model = build()
    model.load_state_dict(state["ema"])
    plain = torch.ones(len(world.pictures), dtype=torch.bool)
    plain[len(pretrain.load_rows("train")) :] = False  # skin tones would make two of three Noto drawings hands and people
    settle(model, world.pictures[plain].flatten(0, 1))
    halved = {
        name: value.half().contiguous() if value.is_floating_point() else value for name, value in model.state_dict().items()
    }
    with atomic_folder(out) as folder:
        CLIPTokenizer.from_pretrained(HERE / "tiny-sd" / "tokenizer").save_pretrained(folder)
        save_file(halved, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
        write_text(
            folder / "open_clip_config.json", json.dumps({"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}, indent=1) + "\n"
        )
        model = open_clip.create_model(f"local-dir:{folder}").eval()  # what is judged is what is shipped

        x = embed(model, world.pictures[plain].flatten(0, 1))
        fluent = (world.style[plain] == 2).repeat_interleave(world.pictures.shape[1])
        head = fit_style(x, fluent)
        about = {
            "title": "Style: Fluent (above 0) rather than Noto, by a head on emoji-clip",
            "licence": "Apache-2.0",
            "source": "samples/emoji/emoji_clip.py",
        }
        save_file(head, folder / "style.safetensors", metadata=about)
        found = rounded(card(model, head, state["step"]))
        write_text(folder / "card.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        print((folder / "card.json").read_text())
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size / 1e6:.2f} MB, step {state['step']}")
    pretrain.curves(work, picture.parent, CURVES)


@torch.no_grad()
def card(model: torch.nn.Module, head: dict[str, Tensor], steps: int) -> dict[str, Any]:
    """What the model is and how it does on held-out concepts: on drawings, and on copies through the autoencoder."""
    rows = pretrain.load_rows("held_out")
    fluent = torch.tensor([row["style"] == "fluent" for row in rows])
    clean = pictures_of(rows)
    copies = decoded(clean, 2, seed=1)
    texts = F.normalize(model.encode_text(tokens_of([row["caption"] for row in rows])), dim=1)
    found: dict[str, Any] = {}
    style: dict[str, Any] = {}
    for kind, pictures in {"clean": clean, "decoded": copies[:, 0], "decoded_noisy": copies[:, 1]}.items():
        images = embed(model, pictures)
        for name, which in (("fluent", fluent), ("noto", ~fluent)):
            found[f"{name}_{kind}"] = retrieval(images[which], texts[which])
        right = (images * texts).sum(1)
        found[f"fluent_minus_noto_{kind}"] = (right[fluent].mean() - right[~fluent].mean()).item()
        style[kind] = style_figures(images @ head["weight"][0] + head["bias"][0], fluent)
    count = int((~fluent).sum())
    return {
        "model": "emoji-clip: image tower trained from nothing, text tower of tiny-sd, locked",
        "licence": "Apache-2.0",
        "data": "samples/emoji, train concepts: Noto Emoji (Apache-2.0), Fluent Emoji (MIT), captions of emojibase-data (MIT)",
        "recipe": f"samples/emoji/emoji_clip.py, {steps} steps",
        "retrieval_held_out": found | {"chance": {f"recall_at_{k}": k / count for k in (1, 5, 10)}},
        "style_held_out": style,
    }


if __name__ == "__main__":
    stages = {"copies": (make_copies, COPIES), "train": (train, 1300)}
    pretrain.run(__doc__, "emoji-clip", "emoji-clip-training", stages, export)
