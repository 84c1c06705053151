"""`motley serve` and `motley worker` without a model, to be run as child processes beside each other.

Whoever ends in good order says so in the file `ended`. FAKE_TRAIN in the environment is the mode of the job's life.
FAKE_WORKER makes the worker misbehave: it `dies` before it is known, or `falls` once it is.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from http.server import HTTPServer
from pathlib import Path
from typing import Annotated

import grpc
import typer
from fake_serve import exposition
from fake_training_life import TrainingLife, TrainingServer, serving_life
from motley.v1 import training_pb2
from motley.v1.training_pb2_grpc import WorkerServiceStub


def serve(
    listen: Annotated[str, typer.Option()],
    metrics: Annotated[str, typer.Option()],
    base: Annotated[str, typer.Option()],
    data_dir: Annotated[Path, typer.Option()],
    adapter: Annotated[str, typer.Option()],
) -> None:
    """Serve, and train, by rule."""
    _note_pid()
    done = _until_told()
    server = TrainingServer()
    host, _, port = metrics.rpartition(":")
    scraped = HTTPServer((host, int(port)), exposition(server, 4))
    threading.Thread(target=scraped.serve_forever, daemon=True).start()
    with serving_life(server, TrainingLife(server, os.environ.get("FAKE_TRAIN", ""))) as address:
        assert (listen, base, data_dir.name) == ("127.0.0.1:0", "tiny", "data")
        assert adapter.partition("=")[0] == "next"
        print(f"ready on {address}", flush=True)
        done.wait(60)
    scraped.shutdown()
    _note("ended", "serve")


def worker(
    server: Annotated[str, typer.Option()],
    base: Annotated[str, typer.Option()],
    work_dir: Annotated[Path, typer.Option()],
) -> None:
    """Be there, and do nothing: jobs live by themselves."""
    mode = os.environ.get("FAKE_WORKER", "")
    _note_pid()
    done = _until_told()
    assert (base, os.environ["XDG_CONFIG_HOME"]) == ("tiny", str(work_dir.parent))
    assert not any(name.startswith("MOTLEY_") for name in os.environ)
    work_dir.mkdir()
    if mode == "dies":
        _fail("error: the base is another (BASE_MISMATCH)")
    with grpc.insecure_channel(server) as channel:
        WorkerServiceStub(channel).RegisterWorker(training_pb2.RegisterWorkerRequest(name="fake"))
    if mode == "falls":
        time.sleep(1.0)
        _fail("error: the disk is full (DISK_FULL)")
    done.wait(60)
    _note("ended", "worker")


def _fail(message: str) -> None:
    print(message, file=sys.stderr)
    raise typer.Exit(1)


def _note_pid() -> None:
    with open(os.environ["FAKE_SERVE_PIDS"], "a") as pids:
        print(os.getpid(), file=pids)


def _note(file: str, word: str) -> None:
    with Path(os.environ["FAKE_SERVE_PIDS"]).with_name(file).open("a") as notes:
        print(word, file=notes)


def _until_told() -> threading.Event:
    done = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: done.set())
    return done
