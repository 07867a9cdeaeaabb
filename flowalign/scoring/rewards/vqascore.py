"""VQAScore: the probability that an image-text model answers "Yes" when asked whether the picture shows the prompt.

Source: Lin et al., 2024, arXiv:2404.01291: P("Yes" | picture, 'Does this figure show "{prompt}"? Please answer yes or no.').
The model is any of transformers' image-text-to-text models that continue a text. Its chat template says where picture and
question go; models without one need `template`, such as "USER: <image>\\n{question} ASSISTANT:".

The answer is the token that the model's own tokenizer writes next when the answer follows the question in the text: "Yes",
"▁Yes" or " Yes", as the case may be. The probability is over the whole vocabulary, at the first position after the
question. An answer that takes several tokens is refused: its first one would be another word.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from flowalign.errors import CheckpointError, ConfigError, reason
from flowalign.scoring.rewards.base import Backbone, Card, Reward, Shelf
from flowalign.scoring.rewards.contrastive import Origin, fingerprint, reading

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
AT_ONCE = 8
"""Pairs of picture and question that go through the model together."""
ANYTHING = "a cat"


class Answerer(Backbone):
    """An image-text model. Features are the pictures themselves: what such a model makes of one depends on the question."""

    def __init__(self, key: str, model: nn.Module, processor: Any, origin: Origin, device: torch.device) -> None:
        self.key, self.origin, self.device = key, origin, device
        self._model: Any = model.eval().requires_grad_(False).to(device)
        self._processor = processor
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._only_last: dict[str, Any] = {"logits_to_keep": 1} if keeps else {}

    def prepare(self, image: Image.Image) -> Image.Image:
        return image

    def see(self, inputs: Sequence[Image.Image]) -> list[Image.Image]:
        return list(inputs)

    def text(self, question: str, template: str) -> str:
        """What the model reads, up to where it would answer. Raises ConfigError where there is no way to know."""
        if template:
            return template.replace("{question}", question)
        if not getattr(self._processor, "chat_template", None):
            raise ConfigError(
                'the model has no chat template; give template, such as "USER: <image>\\n{question} ASSISTANT:" as its '
                "publisher writes it."
            )
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self._processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def token(self, text: str, answer: str) -> int:
        """The token that continues `text` with `answer`. Raises CheckpointError where that takes more or fewer than one."""
        tokenizer = self._processor.tokenizer
        before, after = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in (text, text + answer))
        added = after[len(before) :]
        if after[: len(before)] != before or len(added) != 1:
            raise CheckpointError(
                f"the model's tokenizer does not write the answer {answer!r} as one token of its own after the question "
                f"({tokenizer.convert_ids_to_tokens(added)}); give another answer, or a template that ends before a word."
            )
        if added[0] == tokenizer.unk_token_id:
            raise CheckpointError(f"the model's tokenizer does not know the answer {answer!r}; give another answer.")
        return int(added[0])

    def probabilities(self, images: Sequence[Image.Image], texts: Sequence[str], token: int) -> Tensor:
        """P(token | picture, text) `[B]`, float32. Pairs whose inputs have the same shapes go together: nothing is padded, so
        that no score depends on its neighbours."""
        inputs = [self._inputs(image, text) for image, text in zip(images, texts, strict=True)]
        alike: dict[tuple[Any, ...], list[int]] = {}
        for place, each in enumerate(inputs):
            alike.setdefault(tuple((name, value.shape) for name, value in sorted(each.items())), []).append(place)
        found: dict[int, Tensor] = {}
        for places in alike.values():
            for start in range(0, len(places), AT_ONCE):
                chunk = places[start : start + AT_ONCE]
                batch = {name: torch.cat([inputs[place][name] for place in chunk]) for name in inputs[chunk[0]]}
                logits = self._model(**{name: value.to(self.device) for name, value in batch.items()}, **self._only_last).logits
                found |= dict(zip(chunk, logits[:, -1].float().softmax(-1)[:, token].unbind(), strict=True))
        return torch.stack([found[place] for place in range(len(inputs))])

    def _inputs(self, image: Image.Image, text: str) -> Mapping[str, Tensor]:
        encoded = self._processor(images=[image], text=[text], return_tensors="pt")
        dtype = self._model.dtype
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in encoded.items()}


@dataclass(frozen=True)
class VqaScore(Reward):
    """P(answer | picture, question about the prompt)"""

    card: Card
    backbone: Answerer
    question: str
    template: str
    token: int

    def judge(self, features: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        texts = [self.backbone.text(self.question.replace("{}", prompt), self.template) for prompt in prompts]
        return self.backbone.probabilities(features, texts, self.token)


def load(shelf: Shelf, *, model: str, question: str = QUESTION, answer: str = "Yes", template: str = "") -> VqaScore:
    """model: a folder or hub id. question: with {} where the prompt goes. answer: one token. template: with {question} and the
    model's mark for a picture, in place of its chat template.

    Raises ConfigError for a question or template without its gap, CheckpointError for what cannot be loaded or answered.
    """
    for name, value, gap in (("question", question, "{}"), ("template", template or "{question}", "{question}")):
        if gap not in value:
            raise ConfigError(f"{name} is {value!r}, which has no {gap}; write {gap} where it belongs.")
    folder = Path(model).expanduser()
    name = str(folder.resolve()) if folder.is_dir() else model
    key = f"vqascore {name} {shelf.dtype}"
    backbone = shelf.take(key, lambda: _load(key, shelf, name))
    text = backbone.text(question.replace("{}", ANYTHING), template)
    mark = fingerprint(nn.Module(), question, answer, template, text)
    return VqaScore(
        Card(
            name="vqascore",
            title="VQAScore: probability that a model says the picture shows the prompt",
            range=(0.0, 1.0),
            better="higher",
            licence=backbone.origin.licence,
            source="Lin et al., 2024, arXiv:2404.01291",
            weights=backbone.origin.weights,
            reads_prompt=True,
            differentiable=False,
            fingerprint=f"vqascore-1-{mark}-{backbone.origin.fingerprint}",
        ),
        backbone,
        question,
        template,
        backbone.token(text, answer),
    )


def _load(key: str, shelf: Shelf, name: str) -> Answerer:
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    try:
        config = AutoConfig.from_pretrained(name)
        processor = AutoProcessor.from_pretrained(name)
        net = AutoModelForImageTextToText.from_pretrained(name, dtype=shelf.dtype)
    except Exception as error:  # transformers, safetensors and the hub raise many kinds
        raise CheckpointError(
            f"{name} is no image-text-to-text model that transformers can load ({reason(error)}); give a folder that "
            "save_pretrained wrote with its processor, or a hub id that was downloaded once while online."
        ) from error
    if any(getattr(part, "is_encoder_decoder", False) for part in (config, config.get_text_config())):
        raise CheckpointError(f"{name} answers with a decoder of its own; give a model that continues the text it reads.")
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise CheckpointError(f"{name} has no processor for pictures and text; give a folder that has one.")
    settings = [each.to_json_string() for each in (processor.image_processor, config)]
    words, chat = reading(processor.tokenizer), getattr(processor, "chat_template", None)
    mark = fingerprint(net, "vqascore", settings, words, chat, str(shelf.dtype))
    revision = getattr(config, "_commit_hash", None)
    said = f"transformers {Path(name).name if Path(name).is_dir() else name}{f' at {revision[:12]}' if revision else ''}"
    return Answerer(key, net, processor, Origin(said, "as its publisher states", mark), shelf.device)


REWARD = load
