"""One optimizer step: closed forms, accumulation, weight decay, the non-finite guard (E3, N1)."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from helpers import SMALL, random_batch, small_model
from torch import Tensor

from model import count_parameters
from smollm.checkpoint.state import optimizer_tensors
from smollm.config import Config, TrainingConfig, replace_training
from smollm.distributed import ParallelModel
from smollm.errors import ConfigError
from smollm.signals import StopSignals
from smollm.training import optimizer
from smollm.training.step import TrainStep, layer_norms


def make_step(
    micro_batch: int,
    config: Config | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> TrainStep:
    """A TrainStep of a small model, on one process."""
    config = config or Config(model=SMALL)
    model = small_model()
    parallel = ParallelModel(model, loss or model, lambda sync: contextlib.nullcontext())
    optimizers = optimizer.build_optimizers(model, config.training)
    return TrainStep(config, parallel, optimizers, micro_batch, StopSignals())


def optimizer_state(train_step: TrainStep) -> dict[str, Tensor]:
    """Copies of everything that the optimizers keep, by its name in a checkpoint."""
    model = train_step.parallel.model
    return {k: v.clone() for k, v in optimizer_tensors(model, train_step.optimizers)}


def test_learning_rate_follows_its_closed_form() -> None:
    """Linear warm-up, cosine to the floor at train_steps, then flat."""
    training = TrainingConfig()
    assert optimizer.learning_rate(1, training) == pytest.approx(5e-6)
    assert optimizer.learning_rate(10, training) == pytest.approx(5e-5)
    assert optimizer.learning_rate(100, training) == pytest.approx(5e-4)
    middle = (100 + 5000) // 2
    assert optimizer.learning_rate(middle, training) == pytest.approx((5e-4 + 5e-5) / 2)
    quarter = 100 + 4900 // 4
    expected = 5e-5 + 4.5e-4 * (1 + math.cos(math.pi / 4)) / 2
    assert optimizer.learning_rate(quarter, training) == pytest.approx(expected)
    for step in (5000, 5001, 5050, 99999):
        assert optimizer.learning_rate(step, training) == pytest.approx(5e-5)
    rates = [optimizer.learning_rate(step, training) for step in range(100, 5001)]
    assert rates == sorted(rates, reverse=True)


def test_other_schedules_and_short_runs() -> None:
    """linear and constant; no warm-up; a warm-up longer than the run."""
    linear = TrainingConfig(schedule="linear", warmup_steps=0, train_steps=10)
    assert optimizer.learning_rate(5, linear) == pytest.approx((5e-4 + 5e-5) / 2)
    constant = TrainingConfig(schedule="constant", warmup_steps=2)
    assert optimizer.learning_rate(4000, constant) == 5e-4
    assert optimizer.learning_rate(99_999, constant) == 5e-4
    for schedule in ("linear", "cosine", "wsd"):  # may end at zero, and stays there
        zero = TrainingConfig(schedule=schedule, min_learning_rate=0.0)
        assert 0 < optimizer.learning_rate(4999, zero) < 1e-6
        assert optimizer.learning_rate(5000, zero) == optimizer.learning_rate(5050, zero) == 0.0
    short = TrainingConfig(train_steps=2, warmup_steps=100)
    assert optimizer.learning_rate(2, short) == pytest.approx(1e-5)
    assert optimizer.learning_rate(3, short) == 5e-5


def test_wsd_is_flat_then_linear() -> None:
    """wsd: the peak up to step 60 of 100, then a straight line; a longer run is flat for longer."""
    training = TrainingConfig(
        schedule="wsd", train_steps=100, warmup_steps=10, min_learning_rate=0.0,
        decay_fraction=0.4,
    )  # fmt: skip
    rates = {step: optimizer.learning_rate(step, training) for step in (10, 11, 59, 60)}
    assert set(rates.values()) == {5e-4}
    for step in (61, 70, 80, 99, 100):
        expected = 5e-4 * (100 - step) / 40
        assert optimizer.learning_rate(step, training) == pytest.approx(expected, abs=1e-18)
    assert optimizer.decay_start(training) == 60
    assert [step for step in range(200) if optimizer.is_before_decay(step, training)] == [60]
    longer = dataclasses.replace(training, train_steps=1000)
    assert [optimizer.learning_rate(step, longer) for step in (1, 5, 10, 50, 60)] == [
        optimizer.learning_rate(step, training) for step in (1, 5, 10, 50, 60)
    ]
    assert optimizer.learning_rate(600, longer) == 5e-4 > optimizer.learning_rate(601, longer)
    # A warm-up longer than what the decay leaves shortens the decay.
    late = dataclasses.replace(training, warmup_steps=90)
    assert optimizer.decay_start(late) == 90
    assert optimizer.learning_rate(95, late) == pytest.approx(2.5e-4)


def test_where_the_rate_jumps_is_said() -> None:
    """A line wherever the new schedule is elsewhere at the checkpoint's step, and none else."""
    base = TrainingConfig(schedule="wsd", train_steps=100, warmup_steps=10, min_learning_rate=0.0)

    def lines(step: int, **changed: object) -> str:
        now = dataclasses.replace(base, **changed)
        return "\n".join(optimizer.rate_warnings(now, base, step + 1, now.train_steps))

    assert lines(80) == lines(60, train_steps=1000) == lines(5, train_steps=1000) == ""
    assert "0.000245 to 0.0005 at step 81" not in lines(80)
    for changed in (
        {"decay_fraction": 0.1}, {"train_steps": 90}, {"schedule": "constant"},
        {"schedule": "linear"}, {"learning_rate": 1e-4},
    ):  # fmt: skip
        assert "the rate goes from 0.00025 to" in lines(80, **changed), changed
    assert "has no effect" not in lines(5, schedule="linear")  # the same at both ends
    assert "decay_fraction 0.1 has no effect" in lines(105, decay_fraction=0.1, train_steps=100)
    late = "\n".join(
        optimizer.rate_warnings(dataclasses.replace(base, warmup_steps=90), None, 1, 100)
    )
    assert "warmup_steps 90 leaves 10 of the 40 steps" in late


