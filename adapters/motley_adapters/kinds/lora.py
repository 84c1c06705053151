"""The kind `lora`: a PEFT directory becomes one delta unit per module it names.

Rank and scaling are resolved as PEFT resolves them, and held against the tensors: a wrong scale is a wrong model.
Whatever PEFT would pass over with a warning (a tensor nobody asked for, a module left without tensors) is refused by
name. It checks against the base's facts alone and never touches the base. Any thread but the event loop's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from motley_bases.spec import BaseSpec
from motley_kernels.adapter_delta import DeltaUnit
from torch import Tensor

from motley_adapters.errors import AdapterFormatError, AdapterMismatchError
from motley_adapters.formats import CONFIG_FILE, read_json_file, read_tensor_file
from motley_adapters.kinds.checks import check_factor, check_products, module_error, shape_error
from motley_adapters.kinds.content import KindContent, KindSource
from motley_adapters.module_patterns import PatternMatcher
from motley_adapters.peft_config import PeftLoraConfig, parse_lora_config
from motley_adapters.spec import BaseTensor
from motley_adapters.tensor_file import in_pieces, parse_tensors

KIND = "lora"

_ALL_LINEAR = "all-linear"
_PREFIX = "base_model.model."
_LINEAR_SUFFIXES = (".lora_A.weight", ".lora_B.weight")
_EMBEDDING_SUFFIXES = (".lora_embedding_A", ".lora_embedding_B")
_RANK_SOURCE = "adapter_config resolves"
_BASE_WEIGHT_SUFFIXES = (".base_layer.weight", ".weight")


@dataclass(slots=True)
class _Factors:
    """The tensors that a file has for one module, under their names there."""

    a: Tensor | None = None
    b: Tensor | None = None
    is_embedding: bool = False

    @property
    def suffixes(self) -> tuple[str, str]:
        return _EMBEDDING_SUFFIXES if self.is_embedding else _LINEAR_SUFFIXES


def read_lora(source: KindSource) -> KindContent:
    """Read a PEFT LoRA directory.

    Shapes: as in `Adapter`.
    Raises: AdapterFormatError for files that are malformed, unsupported or at odds with each other;
    AdapterMismatchError for modules or shapes that are not the base's. The field is the tensor's name, the module's
    path or the config's field.
    """
    return KindContent(read_peft_units(source))


def read_peft_units(source: KindSource) -> dict[str, DeltaUnit]:
    """Return the units of a PEFT LoRA directory by module path of the base; see `read_lora`."""
    base = source.base
    config = _spell_out_targets(parse_lora_config(read_json_file(source.directory, CONFIG_FILE)), base)
    tensors = parse_tensors(read_tensor_file(source.directory, source.read))
    factors = _sort_tensors(tensors, base, source.base_tensor)
    matcher = PatternMatcher()
    _check_targets(factors, config, base, matcher)
    return {path: _unit(path, factors[path], config, base, matcher) for path in sorted(factors)}


def _spell_out_targets(config: PeftLoraConfig, base: BaseSpec) -> PeftLoraConfig:
    if isinstance(config.target_modules, str) and config.target_modules.lower() == _ALL_LINEAR:
        linears = tuple(path for path in base.linears if path != base.lm_head_path)  # PEFT leaves the head out
        return replace(config, target_modules=linears)
    return config


def _sort_tensors(tensors: dict[str, Tensor], base: BaseSpec, base_tensor: BaseTensor | None) -> dict[str, _Factors]:
    factors: dict[str, _Factors] = {}
    for name, tensor in sorted(tensors.items()):
        path, suffix = _split(name)
        if suffix in _BASE_WEIGHT_SUFFIXES and path in (base.embedding_path, base.lm_head_path):
            _check_base_weight(name, path, tensor, base, base_tensor)
            continue
        is_embedding = suffix in _EMBEDDING_SUFFIXES
        if not path or not (is_embedding or suffix in _LINEAR_SUFFIXES):
            message = f"{name} is no tensor of a LoRA that is served here"
            raise AdapterFormatError(message, reason="UNEXPECTED_TENSOR", field=name)
        _check_module(name, path, is_embedding, base)
        pair = factors.setdefault(path, _Factors(is_embedding=is_embedding))
        if suffix == pair.suffixes[0]:
            pair.a = tensor
        else:
            pair.b = tensor
    for path, pair in factors.items():
        for tensor_or_none, suffix in zip((pair.a, pair.b), pair.suffixes, strict=True):
            if tensor_or_none is None:
                name = f"{_PREFIX}{path}{suffix}"
                raise AdapterFormatError(f"{name} is missing", reason="MISSING_TENSOR", field=name)
    return factors


def _split(name: str) -> tuple[str, str]:
    if name.startswith(_PREFIX):
        for suffix in (*_LINEAR_SUFFIXES, *_EMBEDDING_SUFFIXES, *_BASE_WEIGHT_SUFFIXES):
            if name.endswith(suffix):
                return name[len(_PREFIX) : -len(suffix)], suffix
    return "", ""


def _check_module(name: str, path: str, is_embedding: bool, base: BaseSpec) -> None:
    if path in base.linears and not is_embedding:
        return
    if path == base.embedding_path and is_embedding:
        return
    if path in base.linears or path == base.embedding_path:
        kind = "an embedding" if path == base.embedding_path else "a Linear"
        message = f"{name} does not go with {path}, which is {kind}"
        raise AdapterMismatchError(message, reason="WRONG_MODULE_KIND", field=name)
    raise module_error(path, base, name)


def _check_base_weight(name: str, path: str, tensor: Tensor, base: BaseSpec, base_tensor: BaseTensor | None) -> None:
    """Accept a copy of the base's own weight, as PEFT saves one, and no other."""
    is_embedding = path == base.embedding_path or base.tied_embeddings
    expected = (base.vocab_size, base.hidden_size) if is_embedding else tuple(reversed(base.linears[path]))
    if tuple(tensor.shape) != expected:
        raise shape_error(name, expected, tensor, "; a vocabulary that was resized is not served")
    if base_tensor is None:
        message = f"{name} is a copy of a base weight, and the base's own is not at hand to compare"
        raise AdapterMismatchError(message, reason="BASE_WEIGHT_UNVERIFIED", field=name)
    if not _are_equal(base_tensor(f"{base.embedding_path if is_embedding else path}.weight").detach(), tensor):
        message = f"{name} differs from the base's {path}.weight; a replaced weight is not served"
        raise AdapterMismatchError(message, reason="BASE_WEIGHT_DIFFERS", field=name)


