"""VQAScore is the probability that transformers' own generation gives the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.errors import CheckpointError, ConfigError
from flowalign.scoring.loading import load_rewards
from flowalign.scoring.rewards.base import Reward, Shelf
from tests.scoring import tiny_models, tiny_towers
from tests.scoring.test_every_reward import PROMPTS, pictures

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPLATE = "USER: <image>\n{question} ASSISTANT:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llava(tmp_path_factory.mktemp("llava"))


def load(model: Path, **settings: object) -> Reward:
    return load_rewards([{"name": "vqascore", "model": str(model), **settings}], Shelf(torch.device("cpu")))[0]


def generated(model: Path, texts: list[str], answer: str) -> list[float]:
    """P(answer) at the first position that transformers generates, for one picture and text after the other."""
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    net, processor = LlavaForConditionalGeneration.from_pretrained(model).eval(), LlavaProcessor.from_pretrained(model)
    number = processor.tokenizer.convert_tokens_to_ids(answer)
    found = []
    for image, text in zip(pictures(), texts, strict=True):
        inputs: Any = processor(images=image, text=text, return_tensors="pt")
        out = net.generate(**inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
        found.append(float(out.logits[0][0].softmax(-1)[number]))
    return found


def test_it_is_the_probability_of_yes(folder: Path) -> None:
    texts = [f'USER: <image>\nDoes this figure show "{p}"? Please answer yes or no. ASSISTANT:' for p in PROMPTS]
    expected = generated(folder, texts, "Yes")
    found = load(folder).score(pictures(), PROMPTS).tolist()
    assert found == pytest.approx(expected, abs=1e-6, rel=1e-4)
    assert max(found) / min(found) > 1.01


def test_question_and_answer_can_be_others(folder: Path) -> None:
    texts = [f"USER: <image>\nPlease show {p} ? ASSISTANT:" for p in PROMPTS]
    found = load(folder, question="Please show {} ?", answer="No").score(pictures(), PROMPTS).tolist()
    assert found == pytest.approx(generated(folder, texts, "No"), abs=1e-6, rel=1e-4)


def test_a_model_without_a_chat_template_needs_one(tmp_path: Path, folder: Path) -> None:
    bare = tiny_models.llava(tmp_path, chat=False)
    with pytest.raises(ConfigError, match="has no chat template; give template"):
        load(bare)
    found = load(bare, template=TEMPLATE).score(pictures(), PROMPTS)
    torch.testing.assert_close(found, load(folder).score(pictures(), PROMPTS), rtol=1e-5, atol=1e-7)


def test_pictures_and_prompts_both_count(folder: Path) -> None:
    reward = load(folder)
    straight = reward.score(pictures(), PROMPTS)
    for other in (reward.score(pictures()[::-1], PROMPTS), reward.score(pictures(), PROMPTS[::-1])):
        assert float((other - straight).abs().min() / straight.max()) > 1e-4


def test_many_pairs_go_through_in_parts(folder: Path) -> None:
    """More than go together, with prompts of different lengths among them."""
    reward = load(folder)
    images, prompts = pictures() * 5, [*PROMPTS, *PROMPTS[::-1], *PROMPTS, *PROMPTS, *PROMPTS[::-1]]
    apart = torch.cat([reward.score([image], [prompt]) for image, prompt in zip(images, prompts, strict=True)])
    torch.testing.assert_close(reward.score(images, prompts), apart, rtol=1e-5, atol=1e-7)


def test_prompts_are_put_in_as_they_are(folder: Path) -> None:
    """Braces are no gaps."""
    scores = load(folder).score(pictures()[:1] * 2, ["a red fox {}", "a red fox {question}"])
    assert bool(torch.isfinite(scores).all())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"answer": "Yes No"}, "as one token"),
        ({"answer": "Perhaps"}, "does not know the answer 'Perhaps'"),
        ({"question": "Is it good?"}, "question is 'Is it good\\?', which has no {}"),
        ({"template": "<image> what?"}, "which has no {question}"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(folder: Path, settings: dict[str, str], said: str) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=said):
        load(folder, **settings)


def test_the_answer_follows_the_text_as_the_tokenizer_writes_it(tmp_path: Path) -> None:
    """A tokenizer that marks beginnings of words: "Yes" alone is "▁Yes", after a colon it is "Yes"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from flowalign.scoring.rewards.vqascore import Answerer

    words = {word: number for number, word in enumerate(["<unk>", "▁Yes", "Yes", ":", "▁ASSISTANT", "▁ASSISTANT:", "▁"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Split(":", "isolated")])
    made.decoder = decoders.Metaspace()

    class Processor:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")

    answerer = Answerer.__new__(Answerer)
    answerer._processor = Processor()
    assert answerer.token("ASSISTANT:", "Yes") == words["Yes"]
    assert answerer.token("ASSISTANT", " Yes") == words["▁Yes"]
    with pytest.raises(CheckpointError, match="as one token"):
        answerer.token("ASSISTANT", "Yes")  # which makes another word of it


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no image-text-to-text model"):
        load(tiny_towers.transformers_clip(tmp_path))
