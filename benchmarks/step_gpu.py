"""``python -m benchmarks.step_gpu --out FOLDER``: one training step of GPT-2, side by side.

Forward, loss, backward, clipping and AdamW on random tokens: ours on the kernels, eager and
compiled; ours on PyTorch's operators, compiled; a plain PyTorch GPT, compiled, with PyTorch's
choice of attention and with cuDNN's; transformers, eager and compiled. All start from the same
weights and must agree on the first loss before anything is timed. Prints tokens per second, MFU
(6 N + 12 L C T FLOPs a token over the data-sheet peak) and peak memory.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.rivals import PlainGPT, transformers_gpt2
from benchmarks.timing import ROUNDS, Clock, Timing, as_json, machine
from fastgpt2.config import GPTConfig
from fastgpt2.devices import peak_flops
from fastgpt2.files import write_text
from fastgpt2.model import GPT

# bf16's rounding moves the mean loss of thousands of tokens by far less
LOSS_TOLERANCE = 0.02
DRY = GPTConfig(block_size=9, vocab_size=31, n_layer=1, n_head=2, n_embd=32)

Loss = Callable[[Tensor, Tensor], Any]
Compiler = Callable[[Loss], Loss]


@dataclass(frozen=True)
class Contender:
    """Who trains: parameters, the loss of a batch, and the context it runs in."""

    name: str
    module: nn.Module
    loss: Loss
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def contenders(ours: GPT, compile: Compiler) -> dict[str, Callable[[], Contender | None]]:
    """Everyone, made on demand: only one at a time needs memory for its optimizer's state."""
    config, device = ours.config, ours.lm_head.weight.device

    def own(name: str, impl: str, compiler: Compiler) -> Contender:
        model = GPT(replace(config, impl=impl)).to(device)
        model.load_state_dict(ours.state_dict())

        def loss(idx: Tensor, targets: Tensor) -> Any:
            return model(idx, targets)[1]

        return Contender(name, model, compiler(loss))

    def plain(name: str, *backends: SDPBackend) -> Contender:
        model = PlainGPT(config).to(device)
        model.copy_weights(ours)
        context = partial(sdpa_kernel, list(backends)) if backends else nullcontext
        return Contender(name, model, compile(model), context)

    def hugging_face(name: str, compiler: Compiler) -> Contender | None:
        model = transformers_gpt2(ours)
        if model is None:
            return None

        def loss(idx: Tensor, targets: Tensor) -> Tensor:
            logits = model(input_ids=idx, use_cache=False).logits
            return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

        return Contender(name, model, compiler(loss))

    def eager(loss: Loss) -> Loss:
        return loss

    cudnn = (SDPBackend.CUDNN_ATTENTION,) if device.type == "cuda" else ()
    return {
        name: partial(make, name, *arguments)
        for name, make, *arguments in (
            ("fastgpt2", own, "triton", eager),
            ("fastgpt2 compiled", own, "triton", compile),
            ("plain compiled", plain),
            ("plain compiled, cuDNN", plain, *cudnn),
            ("fastgpt2 torch compiled", own, "torch", compile),
            ("transformers", hugging_face, eager),
            ("transformers compiled", hugging_face, compile),
        )
    }


