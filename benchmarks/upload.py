"""An adapter of 500 MB on its way into a server over loopback, beside writing and hashing the same file.

The work: `motley serve` as a child process over a random bf16 Llama of wide Linears, and one call of the client that
uploads a bf16 LoRA over all of them. Client and server each hash the file, the server writes it, brings it to disk and
checks every tensor; the call ends when the version is ready. Beside it, in this process and onto the same disk: the
file written and brought to disk; hashed; and both, piece by piece, as any server has to that keeps what it was sent.

All of them take turns, `--rounds` times, each round with an adapter of its own, as bytes that a server has are not
sent again; they are read from the page cache. Medians over the rounds count.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from machine import write_result
from motley_client import Client, UploadPhase, UploadProgress
from motley_client.child_server import child_server
from rich.console import Console
from rich.table import Table

WIDTH, RANK, NUM_LAYERS = 2048, 1024, 9
PIECE_BYTES = 1 << 20
CONFIG = "log_level = 'error'\n[engine]\nkv_cache_bytes = 4194304\nadapter_arena_bytes = 4194304\nthreads = 1\n"
PARTS = ("client hashes", "bytes travel", "server checks")


def make_base(directory: Path) -> Path:
    """Save a random base whose Linears are wide enough for a large adapter."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=NUM_LAYERS, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=512, max_position_embeddings=256, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel({f"t{index}": index for index in range(512)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t2").save_pretrained(directory)
    return directory


def make_adapter(directory: Path, seed: int) -> Path:
    """Write a random LoRA over every Linear of the base's layers; one draw serves all of them, shifted."""
    import torch
    from motley_adapters.peft_files import LoraPair, write_peft_lora

    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    linears = [f"self_attn.{name}" for name in attention] + [f"mlp.{name}" for name in mlp]
    paths = [f"model.layers.{layer}.{linear}" for layer in range(NUM_LAYERS) for linear in linears]
    drawn = torch.randn(WIDTH * RANK, generator=torch.Generator().manual_seed(seed)).mul(0.01).bfloat16()
    pairs = {
        path: LoraPair(drawn.roll(2 * place + 1).view(RANK, WIDTH), drawn.roll(2 * place + 2).view(WIDTH, RANK))
        for place, path in enumerate(paths)
    }
    write_peft_lora(directory, pairs)
    return directory


def timed(work: Callable[[], object]) -> float:
    """Return how many seconds something takes."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


def keep(source: Path, target: Path | None, *, hashes: bool) -> None:
    """Read a file piece by piece, hash it if that is asked for, and write it to disk where a target is given."""
    hasher = hashlib.sha256()
    with source.open("rb") as read, (target or Path(os.devnull)).open("wb") as written:
        while piece := read.read(PIECE_BYTES):
            if hashes:
                hasher.update(piece)
            if target is not None:
                written.write(piece)
        if target is not None:
            written.flush()
            os.fsync(written.fileno())


def upload(address: str, adapter: Path, name: str) -> dict[str, float]:
    """Upload an adapter, and return how long the parts of that took."""
    last: dict[UploadPhase, float] = {}

    def tell(progress: UploadProgress) -> None:
        last[progress.phase] = time.monotonic()

    with Client(address, timeout=600) as client:
        began = time.monotonic()
        client.upload_adapter(name, adapter, progress=tell)
        ended = time.monotonic()
    hashed, sent = last[UploadPhase.HASHING], last[UploadPhase.SENDING]
    return {"upload": ended - began, **dict(zip(PARTS, (hashed - began, sent - hashed, ended - sent), strict=True))}


async def measure(folder: Path, rounds: int) -> tuple[int, dict[str, list[float]]]:
    """Return how large the file is, and by what was done, how many seconds it took in each round."""
    base = await asyncio.to_thread(make_base, folder / "base")
    (folder / "motley.toml").write_text(CONFIG)
    arguments = ["--config", str(folder / "motley.toml"), "--base", str(base), "--data-dir", str(folder / "data")]
    seconds: dict[str, list[float]] = {}
    size_bytes = 0
    async with child_server(arguments, folder) as server:
        for number in range(rounds):
            adapter = await asyncio.to_thread(make_adapter, folder / f"adapter{number}", number)
            file = adapter / "adapter_model.safetensors"
            size_bytes = file.stat().st_size
            os.sync()  # the disk has nothing left to do of what was before
            taken = {
                "write": timed(partial(keep, file, folder / "written", hashes=False)),
                "hash": timed(partial(keep, file, None, hashes=True)),
                "write and hash": timed(partial(keep, file, folder / "written too", hashes=True)),
                **await asyncio.to_thread(upload, server.address, adapter, f"wide-{number}"),
            }
            for name, one in taken.items():
                seconds.setdefault(name, []).append(one)
            for path in (file, folder / "written", folder / "written too"):
                path.unlink()
    return size_bytes, seconds


def summarize(size_bytes: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return medians, speeds and how often each takes as long as writing and hashing in the same round."""
    both = seconds["write and hash"]
    return {
        name: {
            "seconds": statistics.median(taken),
            "megabytes_per_second": size_bytes / 1e6 / statistics.median(taken),
            "over_write_and_hash": statistics.median(one / other for one, other in zip(taken, both, strict=True)),
            "rounds": taken,
        }
        for name, taken in seconds.items()
    }


def show(rows: dict[str, Any]) -> None:
    """Print the table."""
    table = Table("what", "seconds", "MB/s", "over write and hash")
    for name, row in rows.items():
        label = f"  {name}" if name in PARTS else name
        speed, ratio = f"{row['megabytes_per_second']:.0f}", f"{row['over_write_and_hash']:.2f}"
        table.add_row(label, f"{row['seconds']:.2f}", speed, ratio)
    Console().print(table)


def main() -> None:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size_bytes, seconds = asyncio.run(measure(Path(folder), arguments.rounds))
    rows = summarize(size_bytes, seconds)
    show(rows)
    path = write_result("upload", {"file_bytes": size_bytes, "measured": rows})
    print(f"wrote {path.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
