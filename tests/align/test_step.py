"""The preference step against computations by hand with diffusers' own parts, and what must not change its results."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from flowalign.align.measured import measured
from flowalign.align.terms import Terms
from flowalign.data.batch import Batch
from flowalign.data.pairs import fixed_draws
from flowalign.errors import ConfigError, SelfTestError
from flowalign.rng import Keyed
from flowalign.setup import Prepared
from flowalign.train.trainable import trained
from flowalign.watch import validation
from tests.align.test_objective_steps import table

Make = Callable[..., Prepared]


def perturb(ready: Prepared, size: float = 0.02) -> None:
    """Move what learns away from where it started, the same way each time."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trained(ready.policy).values():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def rows(batch: Batch, index: slice) -> Batch:
    tensors = {
        name: getattr(batch, name)[index] for name in ("mean", "std", "geometry", "conditioning", "preference", "weight")
    }
    return replace(batch, **tensors, ids=batch.ids[index], draws=batch.draws[index], positions=batch.positions[index])


def gradients(ready: Prepared, batch: Batch) -> dict[str, Tensor]:
    loss, _ = ready.step(batch, Keyed(0))
    loss.mean().backward()
    found = {name: parameter.grad.clone() for name, parameter in trained(ready.policy).items() if parameter.grad is not None}
    ready.optimizer.zero_grad()
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_before_any_step_the_loss_is_log_2_and_every_margin_zero(prepared: Make, trainable: str, precision: str) -> None:
    ready = prepared(f"trainable.kind={trainable}", f"train.precision={precision}", "objective.beta=5000.0")
    assert ready.step.self_test(ready.first_batch(), Keyed(0)) == 0.0  # same weights, same shapes, so the same bits
    loss, metrics = ready.step(ready.first_batch(), Keyed(0))
    assert loss.tolist() == pytest.approx([math.log(2)] * 2)
    assert metrics["rewards/margins"].tolist() == [0.0, 0.0]


def test_a_reference_that_is_another_model_is_found_before_training(prepared: Make) -> None:
    ready = prepared("trainable.kind=full", "objective.beta=5000.0")
    with torch.no_grad():
        ready.step.reference.conv_in.weight[0, 0, 0, 0] += 0.05
    with pytest.raises(SelfTestError, match=r"the loss must be 0.693147 and the margin 0 within 0.001"):
        ready.step.self_test(ready.first_batch(), Keyed(0))


def test_adapters_that_start_off_zero_are_found_before_training(prepared: Make) -> None:
    ready = prepared("objective.beta=5000.0")
    perturb(ready)
    with pytest.raises(SelfTestError, match="self-test found loss"):
        ready.step.self_test(ready.first_batch(), Keyed(0))


