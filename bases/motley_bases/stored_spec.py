"""The facts of a base as it is stored, without its weights in memory: for work on adapters' files alone.

Holds for families whose pruning is known, of which no probe is needed to tell that every Linear sees each token once;
the others are refused. Bytes of weights are read for the fingerprint only. Runs on the calling thread.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from motley_bases.admission import check_config, check_stored_config
from motley_bases.base_record import resolve_fingerprint
from motley_bases.checkpoint import read_config
from motley_bases.describe import describe
from motley_bases.fingerprint import fingerprint
from motley_bases.generation import read_generation
from motley_bases.ledger import attention_layers, outline_model
from motley_bases.loader import choose_dtype, load_tokenizer, read_parsed_config
from motley_bases.probe import ProbeReport
from motley_bases.pruned import check_prunable, read_bound_manifest, register_pruned
from motley_bases.quantization import AUTO, CONFIG_FIELD, stored_quantization
from motley_bases.spec import BaseSpec


def read_spec(directory: Path) -> BaseSpec:
    """Describe a base of the Llama family, whole or pruned, as `load_base` would on a CPU, and load nothing.

    Raises: UnreadableBaseError for what can be seen of a broken checkpoint without its weights' values;
    UnsupportedBaseError if it cannot be served, or with reason NOT_PRUNABLE for other families.
    """
    register_pruned()
    check_stored_config(read_config(directory))
    config = read_parsed_config(directory)
    check_config(config)
    check_prunable(config)
    quantization = stored_quantization(getattr(config, CONFIG_FIELD, None))
    digest = resolve_fingerprint(directory, fingerprint(directory), quantization)
    manifest = read_bound_manifest(directory, config, digest)
    model = outline_model(config, choose_dtype(AUTO, directory, config, torch.device("cpu")))
    linears = frozenset(path for path, module in model.named_modules() if isinstance(module, nn.Linear))
    report = ProbeReport(attention_layers(config), linears)
    stored = read_generation(directory)
    spec = describe(model, load_tokenizer(directory), report, stored, name=directory.name, fingerprint=digest)
    pruned_from = None if manifest is None else manifest.original_fingerprint
    return replace(spec, quantization=quantization, pruned_from=pruned_from)
