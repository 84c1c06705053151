"""A step is one step however it is cut up, tells what it was, stops when asked, and never keeps what is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from motley_trainer.data.batches import summed_loss
from motley_trainer.errors import DivergedError
from motley_trainer.job import loop
from motley_trainer.job.checkpoint import Checkpoints
from motley_trainer.job.reporting import JobCancelledError, Reporter, Step, memory_bytes
from motley_trainer.spec.settings import LoraSettings, OptimizerSettings, Schedule
from small_trainings import BINDING, SmallTraining, stop_after
from torch import Tensor, nn


def factors(training: SmallTraining) -> dict[str, Tensor]:
    return {name: factor.detach() for name, factor in training.attached.parameters.items()}


def told(events: list[Mapping[str, object]], kind: str) -> list[Any]:
    return [event[kind] for event in events if kind in event]


# --- The step


def test_the_loss_is_transformers_own(tmp_path: Path) -> None:
    training = SmallTraining()
    (batch,) = training.data.step(0, 5, 5)
    ours = summed_loss(training.model, batch) / batch.num_learned
    theirs = training.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    torch.testing.assert_close(ours, theirs)


def test_micro_batches_add_up_to_the_gradient_of_one_batch(tmp_path: Path) -> None:
    gradients = []
    for micro_batch_size in (4, 3, 1):
        training = SmallTraining.of(micro_batch_size=micro_batch_size, steps=1, optimizer=OptimizerSettings(1e-3))
        training.train(tmp_path / str(micro_batch_size))
        gradients.append({name: factor.grad for name, factor in training.attached.parameters.items()})
    for others in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-7)


def test_what_a_method_adds_counts_by_the_share_of_the_samples(tmp_path: Path) -> None:
    class Pulled:
        """A method's part whose extra loss pulls one factor, and nothing else."""

        def __init__(self, attached: Any) -> None:
            self._attached = attached
            self.parameters = attached.parameters
            self.pulled = next(iter(self.parameters.values()))

        def buffers(self) -> dict[str, Tensor]:
            return {}

        def extra_loss(self, batch: object) -> Tensor:
            return 1000 * self.pulled.sum()

        def report(self) -> dict[str, object]:
            return {}

    pulls = []
    for size in (4, 3):
        training = SmallTraining.of(micro_batch_size=size, steps=1, optimizer=OptimizerSettings(max_gradient_norm=0))
        attached = Pulled(training.attach())
        whole = loop.Training(training.model, attached, training.spec, training.data)  # type: ignore[arg-type]
        loop.train(whole, Checkpoints(tmp_path / str(size), BINDING), None, Reporter(lambda event: None, lambda: False))
        gradient = attached.pulled.grad
        assert gradient is not None
        pulls.append(float(gradient.mean()))
    assert pulls == pytest.approx([1000.0, 1000.0], rel=1e-3)  # beside which the data's own gradient is nothing


def test_nothing_of_the_base_changes_and_none_of_it_is_put_into_training_mode(tmp_path: Path) -> None:
    training = SmallTraining.of(steps=2)
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    modes: set[tuple[bool, bool]] = set()
    hook = training.model.register_forward_hook(
        lambda model, inputs, output: modes.update(
            (module.training, "Lora" in type(module).__name__) for module in model.modules()
        )
    )
    training.train(tmp_path)
    hook.remove()
    assert modes == {(True, True), (False, False)}
    assert not any(module.training for module in training.model.modules())
    after = {name.replace(".base.", "."): tensor for name, tensor in training.model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(factor.any() for factor in factors(training).values())


@pytest.mark.parametrize("bound", [0.0, 1e-6])
def test_gradients_are_clipped_where_that_is_asked_for(tmp_path: Path, bound: float) -> None:
    training = SmallTraining.of(steps=1, optimizer=OptimizerSettings(max_gradient_norm=bound))
    training.train(tmp_path)
    norm = torch.stack(
        [factor.grad.norm() for factor in training.attached.parameters.values() if factor.grad is not None]
    ).norm()
    (progress,) = told(training.events, "progress")
    assert progress["gradient_norm"] > 0.01  # as it was before
    assert float(norm) == pytest.approx(bound or progress["gradient_norm"], rel=1e-3)


def test_the_rate_of_each_step_is_its_schedules_and_weights_decay(tmp_path: Path) -> None:
    settings = OptimizerSettings(1e-2, Schedule.LINEAR, 0, weight_decay=0.5)
    training = SmallTraining.of(steps=2, optimizer=settings, settings=LoraSettings(rank=2))
    before = {
        name: factor.detach().clone()
        for name, factor in SmallTraining.of(settings=LoraSettings(rank=2)).attach().parameters.items()
    }
    training.train(tmp_path)
    assert [event["learning_rate"] for event in told(training.events, "progress")] == [1e-2, 5e-3]
    undecayed = SmallTraining(replace(training.spec, optimizer=replace(settings, weight_decay=0.0)))
    undecayed.train(tmp_path / "other")
    name = next(name for name in before if name.endswith("lora_a"))
    decay = 1 - (1 - 1e-2 * 0.5) * (1 - 5e-3 * 0.5)
    shrunk = (factors(undecayed)[name] - factors(training)[name]) / before[name]
    assert float(shrunk.median()) == pytest.approx(decay, rel=0.1)


def test_the_same_seed_gives_the_same_bits_and_another_others(tmp_path: Path) -> None:
    runs = []
    for place, seed in enumerate((5, 5, 6)):
        training = SmallTraining.of(seed=seed, settings=LoraSettings(rank=2, dropout=0.2), steps=3)
        training.train(tmp_path / str(place))
        runs.append(factors(training))
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())
    assert not any(torch.equal(tensor, runs[2][name]) for name, tensor in runs[0].items())