def test_weights_that_are_not_finite_are_found_before_training(prepared: Make) -> None:
    ready = prepared("trainable.kind=full")
    for module in (ready.policy, ready.step.reference):
        module.conv_out.bias.data[0] = math.nan
    with pytest.raises(SelfTestError, match="loss nan"):
        ready.step.self_test(ready.first_batch(), Keyed(0))


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("kind", ["epsilon", "v_zero_snr", "sample"])
def test_errors_are_those_of_diffusers_own_scheduler_and_unet(
    prepared: Make, folders: dict[str, Path], kind: str, trainable: str
) -> None:
    """One picture at a time; the adapters (scale alpha / rank = 1.5) are merged into plain weights by hand."""
    ready = prepared(
        f"model.checkpoint={folders[kind]}",
        f"trainable.kind={trainable}",
        "trainable.rank=4",
        "trainable.alpha=6.0",
        "train.caption_dropout=0",
        "train.batch_size=5",
    )
    perturb(ready)
    batch, rng = ready.first_batch(), Keyed(7)
    terms = ready.step.terms(batch, rng)

    pipeline = StableDiffusionPipeline.from_pretrained(folders[kind], safety_checker=None)
    reference = pipeline.unet
    policy = UNet2DConditionModel.from_pretrained(folders[kind], subfolder="unet")
    learned = {name: parameter.detach() for name, parameter in trained(ready.policy).items()}
    if trainable == "full":
        policy.load_state_dict(learned)
    else:
        for name, down in learned.items():
            if "lora_A" in name:
                layer = policy.get_submodule(name.partition(".lora_A")[0])
                layer.weight.data += 6.0 / 4 * learned[name.replace("lora_A", "lora_B")] @ down
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    total = 250 if kind == "v_zero_snr" else 1000
    cached = ready.train.cached
    times = (rng.stratified("timestep", batch.positions) * total).long()
    posterior = rng.normal("posterior", batch.ids, batch.draws, batch.mean.shape[2:])
    noise = rng.normal("noise", batch.ids, batch.draws, batch.mean.shape[2:])
    errors = torch.empty(2, 5, 2)
    for row, example in enumerate(batch.ids):
        prompt = cached.prompts[cached.prompt[list(cached.ids).index(example)]]
        embeds, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
        for place in range(2):
            x0 = (batch.mean[row, place] + batch.std[row, place] * posterior[row]).unsqueeze(0)
            eps, step = noise[row].unsqueeze(0), times[row].unsqueeze(0)
            target = {"epsilon": eps, "v_zero_snr": scheduler.get_velocity(x0, eps, step), "sample": x0}[kind]
            for which, unet in enumerate((policy, reference)):
                with torch.no_grad():
                    prediction = unet(scheduler.add_noise(x0, eps, step), step, embeds).sample
                errors[which, row, place] = F.mse_loss(prediction, target)
    torch.testing.assert_close(terms.policy_error.detach(), errors[0], rtol=1e-4, atol=1e-6)
    assert terms.reference_error is not None
    torch.testing.assert_close(terms.reference_error, errors[1], rtol=1e-4, atol=1e-6)
    assert (errors[0] - errors[1]).abs().min() > 1e-5  # policy and reference differ enough to be told apart

    loss, metrics = ready.step(batch, rng)
    margin = 0.5 * ((errors[1] - errors[0])[:, 0] - (errors[1] - errors[0])[:, 1])
    torch.testing.assert_close(loss.detach(), -F.logsigmoid(500.0 * margin), rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(metrics["rewards/accuracies"], (margin > 0).float())
    torch.testing.assert_close(metrics["rewards/margins"], 500.0 * margin, rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(metrics["error/rejected"], (errors[0] - errors[1])[:, 1], rtol=1e-3, atol=1e-5)


def test_a_weight_multiplies_the_loss(prepared: Make) -> None:
    ready = prepared()
    batch = ready.first_batch()
    perturb(ready)
    plain, _ = ready.step(batch, Keyed(0))
    heavy, _ = ready.step(replace(batch, weight=torch.tensor([3.0, 0.0])), Keyed(0))
    torch.testing.assert_close(heavy, plain * torch.tensor([3.0, 0.0]))


@pytest.mark.parametrize("kind", ["epsilon", "v_zero_snr"])
def test_the_same_picture_in_both_places_teaches_nothing(prepared: Make, folders: dict[str, Path], kind: str) -> None:
    ready = prepared(f"model.checkpoint={folders[kind]}", "train.batch_size=4")
    perturb(ready)
    batch = ready.first_batch()
    twins = replace(batch, mean=batch.mean[:, :1].expand_as(batch.mean), std=batch.std[:, :1].expand_as(batch.std))
    x_t, target, t = ready.step.noised(twins, Keyed(0))
    for tensor in (x_t, target, t):
        pairs = tensor.unflatten(0, (4, 2))
        assert torch.equal(pairs[:, 0], pairs[:, 1])
    assert len(set(t.tolist())) == 4  # each comparison has a time of its own
    margin = ready.step.terms(twins, Keyed(0)).margin
    assert margin.abs().max() < 1e-6
    assert ready.step.terms(batch, Keyed(0)).margin.abs().max() > 1e-4
    nothing, something = gradients(ready, twins), gradients(ready, batch)
    assert max(grad.abs().max() for grad in nothing.values()) < 1e-3 * max(grad.abs().max() for grad in something.values())


def test_pictures_of_a_comparison_share_mirroring_and_caption_dropout(prepared: Make, votes: Path, tmp_path: Path) -> None:
    """Both places name one and the same file: whatever a draw decides, it must decide for both."""
    lines = [json.loads(line) for line in votes.read_text().splitlines()]
    twins = [{"prompt": row["prompt"], "chosen": str(votes.parent / row["chosen"])} for row in lines]
    path = tmp_path / "twins.jsonl"
    path.write_text("".join(json.dumps(row | {"rejected": row["chosen"]}) + "\n" for row in twins))
    ready = prepared(
        f"data.train={path}", "data.flip=true", "train.caption_dropout=0.5", "train.batch_size=12", f"data.validation={votes}"
    )
    seen: dict[int, set[float]] = {}
    for batch in islice(ready.batches(0), 4):
        assert torch.equal(batch.mean[:, 0], batch.mean[:, 1])
        assert torch.equal(batch.std[:, 0], batch.std[:, 1])
        assert len(batch.conditioning) == 12  # one prompt for the whole comparison
        for example, mean in zip(batch.ids, batch.mean, strict=True):
            seen.setdefault(example, set()).add(float(mean[0, 0, 0, 0]))
    assert max(len(variants) for variants in seen.values()) == 2  # and mirroring did happen


def test_a_comparison_does_not_depend_on_its_batch_neighbours(prepared: Make) -> None:
    ready = prepared("train.batch_size=6")
    perturb(ready)
    batch = ready.first_batch()
    together, metrics = ready.step(batch, Keyed(0))
    for index in range(6):
        alone, single = ready.step(rows(batch, slice(index, index + 1)), Keyed(0))
        torch.testing.assert_close(alone[0], together[index], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(single["error/chosen"][0], metrics["error/chosen"][index], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_gradient_checkpointing_gives_the_same_gradients(prepared: Make, trainable: str) -> None:
    found = []
    for switch in ("false", "true"):
        ready = prepared(f"trainable.kind={trainable}", f"trainable.gradient_checkpointing={switch}")
        ready.model.train()
        assert ready.policy.is_gradient_checkpointing is (switch == "true")
        perturb(ready)
        found.append(gradients(ready, ready.first_batch()))
    assert found[0].keys() == found[1].keys() == trained(ready.policy).keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize(("objective", "group"), [("dpo", 1), ("mipo", 3), ("tdpo", 1), ("plackett_luce", 3)])
def test_chunks_give_the_gradients_of_all_pictures_together(
    prepared: Make, votes: Path, tmp_path: Path, objective: str, group: int, trainable: str
) -> None:
    """Of a batch of two comparisons, in chunks that cut through comparisons and leave a rest; in float64, as shapes round."""
    path = table(votes, tmp_path, group)
    common = (f"trainable.kind={trainable}", f"data.train={path}", f"data.validation={path}")
    strength = {"mipo": "tau: 50", "plackett_luce": "beta: 50"}.get(objective, "beta: 500")
    found = []
    for backward in ("joint", "chunked"):
        ready = prepared(*common, f"objective={{name: {objective}, {strength}}}", f"train.backward={backward}", "train.chunk=3")
        perturb(ready)
        for module in (ready.policy, ready.step.reference):
            module.double()
        found.append(gradients(ready, ready.first_batch()))
    assert found[0].keys() == found[1].keys() == trained(ready.policy).keys()
    joint, chunked = (torch.cat([grad.flatten() for grad in each.values()]) for each in found)
    assert (chunked - joint).abs().max() < 1e-5 * joint.abs().max()


def test_in_chunks_only_one_chunk_is_in_the_denoiser_at_a_time(prepared: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards of the policy without gradients to keep, then each chunk once more on the way back."""
    ready = prepared("train.batch_size=3", "train.backward=chunked", "train.chunk=4")
    sizes: list[int] = []
    predict = type(ready.family).predict

    def counted(self: object, denoiser: object, x_t: Tensor, *rest: object) -> Tensor:
        sizes.append(len(x_t))
        return predict(self, denoiser, x_t, *rest)

    monkeypatch.setattr(type(ready.family), "predict", counted)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = ready.step(ready.first_batch(), Keyed(0))
    assert sizes == [4, 2, 4, 2]  # policy, reference
    held = sum(kept)
    loss.mean().backward()
    assert sorted(sizes[4:]) == [2, 4]
    joint = prepared("train.batch_size=3")
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        joint.step(joint.first_batch(), Keyed(0))
    assert held < 0.05 * sum(kept)


def test_a_tie_has_no_gradient_while_policy_and_reference_agree(prepared: Make) -> None:
    ready = prepared()
    batch = ready.first_batch()
    size = {
        label: max(
            grad.abs().max().item() for grad in gradients(ready, replace(batch, preference=torch.full((2,), label))).values()
        )
        for label in (0.0, 0.5, 1.0)
    }
    assert size[0.5] < 1e-4 * size[1.0]
    assert size[0.0] == pytest.approx(size[1.0], rel=1e-3)


def test_an_equal_margin_is_half_a_win(prepared: Make) -> None:
    ready = prepared("train.batch_size=6")
    _, metrics = ready.step(ready.first_batch(), Keyed(0))
    assert metrics["rewards/accuracies"].tolist() == [0.5] * 6
    found = validation(ready.step, ready.held_out, ready.config, ready.accelerator)
    assert found["rewards/accuracies"] == 0.5


def test_ties_take_no_part_in_the_held_out_accuracy(prepared: Make, votes: Path, tmp_path: Path) -> None:
    decided = [
        json.loads(line) | {side: str(votes.parent / json.loads(line)[side]) for side in ("chosen", "rejected")}
        for line in votes.read_text().splitlines()
    ]
    tied = [row | {"prompt": "zz", "preference": 0.5} for row in decided[:5]]
    found = {}
    for name, lines in (("decided", decided), ("with ties", decided + tied), ("only ties", tied)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in lines))
        ready = prepared(f"data.validation={path}", "objective.beta=50000.0")  # so far from 0 that losses tell pairs apart
        perturb(ready)
        found[name] = validation(ready.step, ready.held_out, ready.config, ready.accelerator)
    assert 0 < found["decided"]["rewards/accuracies"] < 1
    assert found["with ties"]["rewards/accuracies"] == pytest.approx(found["decided"]["rewards/accuracies"], abs=1e-6)
    # Ties do count in the loss. How much they move it depends on the noise, which the pictures' paths name.
    assert found["with ties"]["loss"] != pytest.approx(found["decided"]["loss"], rel=1e-4)
    assert "rewards/accuracies" not in found["only ties"]


@pytest.fixture
def grouped(votes: Path, tmp_path: Path) -> Path:
    """The same votes as groups: two chosen and two rejected pictures for each of the six prompts."""
    rows = [json.loads(line) for line in votes.read_text().splitlines()]
    path = tmp_path / "groups.jsonl"
    with path.open("w") as file:
        for one, other in zip(rows[:6], rows[6:], strict=True):
            sides = {side: [str(votes.parent / row[side]) for row in (one, other)] for side in ("chosen", "rejected")}
            file.write(json.dumps({"prompt": one["prompt"]} | sides) + "\n")
    return path


def test_a_run_on_groups_measures_held_out_pairs_as_a_run_on_pairs_does(prepared: Make, votes: Path, grouped: Path) -> None:
    found = {}
    for name, train, chosen in (("dpo", votes, 1), ("mdpo", grouped, 2)):
        ready = prepared(f"objective={{name: {name}, beta: 50000.0}}", f"data.train={train}")
        perturb(ready)
        assert ready.step.num_chosen == chosen
        found[name] = validation(ready.step, ready.held_out, ready.config, ready.accelerator)
    assert 0 < found["dpo"]["rewards/accuracies"] < 1
    assert found["mdpo"] == pytest.approx(found["dpo"], rel=1e-4)


def test_an_objective_that_cannot_take_the_held_out_comparisons_is_refused(prepared: Make, grouped: Path) -> None:
    with pytest.raises(ConfigError, match=r"'mipo' cannot be used with these data: .* 2 pictures on either side"):
        prepared("objective={name: mipo}", f"data.train={grouped}")
    assert prepared("objective={name: mipo, estimator: plug_in}", f"data.train={grouped}").step.num_chosen == 2


def test_the_errors_of_winners_are_those_of_chosen_or_wanted_pictures() -> None:
    policy, reference = torch.tensor([[0.3, 0.9], [0.5, 0.7]]), torch.tensor([[0.2, 0.8], [0.6, 0.4]])
    pairs = Terms(policy, reference, None, torch.ones(2))
    found = measured(pairs, 1.0)
    assert found["winner/error"].tolist() == pytest.approx([0.3, 0.5])
    assert found["winner/reference_error"].tolist() == pytest.approx([0.2, 0.6])
    groups = measured(
        replace(pairs, num_chosen=2, policy_error=policy.repeat(1, 2), reference_error=reference.repeat(1, 2)), 1.0
    )
    assert groups["winner/error"].tolist() == pytest.approx([0.6, 0.6])
    wanted = torch.tensor([1.0, 0.0, 0.5])
    alone = measured(Terms(torch.tensor([[0.3], [0.9], [0.5]]), torch.tensor([[0.2], [0.7], [0.4]]), None, wanted), 1.0)
    rise = alone["winner/error"].sum() / alone["winner/reference_error"].sum() - 1
    assert rise.item() == pytest.approx((0.3 + 0.25) / (0.2 + 0.2) - 1)
    assert "winner/reference_error" not in measured(replace(pairs, reference_error=None), 1.0)


def test_held_out_margins_by_time_are_means_over_those_times(prepared: Make) -> None:
    ready = prepared("train.validation_draws=4", "train.batch_size=5")
    perturb(ready)
    found = validation(ready.step, ready.held_out, ready.config, ready.accelerator)
    step, rng = ready.step.on_held_out(), Keyed(1)
    times, margins = [], []
    with torch.no_grad():
        for draw in range(4):
            for batch in fixed_draws(ready.held_out, 12, 4, draw):
                times += step.times(batch, rng).tolist()
                margins += step(batch, rng)[1]["rewards/margins"].tolist()
    for place, label in enumerate(("t0.00-0.25", "t0.25-0.50", "t0.50-0.75", "t0.75-1.00")):
        here = [margin for margin, t in zip(margins, times, strict=True) if place / 4 <= t < (place + 1) / 4]
        assert len(here) >= 10
        assert found[f"rewards/margins/{label}"] == pytest.approx(sum(here) / len(here), rel=1e-3, abs=1e-4)
        assert found[f"rewards/accuracies/{label}"] == pytest.approx(sum(margin > 0 for margin in here) / len(here))


def test_validation_is_the_same_at_each_call_and_for_each_batch_size(prepared: Make) -> None:
    ready = prepared("train.validation_draws=2")
    perturb(ready)
    first = validation(ready.step, ready.held_out, ready.config, ready.accelerator)
    assert validation(ready.step, ready.held_out, ready.config, ready.accelerator) == first
    other = prepared("train.validation_draws=2", "train.batch_size=5")
    perturb(other)
    second = validation(other.step, other.held_out, other.config, other.accelerator)
    assert second == pytest.approx(first, rel=1e-3, abs=1e-5)
