"""Time paged attention at the shapes of an 8B model, beside torch's own attention and the least the device could take.

Run: python benchmarks/paged_attention_gpu.py. One layer in bfloat16, 32 query heads on 8 key-value heads of size 128.
The floor is the larger of the bytes over the memory's bandwidth and the products over the rate of a large matrix
product, both measured in the same run. torch's scaled_dot_product_attention is given keys and values that lie ready in
one piece, and sequences of one length; it neither stores new keys nor follows block tables. Answers are compared before
anything is timed. Without a GPU it says so and measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from cuda_timing import copied_bytes_per_second, device_seconds, has_gpu, multiplied_flops_per_second, wall_seconds
from machine import write_result
from motley_kernels.paged_attention import LayerKV, PagedBatch, paged_attention
from motley_kernels.testing import assert_close
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
SCALE = HEAD_DIM**-0.5
DTYPE = torch.bfloat16
DECODES = ((1, 1024), (1, 8192), (1, 65536), (16, 1024), (16, 8192), (64, 1024), (64, 8192))  # sequences, keys of each
PREFILLS = ((1, 512, 512), (1, 2048, 2048), (1, 8192, 8192), (4, 2048, 2048), (1, 512, 8192))  # sequences, new, keys
MIN_BYTES, MAX_LAYERS = 2**29, 32


@dataclass(frozen=True, eq=False, slots=True)
class Problem:
    """One layer's attention, both ways, over the same numbers."""

    batch: PagedBatch
    kv: LayerKV
    q: Tensor
    new_k: Tensor
    new_v: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None

    def ours(self) -> Tensor:
        """Attend over blocks: [T, H, D]."""
        rows = (self.q, self.new_k, self.new_v)
        return paged_attention(*rows, self.kv, self.batch, scale=SCALE, sliding_window=None, softcap=None)

    def torchs(self) -> Tensor:
        """Attend over keys in one piece: [T, H, D]."""
        q = self.q.view(len(self.keys), -1, NUM_HEADS, HEAD_DIM).transpose(1, 2)
        is_causal = q.shape[2] == self.keys.shape[2]
        out = scaled_dot_product_attention(
            q, self.keys, self.values, attn_mask=self.mask, is_causal=is_causal, scale=SCALE, enable_gqa=True
        )
        return out.transpose(1, 2).reshape(-1, NUM_HEADS, HEAD_DIM)


def draw_batch(num_sequences: int, num_new: int, num_keys: int, device: str) -> PagedBatch:
    """Lay sequences of one length over scattered blocks; layers share it."""
    blocks_each = num_keys // BLOCK_SIZE
    tables = torch.randperm(num_sequences * blocks_each, device=device).view(num_sequences, blocks_each)
    rows = (tables[:, :, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=device)).view(num_sequences, -1)
    slots = rows[:, num_keys - num_new :].reshape(-1)
    return PagedBatch(BLOCK_SIZE, tables, slots, (num_new,) * num_sequences, (num_keys,) * num_sequences)


def draw_problem(batch: PagedBatch, device: str) -> Problem:
    """Draw a layer's queries, keys and values, stored in blocks and in one piece."""
    num_sequences, num_keys = len(batch.seq_lens), batch.seq_lens[0]
    num_new = batch.query_lens[0]
    keys, values = (
        torch.randn(num_sequences, num_keys, NUM_KV_HEADS, HEAD_DIM, device=device, dtype=DTYPE) for _ in range(2)
    )
    q = torch.randn(num_sequences * num_new, NUM_HEADS, HEAD_DIM, device=device, dtype=DTYPE)
    kv = LayerKV(_in_blocks(keys, batch), _in_blocks(values, batch))
    new_k, new_v = (rows[:, num_keys - num_new :].reshape(-1, NUM_KV_HEADS, HEAD_DIM) for rows in (keys, values))
    mask = None
    if 1 < num_new < num_keys:
        mask = torch.ones(num_new, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_new)
    return Problem(
        *(batch, kv, q, new_k, new_v),
        keys=keys.transpose(1, 2).contiguous(),
        values=values.transpose(1, 2).contiguous(),
        mask=mask,
    )


