"""A `motley serve` without a model, to be run as a child process: the fake server with /metrics and `ready on`.

FAKE_SERVE in the environment makes it misbehave: `dies` before it is ready, `hangs` before it is ready, `lies` about
which adapter answered, `forgets` the skill swap, `unmixed` counts no mixed batch, `clings` to life on SIGTERM and
starts a child that does too, and `nf4` refuses a base that is held otherwise.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Annotated

import typer
from fake_motley_server import SKILLS, FakeServer, serving

DEADLY_SLEEP = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


def serve(
    listen: str = "127.0.0.1:0",
    metrics: str = "127.0.0.1:0",
    base: str = "tiny",
    data_dir: Path = Path(),
    adapter: Annotated[list[str] | None, typer.Option()] = None,
    quantize: str = "none",
) -> None:
    """Serve by rule."""
    mode = os.environ.get("FAKE_SERVE", "")
    with open(os.environ["FAKE_SERVE_PIDS"], "a") as pids:
        print(os.getpid(), file=pids)
        if mode == "clings":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print(subprocess.Popen([sys.executable, "-c", DEADLY_SLEEP]).pid, file=pids)
    if any(name.startswith("MOTLEY_") for name in os.environ):
        print("error: the caller's own settings came along", file=sys.stderr)
        raise typer.Exit(1)
    if mode == "nf4" and quantize != "nf4":
        print(f"error: the base is asked for in {quantize}", file=sys.stderr)
        raise typer.Exit(1)
    if mode == "dies":
        print("error: the base does not fit (TOO_SMALL)", file=sys.stderr)
        raise typer.Exit(1)
    done = threading.Event()
    if mode != "clings":
        signal.signal(signal.SIGTERM, lambda *_: done.set())
    if mode == "hangs":
        done.wait(60)
        return
    fake = FakeServer()
    fake.lies = mode == "lies"
    if mode == "forgets":
        SKILLS.pop("swap")
    host, _, port = metrics.rpartition(":")
    scraped = HTTPServer((host, int(port)), exposition(fake, 1 if mode == "unmixed" else 4))
    threading.Thread(target=scraped.serve_forever, daemon=True).start()
    with serving(fake, int(listen.rpartition(":")[2])) as address:
        print(f"adapters: {' '.join(adapter or [])}, base {base}, data in {data_dir}")
        print(f"ready on {address}", flush=True)
        done.wait(60)
    scraped.shutdown()


def exposition(fake: FakeServer, num_mixed: int) -> type[BaseHTTPRequestHandler]:
    """Make what answers /metrics: as if each pass had so many adapters at most."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            calls = len(fake.calls)
            body = (
                f"motley_forward_passes_total {calls / 5}\nmotley_generation_tokens_total {calls * 7}\n"
                f'motley_batch_distinct_adapters_bucket{{le="{num_mixed}.0"}} {calls}\n'
                f'motley_batch_distinct_adapters_bucket{{le="+Inf"}} {calls}\n'
                f"motley_batch_size_sum {calls * 5}\nmotley_batch_size_count {calls}\n"
            ).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