def test_no_shared_generator_is_drawn_from(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    SmallTraining.of(steps=1, settings=LoraSettings(rank=2, dropout=0.2)).train(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


# --- Stopping


def test_it_stops_after_the_step_it_is_at_and_keeps_a_checkpoint_of_it(tmp_path: Path) -> None:
    training = SmallTraining()
    with pytest.raises(JobCancelledError):
        training.train(tmp_path, stop_after(3))
    assert [progress["step"] for progress in told(training.events, "progress")] == [1, 3]
    assert told(training.events, "checkpoint_step") == [3]
    kept = Checkpoints(tmp_path, BINDING).latest()
    assert kept is not None
    assert kept.step == 3


def test_checkpoints_are_kept_every_so_many_steps_and_of_the_last(tmp_path: Path) -> None:
    training = SmallTraining()
    training.train(tmp_path)
    assert told(training.events, "checkpoint_step") == [4, 8, 10]


# --- Not finite


class Broken(nn.Module):
    """A Linear that returns a value that is no number from some call on."""

    def __init__(self, base: nn.Module, calls: int) -> None:
        super().__init__()
        self.base = base
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls -= 1
        y: Tensor = self.base(x)
        return y if self.calls >= 0 else y * math.nan


def test_a_loss_that_is_no_number_ends_the_training_and_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    training = SmallTraining()
    training.model.lm_head = Broken(training.model.lm_head, 6)
    with pytest.raises(DivergedError) as ended:
        training.train(tmp_path)
    assert (ended.value.reason, ended.value.field) == ("LOSS_NOT_FINITE", "optimizer.learning_rate")
    assert "step 7" in ended.value.message
    kept = Checkpoints(tmp_path, BINDING).latest()
    assert kept is not None
    assert kept.step == 4
    assert all(tensor.isfinite().all() for tensor in kept.tensors.values())


def test_an_infinite_gradient_ends_it_before_the_step_is_taken(tmp_path: Path) -> None:
    training = SmallTraining()
    attached = training.attach()
    name, factor = next(iter(attached.parameters.items()))
    factor.register_hook(lambda gradient: gradient * math.inf)
    before = factors(training)[name].clone()
    whole = loop.Training(training.model, attached, training.spec, training.data)
    with pytest.raises(DivergedError):
        loop.train(whole, Checkpoints(tmp_path, BINDING), None, Reporter(lambda event: None, lambda: False))
    assert torch.equal(factor, before)
    assert Checkpoints(tmp_path, BINDING).latest() is None


def test_weights_that_became_infinite_are_never_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = SmallTraining.of(checkpoint_steps=1)

    def step(self: torch.optim.AdamW) -> None:
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(math.inf)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {name: torch.zeros(()) for name in ("exp_avg", "exp_avg_sq", "step")}

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(DivergedError):
        training.train(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- What is told


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_is_told_once_a_second_and_the_first_and_the_last_always() -> None:
    events: list[Mapping[str, object]] = []
    clock = Clock()
    reporter = Reporter(events.append, lambda: False, clock=clock)
    reporter.begin_steps()
    for number in range(1, 21):
        clock.now += 0.25
        reporter.step(Step(number, 20, 1.5, 1e-3, 0.5, 50))
    progress = told(events, "progress")
    assert [event["step"] for event in progress] == [1, 5, 9, 13, 17, 20]
    assert [event["tokens_per_second"] for event in progress] == [200.0] * 6
    assert [event["remaining"] for event in progress[:2]] == ["4.750s", "3.750s"]
    assert progress[-1]["remaining"] == "0.000s"
    assert {key: progress[0][key] for key in ("num_steps", "loss", "learning_rate", "gradient_norm")} == {
        "num_steps": 20, "loss": 1.5, "learning_rate": 1e-3, "gradient_norm": 0.5,
    }  # fmt: skip


def test_what_was_told_is_not_told_again() -> None:
    events: list[Mapping[str, object]] = []
    reporter = Reporter(events.append, lambda: False, clock=Clock())
    reporter.step(Step(1, 5, 1.0, 1.0, 1.0, 1))
    reporter.step(Step(2, 5, 1.0, 1.0, 1.0, 1))
    reporter.flush()
    reporter.flush()
    assert [event["step"] for event in told(events, "progress")] == [1, 2]


def test_a_stage_is_not_begun_once_the_job_shall_stop() -> None:
    events: list[Mapping[str, object]] = []
    with pytest.raises(JobCancelledError):
        Reporter(events.append, lambda: True).stage("reading data")
    assert events == []


def test_memory_is_what_the_process_has() -> None:
    assert 50 * 2**20 < memory_bytes() < 2**36
