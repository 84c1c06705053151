"""The method `loqt`: a whole base is trained, its Linears held in few bits and by one low-rank factor each at a time.

What is no matrix of such a Linear - embeddings, norms, biases, lm_head - is trained as it is. Before some steps all
factors are merged and begin anew, from that step's gradient. What comes of it is a base, and no adapter. Runs on the
thread that owns the model.
Source: LoQT, arXiv:2405.16528.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from motley_bases.fingerprint import StoredTensor, combine
from motley_bases.quantization import NONE
from torch import Tensor, nn
from transformers import PreTrainedModel

from motley_trainer.data.batches import Batch
from motley_trainer.errors import SettingsError
from motley_trainer.methods.held_weight import holding
from motley_trainer.methods.loqt_linear import LoqtLinear, Renewing
from motley_trainer.methods.loqt_schedule import merge_steps
from motley_trainer.spec.settings import LoqtSettings

_MERGES, _NUM_TOLD = "merges", "num_told"
_RANK_SHARE = 4  # of the hidden size, one in so many
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Merge:
    """A merge: how many steps were taken before it, and a digest.

    Semantics: the digest is of all weights right after it, and of the digest of the merge before it, or, of the first,
    of the fingerprint that training began from: it is not the same unless all that was before is.
    """

    step: int
    digest: str


@dataclass(frozen=True, slots=True)
class Loqt:
    """Train a whole base.

    Semantics: `quantization` is how Linears are held, `nf4` or `none`; `original` is the fingerprint of what is
    trained, None for weights that were drawn; `field` is where the settings stand in a spec. What gives the logits is
    trained where `trains_output`.
    """

    settings: LoqtSettings
    quantization: str
    original: str | None = None
    field: str = "loqt"
    trains_output: bool = True

    def attach(
        self,
        model: PreTrainedModel,
        paths: Sequence[str],
        num_steps: int,
        resumed: Mapping[str, Tensor] | None,
    ) -> AttachedLoqt:
        """Take the Linears' places, and let all that is trained learn.

        Semantics: `resumed` are the buffers of a checkpoint, as for any method. Until the first step's gradient is
        known, Linears have their weights as they came.
        Raises: SettingsError with reason RANK_TOO_LARGE.
        """
        linears: dict[str, nn.Linear] = {}
        for path in paths:
            linear = model.get_submodule(path)
            assert isinstance(linear, nn.Linear)  # the facts of the base say so
            linears[path] = linear
        renewing = Renewing(
            rank=self._rank(model, linears),
            scale=self.settings.scale,
            compensation_steps=0 if self.quantization == NONE else self.settings.compensation_steps,
            decomposition=self.settings.decomposition,
            holding=holding(self.quantization),
            field=self.field,
        )
        output = None if self.trains_output else model.get_output_embeddings().weight
        adapted: dict[str, LoqtLinear] = {}
        for path in paths:
            adapted[path] = LoqtLinear(linears.pop(path), path, renewing)
            model.set_submodule(path, adapted[path])
        parameters = {name: each for name, each in model.named_parameters() if each is not output}
        for parameter in parameters.values():
            parameter.requires_grad_()
        attached = AttachedLoqt(
            model,
            adapted,
            parameters,
            merge_steps(self.settings, num_steps),
            keeps_moments=self.settings.keep_moments,
            original=self.original,
        )
        if resumed is not None:
            attached.resume(resumed)
        return attached

    def _rank(self, model: PreTrainedModel, linears: Mapping[str, nn.Linear]) -> int:
        smallest = min(min(linear.in_features, linear.out_features) for linear in linears.values())
        asked = self.settings.rank
        if asked is None:
            return min(max(1, int(model.config.hidden_size) // _RANK_SHARE), smallest)
        for path, linear in linears.items():
            smaller = min(linear.in_features, linear.out_features)
            if asked > smaller:
                field = f"{self.field}.rank"
                message = f"{field} {asked} is more than the smaller side of {path}, which is {smaller}"
                raise SettingsError(message, reason="RANK_TOO_LARGE", field=field)
        return asked


class AttachedLoqt:
    """What one training has made of a model, and how it begins anew."""

    def __init__(
        self,
        model: PreTrainedModel,
        adapted: Mapping[str, LoqtLinear],
        parameters: Mapping[str, nn.Parameter],
        merges_before: Collection[int],
        *,
        keeps_moments: bool,
        original: str | None,
    ) -> None:
        self.parameters = parameters
        self.merges: list[Merge] = []
        self._model = model
        self._adapted = adapted
        self._merges_before = frozenset(merges_before)
        self._keeps_moments = keeps_moments
        self._original = original
        self._num_told = 0
        self._merging: int | None = None
        self._gathered: dict[str, Tensor] = {}

    # --- What is trained

    def buffers(self) -> Mapping[str, Tensor]:
        """Return what the Linears hold, the merges so far, and how many of them have been told."""
        merges = json.dumps([[merge.step, merge.digest] for merge in self.merges])
        return {
            **self._held(),
            _MERGES: torch.tensor(list(merges.encode()), dtype=torch.uint8),
            _NUM_TOLD: torch.tensor(self._num_told),
        }

    def resume(self, buffers: Mapping[str, Tensor]) -> None:
        """Hold what a checkpoint has.

        Semantics: merges that were not told before it was saved are told again: whether they were after it is not
        known.
        """
        for path, linear in self._adapted.items():
            own = f"{path}."
            linear.resume({name.removeprefix(own): tensor for name, tensor in buffers.items() if name.startswith(own)})
        self.merges = [Merge(step, digest) for step, digest in json.loads(bytes(buffers[_MERGES].tolist()))]
        self._num_told = int(buffers[_NUM_TOLD])

    def extra_loss(self, batch: Batch) -> None:
        """Add nothing to the loss."""

    def report(self) -> Mapping[str, object]:
        """Tell the merges since the last report."""
        untold, self._num_told = self.merges[self._num_told :], len(self.merges)
        return {"merges": {"merges": merges_to_json(untold)}} if untold else {}

    def facts(self) -> Mapping[str, object]:
        """Return how many parameters are trained, those of the factors apart, and by which rank."""
        first = next(iter(self._adapted.values()))
        return {
            "rank": first.rank,
            "num_modules": len(self._adapted),
            "num_trained_parameters": sum(parameter.numel() for parameter in self.parameters.values()),
            "num_factor_parameters": sum(factor.numel() for factor in self._factors),
            "num_merges": len(self.merges),
        }

    # --- Beginning anew

    @property
    def is_renewing(self) -> bool:
        """Tell whether this step merges."""
        return self._merging is not None

    def begin_step(self, step: int, num_batches: int) -> Collection[nn.Parameter]:
        """Have the whole weights' gradients taken in this step, where a merge comes before it.

        Semantics: one batch is all of the gradient, and each Linear begins anew as soon as it is there, so that no
        other's is in memory beside it. Those of several are summed in the host's memory.
        """
        self._merging = step if step in self._merges_before else None
        self._gathered = {}
        captures = LoqtLinear.renew if num_batches == 1 else self._gather
        for linear in self._adapted.values():
            linear.captures = captures if self.is_renewing else None
        return self._factors if self.is_renewing and not self._keeps_moments else ()

    def end_backward(self) -> None:
        """Do what is left to do of a merge."""
        if self._merging is None:
            return
        for path in list(self._gathered):
            linear = self._adapted[path]
            linear.renew(self._gathered.pop(path).to(linear.factor.device))
        assert all(linear.captures is None for linear in self._adapted.values())  # each saw a gradient
        step, self._merging = self._merging, None
        if step == 0:
            return
        self.merges.append(Merge(step, self._digest()))
        if self._keeps_moments:
            for factor in self._factors:
                factor.grad = torch.zeros_like(factor)  # so that the moments move it, as they would have the one before

    @property
    def _factors(self) -> list[nn.Parameter]:
        return [linear.factor for linear in self._adapted.values()]

    def _gather(self, linear: LoqtLinear, gradient: Tensor) -> None:
        gathered = self._gathered.get(linear.path)
        if gathered is None:
            self._gathered[linear.path] = gradient.to(CPU, torch.float32, copy=True)
        else:
            gathered.add_(gradient.to(CPU))

    # --- What comes of it

    def settle(self, device: torch.device | None = None) -> None:
        """Put plain Linears with the weights as they are now back into the model.

        Effects: ends the training. One by one, so that no second copy of all weights is made; on `device`, the
        Linears' own unless told.
        """
        for path, linear in self._adapted.items():
            self._model.set_submodule(path, linear.settled(device or linear.factor.device))
        self._adapted, self.parameters = {}, {}
        self._model.requires_grad_(False)

    def _held(self) -> dict[str, Tensor]:
        return {
            f"{path}.{name}": tensor
            for path, linear in self._adapted.items()
            for name, tensor in linear.tensors().items()
        }

    def _digest(self) -> str:
        """Return a digest of all that the outputs depend on, and of what was before."""
        before = self.merges[-1].digest if self.merges else self._original or ""
        now = combine(_stored(name, tensor) for name, tensor in [*self._held().items(), *self.parameters.items()])
        return f"sha256:{hashlib.sha256(f'{before} {now}'.encode()).hexdigest()}"


def merges_to_json(merges: Iterable[Merge]) -> list[dict[str, object]]:
    """Return merges as the wire has them."""
    return [{"step": merge.step, "digest": merge.digest} for merge in merges]


def _stored(name: str, tensor: Tensor) -> StoredTensor:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    return StoredTensor(name, dtype, shape, hashlib.sha256(cast(Any, content.numpy())).hexdigest())