def _in_blocks(rows: Tensor, batch: PagedBatch) -> Tensor:
    blocks = torch.empty(
        batch.block_tables.numel(), BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, device=rows.device, dtype=DTYPE
    )
    blocks[batch.block_tables.view(-1)] = rows.view(-1, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    return blocks


def needed_bytes(num_sequences: int, num_new: int, num_keys: int) -> int:
    """Count what must be read and written: keys, values, queries, outputs, and the new keys and values twice."""
    kv_bytes = num_sequences * (num_keys + 2 * num_new) * 2 * NUM_KV_HEADS * HEAD_DIM
    return (kv_bytes + 2 * num_sequences * num_new * NUM_HEADS * HEAD_DIM) * DTYPE.itemsize


def needed_flops(num_sequences: int, num_new: int, num_keys: int) -> float:
    """Count the products and sums of the seen keys: two matrix products, the second half of a triangle left out."""
    seen = num_new * (num_keys - num_new) + num_new * (num_new + 1) / 2
    return 4.0 * num_sequences * NUM_HEADS * HEAD_DIM * seen


def measure(num_sequences: int, num_new: int, num_keys: int, bandwidth: float, rate: float) -> dict[str, Any]:
    """Check one shape, then time it; seconds are of one layer."""
    num_bytes = needed_bytes(num_sequences, num_new, num_keys)
    batch = draw_batch(num_sequences, num_new, num_keys, "cuda")
    num_layers = min(MAX_LAYERS, -(-MIN_BYTES // num_bytes))
    layers = [draw_problem(batch, "cuda") for _ in range(num_layers)]
    assert_close(layers[0].ours(), layers[0].torchs(), DTYPE)
    ours: list[Callable[[], object]] = [layer.ours for layer in layers]
    seconds = device_seconds(ours)
    torchs = device_seconds([layer.torchs for layer in layers])
    floor = max(num_bytes / bandwidth, needed_flops(num_sequences, num_new, num_keys) / rate)
    return {
        "sequences": num_sequences,
        "new_tokens": num_new,
        "keys": num_keys,
        "layers": num_layers,
        "seconds": seconds,
        "seconds_with_launching": wall_seconds(ours),
        "floor_seconds": floor,
        "torch_seconds": torchs,
        "over_floor": seconds / floor,
        "torch_over_ours": torchs / seconds,
    }


def main() -> None:
    """Measure every shape, print the table, write the result."""
    if not has_gpu():
        return
    torch.manual_seed(0)
    bandwidth, rate = copied_bytes_per_second(), multiplied_flops_per_second(DTYPE)
    print(f"{torch.cuda.get_device_name()}: copies {bandwidth / 1e12:.2f} TB/s, multiplies {rate / 1e12:.0f} TFLOP/s")
    print(f"{'sequences':>9} {'new':>6} {'keys':>6} {'us':>9} {'floor us':>9} {'/ floor':>8} {'torch us':>9}")
    shapes = [(num_sequences, 1, num_keys) for num_sequences, num_keys in DECODES] + list(PREFILLS)
    results = []
    with torch.inference_mode():
        for shape in shapes:
            found = measure(*shape, bandwidth, rate)
            results.append(found)
            microseconds = [found[name] * 1e6 for name in ("seconds", "floor_seconds", "torch_seconds")]
            print(
                f"{shape[0]:>9} {shape[1]:>6} {shape[2]:>6} {microseconds[0]:>9.1f} {microseconds[1]:>9.1f} "
                f"{found['over_floor']:>8.2f} {microseconds[2]:>9.1f}"
            )
    model = {"heads": NUM_HEADS, "kv_heads": NUM_KV_HEADS, "head_dim": HEAD_DIM, "block_size": BLOCK_SIZE}
    path = write_result(
        "paged_attention_gpu",
        {
            "triton": version("triton"),
            "layer": {**model, "dtype": str(DTYPE).removeprefix("torch.")},
            "copied_bytes_per_second": bandwidth,
            "multiplied_flops_per_second": rate,
            "shapes": results,
        },
    )
    print(f"written: {path}")


if __name__ == "__main__":
    main()
