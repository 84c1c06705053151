"""What a checkpoint's config alone shows cannot be served right: refused by name, before a weight is read.

Knows configs, not models; what only a forward pass can show is the probe's. Pure functions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from motley_bases.config_sizes import LARGEST_SIZES, quoted, size_faults, stored_size_faults
from motley_bases.errors import UnreadableBaseError, UnsupportedBaseError
from motley_bases.quantization import quantization_faults

SERVED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
STATIC_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
LARGEST_ROPE_FACTOR = 2**20
MULTIMODAL_FIELDS = ("vision_config", "audio_config", "speech_config", "text_config")


def check_stored_config(stored: Mapping[str, object]) -> None:
    """Refuse what transformers could not even parse without running foreign code, and sizes that are none.

    Raises: UnsupportedBaseError; UnreadableBaseError with reason BROKEN_CONFIG and the field.
    """
    model_type = stored.get("model_type")
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        for field, sentence in stored_size_faults(stored, CONFIG_MAPPING[model_type].attribute_map):
            raise _broken(model_type, field, sentence)
        return
    if "auto_map" in stored:
        raise UnsupportedBaseError(
            f"model type {model_type!r} runs on code that its checkpoint brings along, and such code is never run",
            reason="REMOTE_CODE",
            field="auto_map",
        )
    raise UnsupportedBaseError(
        f"the installed transformers does not know model type {model_type!r}",
        reason="UNKNOWN_MODEL_TYPE",
        field="model_type",
    )


def check_config(config: PreTrainedConfig) -> None:
    """Refuse a model whose config says that packed, paged serving would change its answers.

    Raises: UnsupportedBaseError with the field at fault; UnreadableBaseError with reason BROKEN_CONFIG and the field
    for numbers that no model has.
    """
    name = str(config.model_type)
    for field, reason, sentence in _faults(config):
        raise UnsupportedBaseError(f"{name} cannot be served: {sentence}", reason=reason, field=field)
    for field, sentence in itertools.chain(size_faults(config), _number_faults(config)):
        raise _broken(name, field, sentence)


def declared_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """Return each layer's sliding window as the config declares it; None sees everything."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    return (window,) * int(config.num_hidden_layers)


def rope_parameters(config: PreTrainedConfig) -> Iterator[Mapping[str, object]]:
    """Yield the config's RoPE settings: one mapping, or one a layer type, or none at all."""
    settings = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in settings.values() if isinstance(value, dict)]
    if nested and not {"rope_type", "rope_theta"} & settings.keys():
        yield from nested
    elif settings:
        yield settings


def _broken(model_type: str, field: str, sentence: str) -> UnreadableBaseError:
    return UnreadableBaseError(f"{model_type} cannot be served: {sentence}", reason="BROKEN_CONFIG", field=field)


def _faults(config: PreTrainedConfig) -> Iterator[tuple[str, str, str]]:
    """Yield (field, reason, sentence) of everything that speaks against serving, the most telling first."""
    if getattr(config, "is_encoder_decoder", False):
        yield "is_encoder_decoder", "ENCODER_DECODER", "it is an encoder-decoder, and only decoders are served"
    for field in MULTIMODAL_FIELDS:
        if getattr(config, field, None) is not None:
            yield (
                field,
                "MULTIMODAL",
                f"it is made of several models ({field}); serve its text model as a checkpoint of its own",
            )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        yield "architectures", "NOT_A_CAUSAL_LM", "transformers has no causal language model for it"
    for field, sentence in quantization_faults(getattr(config, "quantization_config", None)):
        yield field, "QUANTIZED_CHECKPOINT", f"its weights are stored quantized, and {sentence}"
    yield from _attention_faults(config)
    for settings in rope_parameters(config):
        rope_type = settings.get("rope_type", settings.get("type", "default"))
        if not isinstance(rope_type, str) or rope_type not in STATIC_ROPE_TYPES:
            sentence = f"its {rope_type} RoPE depends on the length of the longest neighbour in the batch"
            if rope_type not in ("dynamic", "longrope"):
                sentence = f"its {rope_type} RoPE is not known to be independent of the neighbours in the batch"
            yield "rope_parameters.rope_type", "ROPE_TYPE", sentence


def _attention_faults(config: PreTrainedConfig) -> Iterator[tuple[str, str, str]]:
    layer_types = getattr(config, "layer_types", None) or ()
    foreign = sorted(set(layer_types) - SERVED_LAYER_TYPES)
    if foreign:
        yield (
            "layer_types",
            "LAYER_TYPE",
            f"it has layers of type {', '.join(foreign)}, and only full and sliding attention is served",
        )
    if getattr(config, "is_causal", True) is False:
        yield "is_causal", "NOT_CAUSAL", "its attention is not causal"
    if getattr(config, "use_bidirectional_attention", None):
        yield "use_bidirectional_attention", "NOT_CAUSAL", "its attention looks at later tokens"


def _number_faults(config: PreTrainedConfig) -> Iterator[tuple[str, str]]:
    """Yield (field, sentence) of every window and stretch of positions that no model has."""
    for window in declared_windows(config):
        if window is not None and window < 1:
            yield "sliding_window", f"its sliding_window is {quoted(window)}, and a token sees at least itself"
    longest = LARGEST_SIZES["max_position_embeddings"]
    for settings in rope_parameters(config):
        factor, length = settings.get("factor"), settings.get("original_max_position_embeddings")
        if isinstance(factor, int | float) and not 0 < factor <= LARGEST_ROPE_FACTOR:
            sentence = f"its RoPE factor is {quoted(factor)}, not above 0 and up to {LARGEST_ROPE_FACTOR}"
            yield "rope_parameters.factor", sentence
        if isinstance(length, int) and not 1 <= length <= longest:
            field = "original_max_position_embeddings"
            yield f"rope_parameters.{field}", f"its {field} is {quoted(length)}, not from 1 to {longest}"
