"""A training of GOAT's mixture from a start that no job has: every expert as a LoRA begins, and no residual.

Owns that start. Router, order of the data, steps and what is measured are those of a job, by the same code.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from embedded import Line
from jobs import MAX_LENGTH, load_subject, write_dataset
from motley_trainer.data.training_data import read_data
from motley_trainer.job.checkpoint import Checkpoints
from motley_trainer.job.evaluation import Evaluation, measure
from motley_trainer.job.loop import Training, train
from motley_trainer.job.reporting import Reporter
from motley_trainer.methods import method_of
from motley_trainer.methods.goat_linear import GoatLinear
from motley_trainer.methods.method import Context
from motley_trainer.spec.reading import read_spec
from motley_trainer.spec.settings import derived_seed
from subject import current
from torch import nn


def train_from(
    begin: Callable[[nn.Module, int], None],
    spec: Mapping[str, Any],
    learned: Iterable[Line],
    asked: Iterable[Line],
    adapter: Path,
) -> Evaluation:
    """Train an adapter as a job does, from what `begin` makes of what the method has attached, and keep its directory.

    Semantics: `spec`, `learned` and `asked` as of `run_job`; `begin` gets the model and the spec's seed. The method
    looks at no data before the first step.
    """
    base = load_subject(current())
    ends = base.spec.generation.eos_token_ids
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "data")
        named = {"dataset": write_dataset(files, learned), "gate": {"dataset": write_dataset(files, asked)}}
        asked_for = read_spec({**spec, **named})
        data = read_data(files, asked_for, base.tokenizer, MAX_LENGTH, on_line=lambda *_: None)
        before = measure(base.model, base.tokenizer, data.held_out, ends)
        attached = method_of(asked_for).attach(base.model, Context(base.spec, asked_for.seed, lambda _: ()), None)
        begin(base.model, asked_for.seed)
        training = Training(base.model, attached, asked_for, data)
        train(training, Checkpoints(Path(folder, "checkpoints"), {}), None, Reporter(lambda _: None, lambda: False))
        after = measure(base.model, base.tokenizer, data.held_out, ends)
        attached.write(adapter, {})
    return Evaluation(len(data.held_out), before.loss, after.loss, before.exact_match, after.exact_match)


@torch.no_grad()
def begin_as_lora(model: nn.Module, seed: int) -> None:
    """Draw every expert's A as a Linear begins, and make its B and the residual zero: the base, whatever the routing.

    Effects: overwrites what a GOAT's experts and residuals are in all Linears; the routers stay.
    """
    initial = torch.Generator().manual_seed(derived_seed(seed, "mixture"))
    for module in model.modules():
        if isinstance(module, GoatLinear):
            drawn = torch.empty(module.goat_a.shape)
            module.goat_a.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=initial))
            for factor in (module.goat_b, module.residual_a, module.residual_b):
                factor.zero_()