def training_step(contender: Contender, idx: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    """One optimizer step on this batch, as a call that returns the loss."""
    groups = [p for p in contender.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    autocast = torch.autocast(
        idx.device.type, dtype=torch.bfloat16, enabled=idx.device.type == "cuda"
    )

    def step() -> Tensor:
        with contender.context(), autocast:
            loss = contender.loss(idx, targets)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(groups, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        detached: Tensor = loss.detach()
        return detached

    return step


@dataclass(frozen=True)
class Result:
    """One contender's step."""

    name: str
    timing: Timing
    tokens: int
    # of the data-sheet peak; None where that is not known
    mfu: float | None
    peak_bytes: int

    def as_json(self) -> dict[str, Any]:
        """Flat."""
        return {
            "name": self.name,
            **as_json(self.timing),
            "tokens": self.tokens,
            "mfu": self.mfu,
            "peak_bytes": self.peak_bytes,
        }

    def row(self) -> str:
        """A line of the table."""
        mfu = "-" if self.mfu is None else f"{self.mfu:.1%}"
        rate = self.tokens / self.timing.median_us * 1e6
        return (
            f"{self.name:26} {rate:10,.0f} tok/s {self.timing.median_us / 1e3:9.2f} ms "
            f"[{self.timing.p20_us / 1e3:.2f}, {self.timing.p80_us / 1e3:.2f}] "
            f"{mfu:>6} MFU {self.peak_bytes / 2**30:7.2f} GiB"
        )


def measure(
    contender: Contender,
    batch: tuple[Tensor, Tensor],
    expected_loss: float,
    reference: GPT,
    seconds: float,
) -> Result:
    """Check the first loss, then time the step.

    Raises:
        AssertionError: the loss is not that of the reference: another model is no rival.
    """
    idx, targets = batch
    step = training_step(contender, idx, targets)
    first = float(step())
    assert abs(first - expected_loss) <= LOSS_TOLERANCE, (
        f"{contender.name}: first loss {first}, the fp32 reference has {expected_loss}"
    )
    on_gpu = idx.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    # steps take milliseconds and keep the queue full by themselves
    clock = Clock(idx.device, head_start=False, rounds=ROUNDS if on_gpu else 1)
    timing = clock.compare({"step": step}, seconds=seconds)["step"]
    flops = reference.flops_per_token(idx.shape[1]) * idx.numel()
    peak = peak_flops(idx.device)
    return Result(
        contender.name,
        timing,
        idx.numel(),
        None if peak is None else flops / timing.median_us * 1e6 / peak,
        torch.cuda.max_memory_allocated() if on_gpu else 0,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit code 1 if a contender trained another model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_gpu")
    parser.add_argument("--out", type=Path, required=True, help="folder for step.json")
    parser.add_argument("--batch", type=int, default=64, help="sequences of 1024 tokens")
    parser.add_argument("--seconds", type=float, default=150.0, help="no new contender after that")
    parser.add_argument("--dry", action="store_true", help="tiny, any machine, no meaning")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    device = torch.device("cpu" if options.dry else "cuda")
    config = DRY if options.dry else GPTConfig.preset("gpt2")
    B = 2 if options.dry else options.batch
    torch.manual_seed(0)
    ours = GPT(replace(config, impl="reference")).to(device)
    tokens = torch.randint(config.vocab_size, (B, config.block_size + 1), device=device)
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    with torch.no_grad():
        # row by row: the reference holds the scores of all heads at once
        losses = [ours(batch[0][i : i + 1], batch[1][i : i + 1])[1] for i in range(B)]
    expected = float(torch.stack(losses).mean())
    compiler: Any = partial(torch.compile, backend="eager") if options.dry else torch.compile
    makers = contenders(ours, compiler)
    # the first once more at the end shows how far the machine has drifted in between
    order = [*makers, next(iter(makers))]
    results: list[Result] = []
    notes: list[str] = []

    def attempt(name: str) -> None:
        if time.perf_counter() - start > options.seconds:
            notes.append(f"{name}: not run, the {options.seconds:.0f} seconds were used up")
            return
        try:
            contender = makers[name]()
            if contender is None:
                notes.append(f"{name}: not installed")
                return
            results.append(measure(contender, batch, expected, ours, 0.0 if options.dry else 4.0))
            print(results[-1].row())
        except Exception as error:
            # out of memory, or a compiler's trouble: the others still have their times
            notes.append(f"FAILED {name}: {type(error).__name__}: {error}")

    for name in order:
        attempt(name)
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        # written at once: a run that is cut short has something to show
        report = {
            "machine": machine(device),
            "batch": [B, config.block_size],
            "results": [result.as_json() for result in results],
            "notes": notes,
        }
        write_text(options.out / "step.json", json.dumps(report, indent=1) + "\n")
    print("\n".join(notes))
    return 1 if any(note.startswith("FAILED") for note in notes) else 0


if __name__ == "__main__":
    sys.exit(main())
