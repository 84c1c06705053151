"""What each Linear of an original keeps in a pruned copy, by its path: the manifest's heads and channels, spelt out.

Pure functions; any thread.
"""

from __future__ import annotations

from collections.abc import Mapping

from motley_bases.prune_manifest import LayerKeep, PruneManifest, broken, check_original
from motley_bases.pruned_geometry import DecoderShape, KeptChannels, kept_channels
from motley_bases.spec import BaseSpec

BLOCKS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
}


def kept_by_path(manifest: PruneManifest, original: BaseSpec) -> Mapping[str, KeptChannels]:
    """Return what the Linears of the pruned layers keep; a Linear that is not there was left whole.

    Raises: UnreadableBaseError with reason OTHER_ORIGINAL if the manifest is not this base's, PRUNE_MANIFEST with the
    layer if it keeps what that does not have.
    """
    check_original(manifest, original.fingerprint)
    if len(manifest.layers) != len(original.layers):
        raise broken("layers", f"has {len(manifest.layers)} layers, {original.name} has {len(original.layers)}")
    kept: dict[str, KeptChannels] = {}
    for layer, keep in enumerate(manifest.layers):
        if keep is not None:
            kept |= {
                f"model.layers.{layer}.{BLOCKS[name]}.{name}": channels
                for name, channels in _kept_of_layer(layer, keep, original).items()
            }
    return kept


def _kept_of_layer(layer: int, keep: LayerKeep, original: BaseSpec) -> Mapping[str, KeptChannels]:
    heads = original.layers[layer]
    inputs, outputs = original.linears[f"model.layers.{layer}.mlp.up_proj"]
    shape = DecoderShape(1, inputs, outputs, heads.num_heads, heads.num_kv_heads, heads.head_dim, original.vocab_size)
    try:
        return kept_channels(shape, kv_heads=keep.kv_heads, ffn_channels=keep.ffn_channels)
    except ValueError as error:
        raise broken(f"layers[{layer}]", f"is not of {original.name}: {error}") from error
