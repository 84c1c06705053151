"""A job's process without a model, by the contract of `python -m motley_trainer.job.run`: `fake_job.py MODE DIRECTORY`.

It makes an adapter, and by the method LoQT a base.

MODE says what becomes of it: `passes`, `rejects`, `fails`, `mumbles` why it failed, `dies` (each time, after a
checkpoint), `dies-once`, `crashes` (with a traceback, at exit code 1), `babbles` lines that mean nothing before it
passes, `hurries` through a thousand steps, `waits` for SIGTERM and passes the next time, `lingers` before it obeys
that, `lacks-REASON` what that says until its second start, `clings` to life, `eats` memory, `lies` about a result,
`leaves` a process behind that holds its pipes. Imports little: it is started often.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

MODE, DIR = sys.argv[1], Path(sys.argv[2])
CHECKPOINTS = DIR / "checkpoints"
HELD = "import time; time.sleep(60)"


def say(**event: object) -> None:
    """Tell an event."""
    print(json.dumps(event), flush=True)


def progress(step: int) -> None:
    """Tell a step."""
    say(progress={"step": step, "num_steps": 3, "loss": 2.5 / step, "tokens_per_second": 900.0, "remaining": "12.5s"})


def checkpoint(step: int) -> None:
    """Keep a checkpoint."""
    (CHECKPOINTS / f"step-{step}").mkdir(parents=True, exist_ok=True)
    say(checkpoint_step=step)


def result(passed: bool) -> None:
    """Come to a result."""
    evaluation = {"num_samples": 4, "loss_before": 2.0, "loss_after": 1.0 if passed else 3.0}
    say(evaluation=evaluation)
    reason = "" if passed else "GATE_NOT_PASSED"
    content = {"digest": "sha256:1", "evaluation": evaluation, "passed": passed, "reason": reason, "message": ""}
    if json.loads((DIR / "job.json").read_text()).get("spec", {}).get("method") == "TRAINING_METHOD_LOQT":
        content |= make_base()
    else:
        adapter = DIR / "adapter"
        adapter.mkdir(exist_ok=True)
        (adapter / "adapter_config.json").write_text('{"r": 8}')
        (adapter / "adapter_model.safetensors").write_bytes(b"weights" * 1000)
    (DIR / "result.json").write_text(json.dumps(content))


def make_base() -> dict[str, object]:
    """Leave a base, and return what the result says of it."""
    base, fingerprint = DIR / "base", f"sha256:{'1' * 64}"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"weights" * 1000)
    (base / "loqt_manifest.json").write_text(json.dumps({"fingerprint": fingerprint}))
    facts = {"directory": str(base), "original_fingerprint": None, "num_merges": 2, "size_bytes": 7002}
    return {"digest": fingerprint, "base": {"fingerprint": fingerprint, **facts}}


def babble() -> None:
    """Print lines that mean nothing, and words on stderr."""
    print('{"progress": {"step": 1\nnonsense\n[1]\n{"state_change": {}}\n{"published": {}}', flush=True)
    print('{"progress": 5}', '{"progress": {"step": "x"}}', '{"cancelled": 1}', '{"stage": "x", "data": {}}', sep="\n")
    sys.stdout.buffer.write(b"\xff\xfe\n" + b"y" * 3_000_000 + b"\n" + b'{"sequence": 7, "stage": "x"}\n')
    print("words on stderr", file=sys.stderr, flush=True)


def misbehave() -> int | None:
    """Do what the mode says that no good job does, and return the exit code if that is the end of it."""
    if MODE.startswith("lacks-") and not CHECKPOINTS.exists():
        checkpoint(1)
        say(failed={"reason": MODE.removeprefix("lacks-"), "message": "there is none"})
        return 1
    match MODE:
        case "fails":
            say(failed={"reason": "LOSS_NOT_FINITE", "message": "the loss is nan", "field": "optimizer.learning_rate"})
            return 1
        case "mumbles":
            say(failed={"reason": "well, you know", "message": "it did not work"})
            return 1
        case "crashes":
            raise RuntimeError("no such thing")
        case "clings":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            progress(1)
            time.sleep(60)
        case "eats":
            eaten = bytearray(os.urandom(1) * (64 << 20))
            time.sleep(60)
            return len(eaten)
        case "lies":
            return 0
        case "leaves":
            left = subprocess.Popen([sys.executable, "-I", "-S", "-c", HELD])
            (DIR / "left").write_text(str(left.pid))
        case "babbles":
            babble()
    return None


def run() -> int:
    """Train, by the mode, and return the exit code."""
    first = max((int(path.name.removeprefix("step-")) for path in CHECKPOINTS.glob("step-*")), default=0)
    if not (DIR / "job.json").exists():
        return 2
    score = Path("/proc/self/oom_score_adj").read_text()
    (DIR / "pid").write_text(f"{os.getpid()} {os.nice(0)} {score}")
    say(stage="reading data")
    if (code := misbehave()) is not None:
        return code
    for step in range(first + 1, 1001 if MODE == "hurries" else 4):
        if MODE in ("waits", "lingers") and step == 2 and first == 0:
            wait_for_the_end()
            return 3
        progress(step)
        if step < 3:
            checkpoint(step)
        if MODE == "dies" or (MODE == "dies-once" and step == 1):
            print("the last\nwords", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    result(MODE != "rejects")
    return 0


def wait_for_the_end() -> None:
    """Wait for SIGTERM, and keep a checkpoint then."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    progress(1)
    say(stage="waiting")
    while not asked:
        time.sleep(0.005)
    time.sleep(1.0 if MODE == "lingers" else 0)
    checkpoint(2)
    say(cancelled=True)


if __name__ == "__main__":
    sys.exit(run())