def test_the_embedding_can_have_a_rate_of_its_own() -> None:
    """training.embedding_learning_rate follows the schedule, for the embedding only."""
    config = replace_training(
        Config(model=SMALL), embedding_learning_rate=5e-3, warmup_steps=0, weight_decay=0.0
    )
    for name in ("adamw", "muon"):
        train_step = make_step(4, replace_training(config, optimizer=name))
        model = train_step.parallel.model
        before = {k: v.clone() for k, v in model.state_dict().items()}
        assert train_step(2500, *random_batch(4))
        rate = optimizer.learning_rate(2500, config.training)
        for key in ("embed_tokens.weight", "norm.weight"):
            moved = (model.state_dict()[f"model.{key}"] - before[f"model.{key}"]).abs().max()
            times = 10 if "embed" in key else 1  # AdamW's first step is the rate itself
            assert float(moved) == pytest.approx(times * rate, rel=1e-2)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 192])
def test_batch_is_shared_out_evenly(world: int) -> None:
    """More processes take the accumulation first, then the batch; the product stays 192."""
    micro = optimizer.micro_batch_size(Config(), world)
    assert 192 % (micro * world) == 0
    if world in (2, 4):
        assert micro == 48


def test_batch_that_cannot_be_shared() -> None:
    """5 processes cannot share 192 sequences; the message says what would do."""
    with pytest.raises(ConfigError, match="multiple of 5"):
        optimizer.micro_batch_size(Config(), 5)


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 16])
def test_accumulation_gives_the_same_gradients(micro_batch: int) -> None:
    """E3: 1x16, 4x4, 8x2 and 16x1 sequences: gradients within 1e-6, and so the loss."""
    batch = random_batch(16)
    whole, parts = make_step(16), make_step(micro_batch)
    loss, other = whole.accumulate(1, *batch), parts.accumulate(1, *batch)
    assert float(loss) == pytest.approx(float(other), abs=1e-6)
    for ours, theirs in zip(
        parts.parallel.model.parameters(), whole.parallel.model.parameters(), strict=True
    ):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_loss_gradient_agrees_with_finite_differences(seed: int) -> None:
    """The derivative along a random direction, against a central difference in fp64."""
    generator = torch.Generator().manual_seed(seed)
    model = small_model().double()
    model.dtype = torch.float64
    input_ids, labels = random_batch(2)
    direction = [
        torch.randn(p.shape, dtype=torch.float64, generator=generator) for p in model.parameters()
    ]
    model(input_ids, labels).backward()
    slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), direction, strict=True))

    def moved(distance: float) -> float:
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction, strict=True):
                p += distance * d
            value = float(model(input_ids, labels))
            for p, d in zip(model.parameters(), direction, strict=True):
                p -= distance * d
        return value

    # The loss is computed in fp32: nearer, its rounding tells; farther, its third derivative.
    numeric = (moved(3e-4) - moved(-3e-4)) / 6e-4
    assert float(slope) == pytest.approx(numeric, rel=1e-2, abs=1e-2)


