"""Tiny checkpoints with random weights of models that are not CLIP-shaped, made of classes that the rewards do not use."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.conftest import LETTERS
from tests.scoring.tiny_towers import spread

WIDTH = 128
"""Two heads of 64."""
TEXT = dict(hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=40)
QUESTION = "Does this figure show Please answer yes or no"
PROMPTS = "a red fox in snow two cups of tea the moon over lake bicycle"


def widened(model: nn.Module) -> None:
    """What `spread` misses in BERT's: layer norms near 1, and attention that prefers some tokens to others."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                parameter.add_(1.0)
            elif ".self.query." in name or ".self.key." in name:
                parameter.mul_(2.0)


def bert_tokenizer(folder: Path) -> Path:
    """Of single letters, in BERT's format."""
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(folder)
    return folder


def timm_vision(seed: int) -> nn.Module:
    """A vision transformer whose tensors are named like those of BLIP's, in timm's implementation."""
    import timm

    settings = dict(img_size=32, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=2, mlp_ratio=0.75, num_classes=0)
    model = timm.models.VisionTransformer(**settings).eval()
    spread(model, seed)
    return model


def bert_text(seed: int, vocabulary: int) -> nn.Module:
    """A BERT with cross-attention, in transformers' implementation of BERT; without types of tokens, which BLIP has not."""
    from transformers import BertConfig, BertModel

    config = BertConfig(**TEXT, vocab_size=vocabulary, is_decoder=True, add_cross_attention=True, layer_norm_eps=1e-12)
    model = BertModel(config, add_pooling_layer=False).eval()
    spread(model, seed)
    widened(model)
    with torch.no_grad():
        model.embeddings.token_type_embeddings.weight.zero_()
    return model


def imagereward_parts(seed: int = 0) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """Vision, text and head, of which `imagereward_checkpoint` is made."""
    generator = torch.Generator().manual_seed(seed)
    head: dict[str, Tensor] = {}
    for name, (inputs, outputs) in zip((0, 2, 4, 6, 7), ((WIDTH, 32), (32, 16), (16, 8), (8, 4), (4, 1)), strict=True):
        head[f"layers.{name}.weight"] = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
        head[f"layers.{name}.bias"] = 0.1 * torch.randn(outputs, generator=generator)
    return timm_vision(seed), bert_text(seed + 1, vocabulary=5 + 2 * len(LETTERS) + 2), head


def imagereward_checkpoint(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """A file with the keys that ImageReward.pt has, and a folder with the tokenizer."""
    vision, text, head = imagereward_parts(seed)
    state = OrderedDict((f"blip.visual_encoder.{name}", value) for name, value in vision.state_dict().items())
    state |= {f"blip.text_encoder.{name}": value for name, value in text.state_dict().items() if "token_type" not in name}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    for name in ("vision_proj", "text_proj"):  # which are there and have no part in the score
        state |= {f"blip.{name}.weight": torch.zeros(8, WIDTH), f"blip.{name}.bias": torch.zeros(8)}
    state |= {f"mlp.{name}": value for name, value in head.items()}
    torch.save(state, folder / "ImageReward.pt")
    return folder / "ImageReward.pt", bert_tokenizer(folder / "tokenizer")


def blip_retrieval(folder: Path, seed: int = 0) -> Path:
    """As `save_pretrained` writes a BLIP for retrieval with its processor."""
    from transformers import BlipConfig, BlipForImageTextRetrieval, BlipImageProcessor

    text = TEXT | dict(vocab_size=5 + 2 * len(LETTERS))
    shape = {name: TEXT[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    config = BlipConfig(text_config=text, vision_config=shape | dict(image_size=32, patch_size=8), image_text_hidden_size=24)
    model = BlipForImageTextRetrieval(config).eval()
    spread(model, seed)
    widened(model.text_encoder)
    model.save_pretrained(folder)
    BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return bert_tokenizer(folder)


def llava(folder: Path, seed: int = 0, chat: bool = True) -> Path:
    """As `save_pretrained` writes a LLaVA of a CLIP and a Llama, with its processor; of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    marks = ["<unk>", "<pad>", "<image>", "Yes", "No", "USER", "ASSISTANT", ":", "?", '"', '"?', "."]
    known = list(dict.fromkeys([*marks, *QUESTION.split(), *PROMPTS.split()]))
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(known)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", additional_special_tokens=["<image>"]
    )
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape, image_size=32, patch_size=8),
        text_config=LlamaConfig(**shape, vocab_size=len(known), max_position_embeddings=128),
        image_token_index=known.index("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config).eval()
    spread(model, seed)
    template: Any = (
        "{% for message in messages %}USER: {% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template if chat else None,
    ).save_pretrained(folder)
    return folder


def alexnet(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """An AlexNet with torchvision's names and few channels, and layers' weights with those of LPIPS."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {0: (3, 8, 11), 3: (8, 12, 5), 6: (12, 16, 3), 8: (16, 10, 3), 10: (10, 6, 3)}
    trunk: dict[str, Tensor] = {"classifier.1.weight": torch.zeros(2, 2)}
    heads: dict[str, Tensor] = {}
    for layer, (number, (inputs, outputs, side)) in enumerate(sizes.items()):
        shape = (outputs, inputs, side, side)
        trunk[f"features.{number}.weight"] = torch.randn(shape, generator=generator) * (inputs * side * side) ** -0.5
        trunk[f"features.{number}.bias"] = 0.1 * torch.randn(outputs, generator=generator)
        heads[f"lin{layer}.model.1.weight"] = torch.rand(1, outputs, 1, 1, generator=generator)
    torch.save(trunk, folder / "alexnet.pth")
    torch.save(heads, folder / "alex.pth")
    return folder / "alexnet.pth", folder / "alex.pth"