def _are_equal(ours: Tensor, theirs: Tensor) -> bool:
    """Compare two weights as far as the coarser can tell: either may have been loaded at a lower precision."""
    if ours.shape != theirs.shape:
        return False
    is_ours_finer = is_theirs_finer = True
    for our_piece, their_piece in zip(in_pieces(ours), in_pieces(theirs), strict=True):
        at_hand = our_piece.to("cpu")
        is_ours_finer = is_ours_finer and torch.equal(at_hand.to(their_piece.dtype), their_piece)
        is_theirs_finer = is_theirs_finer and torch.equal(their_piece.to(at_hand.dtype), at_hand)
    return is_ours_finer or is_theirs_finer


def _check_targets(
    factors: Mapping[str, _Factors], config: PeftLoraConfig, base: BaseSpec, matcher: PatternMatcher
) -> None:
    """Hold the modules that have tensors against those that the config means."""
    for path in sorted({*base.linears, base.embedding_path}):
        is_meant = matcher.selects(path, config)
        if is_meant and path not in factors:
            suffixes = _EMBEDDING_SUFFIXES if path == base.embedding_path else _LINEAR_SUFFIXES
            name = f"{_PREFIX}{path}{suffixes[0]}"
            message = f"{name} is missing: adapter_config.target_modules means {path}"
            raise AdapterFormatError(message, reason="MISSING_TENSOR", field=name)
        if path in factors and not is_meant:
            name = f"{_PREFIX}{path}{factors[path].suffixes[0]}"
            message = f"{name} is there, but adapter_config does not mean {path}"
            raise AdapterFormatError(message, reason="UNTARGETED_TENSOR", field=name)
    for path in sorted(base.other_modules):
        if path and matcher.selects(path, config):
            raise module_error(path, base, "adapter_config.target_modules")
    if not factors:
        message = f"adapter_config.target_modules means no module of {base.name}"
        raise AdapterMismatchError(message, reason="UNKNOWN_MODULE", field="adapter_config.target_modules")


def _unit(path: str, pair: _Factors, config: PeftLoraConfig, base: BaseSpec, matcher: PatternMatcher) -> DeltaUnit:
    assert pair.a is not None
    assert pair.b is not None
    rank_key = matcher.first_key(path, config.rank_pattern, "rank_pattern")
    alpha_key = matcher.first_key(path, config.alpha_pattern, "alpha_pattern")
    rank = config.rank if rank_key is None else config.rank_pattern[rank_key]
    alpha = config.lora_alpha if alpha_key is None else config.alpha_pattern[alpha_key]
    inputs, outputs = (base.vocab_size, base.hidden_size) if pair.is_embedding else base.linears[path]
    names = [f"{_PREFIX}{path}{suffix}" for suffix in pair.suffixes]
    check_factor(names[0], pair.a, (rank, inputs), rank_axis=0, source=_RANK_SOURCE)
    check_factor(names[1], pair.b, (outputs, rank), rank_axis=1, source=_RANK_SOURCE)
    unit = DeltaUnit(pair.a, pair.b.T, config.scaling(alpha, rank))
    check_products(names[1], unit)
    return unit
