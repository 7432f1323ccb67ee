"""``python -m benchmarks.decode_gpu --out FOLDER``: generation with a cache, side by side.

Tokens per second at batch 1, 8 and 64 of our ``generate`` on the kernels and on PyTorch's
operators, and of transformers' ``generate`` where it is installed: same weights, same prompts,
greedy, and the same text demanded (in fp32, where no tie decides) before anything is timed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals import transformers_gpt2
from benchmarks.timing import ROUNDS, Clock, as_json, machine
from fastgpt2.config import GPTConfig
from fastgpt2.files import write_text
from fastgpt2.model import GPT

DRY = GPTConfig(block_size=16, vocab_size=31, n_layer=1, n_head=2, n_embd=32)

# (model, prompt (B, T), number of new tokens) -> (B, T + new)
Generate = Callable[[Tensor, int], Tensor]


def contenders(ours: GPT) -> dict[str, Generate]:
    """Everyone that can generate here, on weights of ``ours`` and in their dtype."""

    def own(impl: str) -> Generate:
        model = GPT(replace(ours.config, impl=impl)).to(ours.lm_head.weight)
        model.load_state_dict(ours.state_dict())
        return lambda prompt, new: model.generate(prompt, new, temperature=0.0)

    found = {"fastgpt2": own("triton"), "fastgpt2 torch": own("torch")}
    rival: Any = transformers_gpt2(ours)
    if rival is not None:
        rival = rival.to(ours.lm_head.weight).eval()
        # random weights may well choose the token that ends a text: all must write on
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        found["transformers"] = lambda prompt, new: rival.generate(
            prompt, max_new_tokens=new, attention_mask=torch.ones_like(prompt), **options
        )
    return found


def check(config: GPTConfig, device: torch.device, prompt: Tensor, new: int) -> None:
    """All write the same text in fp32.

    Raises:
        AssertionError: one does not.
    """
    torch.manual_seed(0)
    texts = {name: run(prompt, new) for name, run in contenders(GPT(config).to(device)).items()}
    for name, text in texts.items():
        assert torch.equal(text, texts["fastgpt2"]), f"{name} writes another text than fastgpt2"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_gpu")
    parser.add_argument("--out", type=Path, required=True, help="folder for decode.json")
    parser.add_argument("--seconds", type=float, default=60.0, help="no new batch size after that")
    parser.add_argument("--dry", action="store_true", help="tiny, any machine, no meaning")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    device = torch.device("cpu" if options.dry else "cuda")
    config = DRY if options.dry else GPTConfig.preset("gpt2")
    T, new, batches = (5, 4, (1, 2)) if options.dry else (64, 128, (1, 8, 64))
    prompts = torch.randint(config.vocab_size, (max(batches), T), device=device)
    check(config, device, prompts[:2], min(new, 32))
    torch.manual_seed(0)
    dtype = torch.float32 if options.dry else torch.bfloat16
    makers = contenders(GPT(config).to(device, dtype))
    clock = Clock(device, head_start=False, rounds=1 if options.dry else ROUNDS)
    results = []
    for B in batches:
        if time.perf_counter() - start > options.seconds:
            print(f"batch {B}: not run, the {options.seconds:.0f} seconds were used up")
            continue
        work = {
            name: (lambda run=run, prompt=prompts[:B]: run(prompt, new))
            for name, run in makers.items()
        }
        for name, timing in clock.compare(work, seconds=0.0).items():
            rate = B * new / timing.median_us * 1e6
            results.append({"name": name, "batch": B, "tokens_per_s": rate, **as_json(timing)})
            print(f"{name:16} batch {B:3} {rate:10,.0f} tok/s {timing.median_us / 1e3:9.1f} ms")
    report = {"machine": machine(device), "prompt": T, "new": new, "results": results}
    write_text(options.out / "decode.json", json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
