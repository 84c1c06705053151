"""The step loop: from a model with a method's parameters in it to trained parameters.

Forward, loss, backward, clip, step, over accelerate; a checkpoint now and then, and a look at whether to stop after
every step. Whatever a step depends on is in the spec, the data, the base and the checkpoint, so a training that was
interrupted gives the bits of one that was not. Runs on the thread that owns the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from motley_trainer.data.batches import summed_loss
from motley_trainer.data.training_data import TrainingData
from motley_trainer.errors import DivergedError
from motley_trainer.job.captured import captured, restore, restore_moments
from motley_trainer.job.checkpoint import Checkpoint, Checkpoints
from motley_trainer.job.optimizers import make_optimizer
from motley_trainer.job.reporting import JobCancelledError, Reporter, Step
from motley_trainer.job.schedule import rate
from motley_trainer.methods.method import NoRenewal, Renewal, Trained
from motley_trainer.spec.settings import TrainingSpec


@dataclass(frozen=True, eq=False, slots=True)
class Training:
    """What a training is made of."""

    model: PreTrainedModel
    attached: Trained
    spec: TrainingSpec
    data: TrainingData
    renewal: Renewal = field(default_factory=NoRenewal)


def train(training: Training, checkpoints: Checkpoints, resumed: Checkpoint | None, reporter: Reporter) -> Checkpoint:
    """Take the steps that are left after a checkpoint, and return the last one.

    Effects: changes the method's parameters and nothing else of the model.
    Raises: DivergedError with reason LOSS_NOT_FINITE; OutputError if a checkpoint cannot be kept; JobCancelledError
    once a checkpoint of the step is. Whichever it is, what was kept before can be gone on from.
    """
    spec = training.spec
    num_steps = training.data.num_steps(spec)
    optimizer = make_optimizer(training.attached.parameters.values(), spec.optimizer)
    accelerator = Accelerator(cpu=training.model.device.type == "cpu", mixed_precision="no")
    if resumed is not None:
        restore(training.attached, resumed.tensors)
        restore_moments(training.attached, optimizer, resumed.tensors)
        _report(training.attached, reporter)  # what a run that ended right after it was saved has not told
    set_training(training.model, training.attached, True)
    reporter.begin_steps()
    for step in range(0 if resumed is None else resumed.step, num_steps):
        told = _take_step(training, optimizer, accelerator, step, num_steps)
        reporter.step(told)
        is_stopping = reporter.should_stop()
        if told.step % spec.checkpoint_steps == 0 or told.step == num_steps or is_stopping:
            resumed = Checkpoint(told.step, told.loss, captured(training.attached, optimizer))
            _refuse_not_finite(resumed)
            checkpoints.save(resumed)
            reporter.flush()
            reporter.tell("checkpoint_step", told.step)
            _report(training.attached, reporter)
        if is_stopping:
            raise JobCancelledError
    assert resumed is not None  # there is one step at least
    set_training(training.model, training.attached, False)
    return resumed


def _report(attached: Trained, reporter: Reporter) -> None:
    for name, body in attached.report().items():
        reporter.tell(name, body)


def _take_step(
    training: Training, optimizer: torch.optim.Optimizer, accelerator: Accelerator, step: int, num_steps: int
) -> Step:
    """Take one step, the first being 0.

    Semantics: the loss is the mean over all learned tokens of the step, so that micro-batches add up to the gradient of
    one batch; what a method adds counts by the share of the samples. A loss that is not finite ends it before its
    gradient is taken, which a step that renews would make weights of.
    """
    spec, model, renewal = training.spec, training.model, training.renewal
    batches = [batch.to(model.device) for batch in training.data.step(step, spec.batch_size, spec.micro_batch_size)]
    num_learned = sum(batch.num_learned for batch in batches)
    learning_rate = rate(spec.optimizer, step, num_steps)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad(set_to_none=True)
    for parameter in renewal.begin_step(step, len(batches)):
        optimizer.state.pop(parameter, None)
    what = "at a merge, the loss" if renewal.is_renewing else "its loss"
    total = 0.0
    for batch in batches:
        with accelerator.autocast():
            loss = summed_loss(model, batch) / num_learned
            extra = training.attached.extra_loss(batch)
        total += float(loss.detach())
        if not math.isfinite(total):
            raise _diverged(step + 1, f"{what} is {total}")
        accelerator.backward(loss if extra is None else loss + extra * (len(batch.input_ids) / spec.batch_size))
    renewal.end_backward()
    bound = spec.optimizer.max_gradient_norm or math.inf
    norm = float(accelerator.clip_grad_norm_(training.attached.parameters.values(), bound))
    if not math.isfinite(norm):
        raise _diverged(step + 1, f"{what} is {total}, the norm of its gradient {norm}")
    optimizer.step()
    return Step(step + 1, num_steps, total, learning_rate, norm, sum(batch.num_tokens for batch in batches))


def set_training(model: PreTrainedModel, attached: Trained, is_training: bool) -> None:
    """Put the modules that own a trained parameter into training mode, or out of it; the base stays as served."""
    trained = {id(parameter) for parameter in attached.parameters.values()}
    for module in model.modules():
        if any(id(parameter) in trained for parameter in module.parameters(recurse=False)):
            module.training = is_training


def _refuse_not_finite(checkpoint: Checkpoint) -> None:
    for name, tensor in checkpoint.tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise _diverged(checkpoint.step, f"{name} has values that are not finite")


def _diverged(step: int, problem: str) -> DivergedError:
    message = f"training diverged at step {step}: {problem}; a lower learning rate, or more warm-up, may do"
    return DivergedError(message, reason="LOSS_NOT_FINITE", field="optimizer.learning_rate")