def test_weight_decay_on_matrices_only() -> None:
    """Every matrix and no vector decays; together they are all parameters, once."""
    (adamw,) = optimizer.build_optimizers(small_model(), TrainingConfig())
    sizes = {0.1: 0, 0.0: 0}
    for group in adamw.param_groups:
        sizes[group["weight_decay"]] += sum(p.numel() for p in group["params"])
    count = count_parameters(SMALL)
    assert sizes == {0.1: count.matrices, 0.0: count.total - count.matrices}


def test_step_equals_adamw_by_its_formula() -> None:
    """One step of one weight, by the formula of arXiv 1711.05101 with clipping."""
    train_step = make_step(4)
    weight = train_step.parallel.model.model.layers[0].mlp.c_fc.weight
    before = weight.detach().clone()
    assert train_step(50, *random_batch(4))
    norm = train_step.read().grad_norm
    gradient = weight.grad  # clipped in place
    total = torch.sqrt(
        sum((p.grad.double() ** 2).sum() for p in train_step.parallel.model.parameters())
    )
    assert float(total) == pytest.approx(min(norm, 1.0), rel=1e-4)
    rate = optimizer.learning_rate(50, TrainingConfig())
    # At the first step both bias-corrected means are the gradient itself.
    expected = before * (1 - rate * 0.1) - rate * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(weight.detach(), expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("case", ["loss nan", "loss inf", "gradient nan", "gradient inf"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_guard_leaves_everything_as_it_was(name: str, case: str) -> None:
    """N1: nothing is updated by a bad step, nor by good ones launched before the host looked."""
    what, value = case.split()

    def loss(input_ids: Tensor, labels: Tensor) -> Tensor:
        result = model(input_ids, labels)
        if bad[0] and what == "loss":
            return result * float(value)
        if bad[0]:  # the loss stays finite, the gradient does not
            result.register_hook(lambda gradient: gradient * float(value))
        return result

    bad = [False]
    config = replace_training(Config(model=SMALL), optimizer=name)
    train_step = make_step(4, config, loss=loss)
    model = train_step.parallel.model
    assert train_step(1, *random_batch(4)) and train_step.read().nonfinite is None
    state = {k: v.clone() for k, v in model.state_dict().items()}
    moments = optimizer_state(train_step)
    assert any(tensor.any() for tensor in moments.values())
    bad[0] = True
    assert train_step(2, *random_batch(4))
    bad[0] = False
    assert train_step(3, *random_batch(4))  # launched before anybody read step 2
    found = train_step.read().nonfinite
    assert found.step == 2  # the first bad one is named, with its own numbers
    if what == "loss":
        assert str(found.loss) == value
    else:
        assert math.isfinite(found.loss)
    assert not math.isfinite(found.grad_norm)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for key, tensor in optimizer_state(train_step).items():
        assert torch.equal(tensor, moments[key]), key


def test_layer_norms_are_those_before_clipping() -> None:
    """The layers' norms together are the gradient norm that the step reports."""
    config = replace_training(Config(model=SMALL), max_grad_norm=0.01)
    train_step = make_step(4, config)
    assert train_step(1, *random_batch(4))
    norm = train_step.read().grad_norm
    norms = layer_norms(train_step.parallel.model, clipped_by=norm / 0.01)
    assert list(norms) == ["embed_tokens", "layers.0", "layers.1", "norm"]
    assert math.hypot(*norms.values()) == pytest.approx(norm, rel=1e-3)


def test_an_interrupted_step_changes_nothing() -> None:
    """A signal between two micro-batches: the step is given up, the weights are as before."""

    def loss(input_ids: Tensor, labels: Tensor) -> Tensor:
        train_step.stop.number = 15  # comes during the first micro-batch
        return model(input_ids, labels)

    train_step = make_step(1, loss=loss)
    model = train_step.parallel.model
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert not train_step(1, *random_batch(4))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(("mode", "micro"), [("selective", 4), ("full", 4), ("full", 1)])
def test_gradient_checkpointing_and_smaller_micro_batches_keep_the_gradients(
    mode: str, micro: int
) -> None:
    """Whatever fit_memory chooses gives the loss and gradients of the plain step."""
    batch = random_batch(8)
    plain, other = make_step(4), make_step(micro)
    other.parallel.model.model.gradient_checkpointing = mode
    torch.testing.assert_close(other.accumulate(1, *batch), plain.accumulate(1, *batch))
    ours, theirs = (x.parallel.model.parameters() for x in (other, plain))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, two.grad, atol=1e-6, rtol=1e-4)


def test_the_sizes_of_micro_batches() -> None:
    """The divisors of a step's sequences from the configured size down to one."""
    assert optimizer.micro_batches(48, 96) == [48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1]
    assert optimizer.micro_batches(5, 5) == [5, 1]
    assert optimizer.micro_batches(1, 96) == [1]
