"""Motley beside transformers' generate and PEFT's mixed batch, on one CPU, in one run.

The work: a random bf16 Llama of 100 M parameters (hidden 768, FFN 2048, 12 layers, 12/4 heads, vocabulary 32000, tied),
16 requests of 32 prompt and 48 answer tokens, rank-16 adapters on all Linears of the decoder. Every contender gets the
same prompts, threads and wait policy, runs once to warm up, and then in turns with the others, `--rounds` times; the
table gives medians of tokens per second of answers.

transformers and PEFT are told to make 48 tokens at least (one small operation a step); Motley's requests name no end.

Staggered arrivals: one request every 50 ms. A static batcher (transformers) takes whoever has arrived whenever it
is free.
"""

from __future__ import annotations

import argparse
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

import torch
from machine import write_result
from motley_adapters.cache import AdapterCache
from motley_adapters.reader import read_adapter
from motley_bases.loader import load_base
from motley_server.engine.core import EngineCore
from motley_server.engine.settings import EngineSettings
from motley_server.engine.types import GenerateRequest, SamplingParams, ServedAdapter
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NUM_REQUESTS, NUM_PROMPT_TOKENS, NUM_NEW_TOKENS = 16, 32, 48
ARRIVAL_SECONDS = 0.05
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class NullObserver:
    """Watch nothing (see `EngineObserver`)."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None


def make_base(directory: Path) -> Path:
    """Save the random base."""
    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4,
        vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=True, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    vocabulary = {f"t{index}": index for index in range(32000)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t2").save_pretrained(directory)
    return directory


def make_adapters(base: Path, root: Path) -> list[Path]:
    """Save sixteen random rank-16 adapters on all Linears of the decoder, in PEFT's own format and precision (fp32)."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    peft_model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM"))
    paths = []
    for seed in range(NUM_REQUESTS):
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in peft_model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.02)
        paths.append(root / f"adapter{seed}")
        peft_model.save_pretrained(paths[-1])
    return paths


def draw_prompts() -> list[list[int]]:
    """Draw the prompts that every contender gets."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(10, 32000, (NUM_REQUESTS, NUM_PROMPT_TOKENS), generator=generator).tolist()


class Motley:
    """The engine in this process, its steps driven by hand."""

    def __init__(self, base: Path, adapters: list[Path]) -> None:
        self.base = load_base(base, dtype="bfloat16", device=torch.device("cpu"))
        cache = AdapterCache(2**31)
        self.served = []
        for path in adapters:
            adapter = read_adapter(path, self.base.spec)
            cache.put(adapter)
            self.served.append(ServedAdapter(path.name, 1, adapter.spec.digest, 1.0, "undeclared", adapter.spec.kind))
        settings = EngineSettings(kv_cache_bytes=2**28, prefix_cache=False)
        self.core = EngineCore(self.base, cache, settings, NullObserver())
        self.core.runner.warm_up()

    def generate(self, prompts: list[list[int]], num_distinct: int, arrival_seconds: float = 0.0) -> int:
        """Answer every prompt and return the tokens made.

        Semantics: request i is answered under adapter i modulo `num_distinct`; 0 is the base alone.
        """
        started, num_tokens, waiting = time.monotonic(), 0, list(enumerate(prompts))
        while waiting or self.core.has_work:
            while waiting and time.monotonic() - started >= waiting[0][0] * arrival_seconds:
                index, prompt = waiting.pop(0)
                adapters = (self.served[index % num_distinct],) if num_distinct else ()
                sampling = SamplingParams(max_new_tokens=NUM_NEW_TOKENS)
                request = GenerateRequest(str(index), "local", tuple(prompt), sampling, adapters)
                self.core.add(request, time.monotonic())
            for event in self.core.step():
                num_tokens += sum(len(delta.token_ids) for delta in event.deltas)
        return num_tokens


class Transformers:
    """transformers' own generate over a static batch; with PEFT on top, its mixed batch."""

    def __init__(self, base: Path, adapters: list[Path]) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
        if adapters:
            self.model = PeftModel.from_pretrained(self.model, adapters[0], adapter_name=adapters[0].name)
            for path in adapters[1:]:
                self.model.load_adapter(path, adapter_name=path.name)
            self.model.eval()

    def generate(self, prompts: list[list[int]], num_distinct: int) -> int:
        """Answer every prompt in one batch, as `Motley.generate`."""
        input_ids = torch.tensor(prompts)
        names = [f"adapter{index % num_distinct}" for index in range(len(prompts))] if num_distinct else None
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=NUM_NEW_TOKENS,
                min_new_tokens=NUM_NEW_TOKENS, do_sample=False, pad_token_id=0,
                **({} if names is None else {"adapter_names": names}),
            )  # fmt: skip
        return output[:, len(prompts[0]) :].numel()

    def generate_staggered(self, prompts: list[list[int]]) -> int:
        """Take whoever has arrived, answer them, take the next."""
        started, num_tokens, next_prompt = time.monotonic(), 0, 0
        while next_prompt < len(prompts):
            arrived = min(len(prompts), int((time.monotonic() - started) / ARRIVAL_SECONDS) + 1)
            if arrived > next_prompt:
                num_tokens += self.generate(prompts[next_prompt:arrived], 0)
                next_prompt = arrived
            else:
                time.sleep(0.001)
        return num_tokens


def measure(contenders: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Run all contenders in turns and return each one's tokens per second, round by round."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            started = time.monotonic()
            num_tokens = run()
            rates[name].append(num_tokens / (time.monotonic() - started))
    return rates


def contenders_of(base: Path, adapters: list[Path]) -> dict[str, Callable[[], int]]:
    """Build everybody, each with its own copy of the base."""
    prompts = draw_prompts()
    motley, plain, peft = Motley(base, adapters), Transformers(base, []), Transformers(base, adapters)
    contenders: dict[str, Callable[[], int]] = {
        "transformers, no adapters": lambda: plain.generate(prompts, 0),
        "motley, no adapters": lambda: motley.generate(prompts, 0),
        "transformers, staggered": lambda: plain.generate_staggered(prompts),
        "motley, staggered": lambda: motley.generate(prompts, 0, ARRIVAL_SECONDS),
    }
    for num_distinct in (1, 4, 16):
        contenders[f"peft, {num_distinct} distinct"] = partial(peft.generate, prompts, num_distinct)
        contenders[f"motley, {num_distinct} distinct"] = partial(motley.generate, prompts, num_distinct)
    return contenders


def show(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Print the table and return it: medians, spread, and each of ours over its peer."""
    table = Table("contender", "tokens/s", "spread", "over its peer")
    rows = {}
    peer = 0.0
    for name, values in rates.items():
        median = statistics.median(values)
        if not name.startswith("motley"):
            peer = median
        ratio = median / peer
        rows[name] = {"tokens_per_second": median, "rounds": values, "over_peer": ratio}
        spread = f"{min(values):.0f}-{max(values):.0f}"
        table.add_row(name, f"{median:.0f}", spread, f"{ratio:.2f}" if name.startswith("motley") else "")
    Console().print(table)
    return rows


def main() -> None:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "base")
        adapters = make_adapters(base, Path(folder))
        rates = measure(contenders_of(base, adapters), arguments.rounds)
    path = write_result("serving_cpu", {"contenders": show(rates)})
    print(f"wrote {path.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
