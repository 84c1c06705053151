"""The spec builder: reads a loaded model, its tokenizer and the probe's report into the frozen facts of BaseSpec.

Must run before adapter sites take the Linears' places, since paths and types are those of the checkpoint. Pure
functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from motley_bases.admission import rope_parameters
from motley_bases.errors import UnsupportedBaseError
from motley_bases.generation import StoredGeneration, generation_defaults
from motley_bases.probe import ProbeReport
from motley_bases.pruned_models import is_prunable
from motley_bases.quantization import is_linear, is_quantized
from motley_bases.spec import BaseSpec


def describe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    report: ProbeReport,
    stored: StoredGeneration,
    *,
    name: str,
    fingerprint: str,
) -> BaseSpec:
    """Collect the facts of one base.

    Semantics: a Linear that the probe did not see called once on every row counts among `other_modules`, since an
    adapter on it would not be served right.
    Raises: UnsupportedBaseError if the embedding or lm_head is not what adapters and sampling expect, or an
    end-of-sequence id is outside the vocabulary.
    """
    embedding, lm_head = model.get_input_embeddings(), cast(Any, model).get_output_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise _unsupported(model, "token embedding", type(embedding).__name__)
    if not isinstance(lm_head, nn.Linear) or lm_head.out_features != embedding.num_embeddings:
        raise _unsupported(model, "lm_head", type(lm_head).__name__)
    if is_quantized(lm_head):
        raise _unsupported(model, "lm_head", "quantized, and it is served whole only")
    embedding_path, lm_head_path = _path_of(model, embedding), _path_of(model, lm_head)
    linears = {
        path: (module.in_features, module.out_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_linear(module) and path in report.linears
    }
    if lm_head_path not in linears:
        raise _unsupported(model, "lm_head", "one not called once for the sampled rows")
    return BaseSpec(
        name=name,
        architecture=type(model).__name__,
        fingerprint=fingerprint,
        dtype=str(model.dtype).removeprefix("torch."),
        vocab_size=embedding.num_embeddings,
        hidden_size=embedding.embedding_dim,
        context_length=context_length(model.config),
        layers=report.layers,
        linears=linears,
        embedding_path=embedding_path,
        lm_head_path=lm_head_path,
        other_modules=_other_modules(model, {*linears, embedding_path}),
        generation=generation_defaults(stored, model.config, tokenizer, embedding.num_embeddings),
        tied_embeddings=lm_head.weight is embedding.weight,
        has_chat_template=bool(tokenizer.chat_template),
        is_prunable=is_prunable(model.config),
    )


def context_length(config: PreTrainedConfig) -> int:
    """Return how many tokens a sequence may have.

    Semantics: max_position_embeddings, as checkpoints with linear or llama3 scaling store the scaled length there
    already; YaRN checkpoints often leave the original there, so there the scaled length counts if it is larger.
    Raises: UnsupportedBaseError if the config does not say.
    """
    declared = getattr(config, "max_position_embeddings", None)
    if not isinstance(declared, int) or declared < 1:
        raise UnsupportedBaseError(
            f"{config.model_type} cannot be served: its config does not say how long a context may be",
            reason="NO_CONTEXT_LENGTH",
            field="max_position_embeddings",
        )
    lengths = [declared]
    for settings in rope_parameters(config):
        original, factor = settings.get("original_max_position_embeddings"), settings.get("factor")
        if settings.get("rope_type") == "yarn" and isinstance(original, int) and isinstance(factor, int | float):
            lengths.append(int(original * factor))
    return max(lengths)


def _path_of(model: nn.Module, wanted: nn.Module) -> str:
    paths: Iterator[str] = (path for path, module in model.named_modules() if module is wanted)
    return next(paths)


def _other_modules(model: nn.Module, sites: set[str]) -> frozenset[str]:
    """Return every path an adapter may name in vain.

    Semantics: the modules that are no site, and the stacked weights (experts) that are plain parameters of a module.
    """
    modules = {path for path, _ in model.named_modules() if path}
    stacked = {path for path, parameter in model.named_parameters() if parameter.ndim > 2}
    return frozenset((modules | stacked) - sites)


def _unsupported(model: PreTrainedModel, what: str, found: str) -> UnsupportedBaseError:
    message = f"{type(model).__name__} cannot be served: its {what} is {found}"
    return UnsupportedBaseError(message, reason="EMBEDDINGS", field="architectures")
