"""`motley demo`: one base, one wave of requests, several adapters in the same batches, and two of them fused.

Owns the order of events: the scene, a server as a child process, the wave by gRPC, the counters by /metrics, what is
printed and the exit code. Runs an event loop of its own on the main thread.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from motley_client.aio import AsyncClient
from motley_client.child_server import child_server
from motley_client.demo_scene import pruned_scene, whole_scene
from motley_client.demo_tables import metric_table, reply_table
from motley_client.demo_verdict import find_failures
from motley_client.demo_wave import ask_all
from motley_client.exposition import scrape
from motley_client.terminable import run_terminable


def run_demo(quantize: str | None = None, *, is_pruned: bool = False, console: Console | None = None) -> int:
    """Run the demo, and return 0 if everything it claims came true, 1 if not, and 143 when told to end by SIGTERM.

    Semantics: over the embedded base, or over a copy of it that is pruned first; `quantize` is how the server holds
    the one or the other, as its own flag says it.
    Raises: DemoError if there is nothing to show; ServerStartError; MotleyClientError if a request fails;
    KeyboardInterrupt. The server, and whatever else was started, is gone in every case.
    """
    return run_terminable(_demo(console or Console(), quantize, is_pruned))


async def _demo(console: Console, quantize: str | None, is_pruned: bool) -> int:
    with tempfile.TemporaryDirectory(prefix="motley-demo-") as scratch:
        folder = Path(scratch)
        scene = await pruned_scene(folder, quantize, console.print) if is_pruned else whole_scene(quantize)
        console.print(f"starting a server with {scene.summary} ...")
        async with child_server([*scene.server_arguments, "--data-dir", str(folder / "data")], folder) as server:
            before = await asyncio.to_thread(scrape, "127.0.0.1", server.metrics_port)
            began = time.monotonic()
            async with AsyncClient(server.address) as client:
                replies = await ask_all(client, scene)
            seconds = time.monotonic() - began
            counted = await asyncio.to_thread(scrape, "127.0.0.1", server.metrics_port) - before
    console.print(reply_table(replies))
    console.print(metric_table(counted, seconds))
    failures = list(find_failures(scene, replies, counted))
    for failure in failures:
        console.print(f"[red]not as promised:[/red] {escape(failure)}", soft_wrap=True)
    return 1 if failures else 0
