"""One training step of GPT-2, side by side: forward, loss, backward, clipping, AdamW.

All contenders have the same fp32 weights, the same random tokens, fused AdamW and a gradient norm
of at most 1, and compute under autocast in the dtype that the group names. ``fastgpt2`` is the
trainer's step (``TrainingStep``); ``plain`` and ``nanogpt`` are ``rivals.PlainGPT`` with a residual
stream in the compute dtype and with nanoGPT's choices. ``-k`` selects contenders:

    pytest benchmarks/bench_train_step.py --benchmark-only -k "bf16 and compiled" --rounds 5

Before anything is timed, the first two losses of each must match the fp32 reference; the second
also checks gradients, clipping and the optimizer. MFU is (6 N + 12 L C T) FLOPs per token over the
data-sheet peak (None if that is unknown); ``matmul_share`` is the same FLOPs over the speed of a
large matmul in the same run. Peak memory is the allocator's peak on a GPU. On a CPU it is the
largest resident set of a process that only trains two steps (interpreter and libraries included).
"""

import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from benchmarks.harness import Lane, Race, Scale, Settings, compute_dtype
from benchmarks.rivals import PlainGPT, transformers_gpt2
from benchmarks.timing import Ceilings, Work
from fastgpt2.compiler import compiler_obstacle
from fastgpt2.config import GPTConfig
from fastgpt2.devices import autocast, peak_flops
from fastgpt2.kernels.backend import INTERPRETED
from fastgpt2.model import GPT
from fastgpt2.train.step import TrainingStep
from fastgpt2.train.summary import dtype_name

# erf GELU and 47 padded logits of zero change these losses by 0.001, bf16 by 0.0003; wrong
# gradients change the second one by 0.4
LOSS_TOLERANCE = 0.005
# FP8 operands have 3 and 4 significant bits, and change the losses more
LOSS_TOLERANCE_FP8 = 0.05
LR, BETAS, WEIGHT_DECAY, GRAD_CLIP = 1e-4, (0.9, 0.95), 0.1, 1.0
COMPILED, CUDNN, FP8 = " compiled", " cudnn", " fp8"

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """A model's shape, a batch of B sequences of T tokens, and the dtype of the computation."""

    config: GPTConfig
    B: int
    T: int
    dtype: torch.dtype

    @property
    def group(self) -> str:
        """What the tables call it."""
        return f"train step {dtype_name(self.dtype)} B{self.B} T{self.T}"

    def batch(self) -> Batch:
        """Random tokens and targets (B, T), in host memory, as a loader returns them."""
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(self.config.vocab_size, (self.B, self.T + 1), generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def workloads(scale: Scale) -> list[Workload]:
    """The workloads of a scale."""
    if scale is Scale.DRY:
        tiny = GPTConfig(block_size=8, vocab_size=31, n_layer=1, n_head=2, n_embd=32)
        return [Workload(tiny, 2, 8, torch.float32)]
    config = GPTConfig.preset("gpt2")
    if scale is Scale.CUDA:
        return [Workload(config, 64, 1024, torch.bfloat16)]
    dtypes = dict.fromkeys((compute_dtype(scale), torch.float32))
    return [Workload(config, 2, 512, dtype) for dtype in dtypes]


def initial(config: GPTConfig, device: torch.device, impl: str) -> GPT:
    """The initial weights of all contenders; no bias is zero and no gain is one, so that an ignored
    parameter shows."""
    torch.manual_seed(0)
    model = GPT(replace(config, impl=impl))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.to(device)


def our_step(
    model: GPT, optimizer: torch.optim.AdamW, dtype: torch.dtype, forward: Callable[..., Any]
) -> TrainingStep:
    """The trainer's step."""
    return TrainingStep(
        model, optimizer, dtype=dtype, grad_clip=GRAD_CLIP, forward=forward, poll=lambda: None
    )


def optimizer_of(module: nn.Module, device: torch.device) -> torch.optim.AdamW:
    """The optimizer of all contenders: ours, which needs only a module's parameters."""
    configure: Any = GPT.configure_optimizers
    optimizer: torch.optim.AdamW = configure(module, WEIGHT_DECAY, LR, BETAS, device.type)
    return optimizer


@cache
def expected_losses(config: GPTConfig, B: int, T: int, device: torch.device) -> tuple[float, ...]:
    """The losses of two steps of the fp32 reference."""
    idx, targets = Workload(config, B, T, torch.float32).batch()
    model = initial(config, device, "reference")
    step = our_step(model, optimizer_of(model, device), torch.float32, model)
    # row by row, because the reference holds the attention scores of all heads at once
    rows = [(idx[i : i + 1], targets[i : i + 1]) for i in range(B)]
    return tuple(float(step(rows, LR).loss) for _ in range(2))


class Family:
    """One implementation's model with its optimizer; its eager and compiled forms share them."""

    def __init__(self, kind: str, workload: Workload, device: torch.device) -> None:
        self.kind, self.workload, self.device = kind, workload, device
        self.batch = workload.batch()
        self.module = self._module()
        self.optimizer = optimizer_of(self.module, device)

    def _module(self) -> nn.Module:
        # interpreted kernels are quick enough only for a dry run; on a GPU, auto is Triton
        impl = "triton" if INTERPRETED else "auto"
        fp8 = self.kind.endswith(FP8)
        ours = initial(replace(self.workload.config, fp8=fp8), self.device, impl)
        if self.kind.startswith("fastgpt2"):
            return ours
        if self.kind == "transformers":
            hugging_face = transformers_gpt2(ours)
            if hugging_face is None:
                pytest.skip("transformers is not installed: pip install 'fastgpt2[bench]'")
            return hugging_face
        backend = SDPBackend.CUDNN_ATTENTION if self.kind.endswith(CUDNN) else None
        plain = PlainGPT(ours.config, like_nanogpt=self.kind == "nanogpt", backend=backend)
        plain.to(self.device)
        plain.copy_weights(ours)
        return plain

    def reset(self) -> None:
        """Restore the initial weights and optimizer."""
        self.module.load_state_dict(self._module().state_dict())
        self.optimizer.state.clear()

    def held(self) -> int:
        """Bytes of weights, gradients and the optimizer's state at present."""
        parameters = list(self.module.parameters())
        tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
        for state in self.optimizer.state.values():
            tensors += [x for x in state.values() if isinstance(x, Tensor)]
        return sum(x.nbytes for x in tensors)

    def forward(self, compiled: bool, scale: Scale) -> Callable[..., Any]:
        """The module, compiled or not."""
        if not compiled:
            return self.module
        obstacle = compiler_obstacle(self.device)
        if obstacle is not None:
            pytest.skip(f"torch.compile: {obstacle}")
        compiler = "eager" if scale is Scale.DRY else "inductor"
        compile: Any = torch.compile
        # compile ours as the trainer does
        whole = {"fullgraph": True, "dynamic": False} if self.kind.startswith("fastgpt2") else {}
        module: Callable[..., Any] = compile(self.module, backend=compiler, **whole)
        return module

    def step(self, forward: Callable[..., Any]) -> Callable[[], Tensor]:
        """One optimizer step, as a call that returns the loss before it."""
        if isinstance(self.module, GPT):
            training_step = our_step(self.module, self.optimizer, self.workload.dtype, forward)
            return lambda: training_step([self.batch], LR).loss
        parameters = list(self.module.parameters())

        def step() -> Tensor:
            idx, targets = (x.to(self.device, non_blocking=True) for x in self.batch)
            with autocast(self.device, self.workload.dtype):
                loss = self._loss(forward, idx, targets)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(parameters, GRAD_CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step

    def _loss(self, forward: Callable[..., Any], idx: Tensor, targets: Tensor) -> Tensor:
        if self.kind != "transformers":
            loss: Tensor = forward(idx, targets)
            return loss
        # with labels, it would shift them by one and train on one token less
        logits = forward(input_ids=idx, use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def contenders(scale: Scale, dtype: torch.dtype) -> tuple[str, ...]:
    """All contenders, ours first; the plain one only compiled.

    In fp32, on a CPU that has a faster dtype, only ours and nanoGPT's.
    """
    kinds = ["fastgpt2", "nanogpt", "transformers"]
    if scale is Scale.CPU and dtype != compute_dtype(scale):
        return tuple(kind + form for kind in kinds[:2] for form in ("", COMPILED))
    if scale is Scale.CUDA:
        # the closest races first, in case time runs out
        closest = ("fastgpt2", "plain", f"plain{CUDNN}", f"fastgpt2{FP8}", *kinds[1:])
        return (*(kind + COMPILED for kind in closest), *kinds)
    names = [kind + form for kind in kinds for form in ("", COMPILED)]
    # a CPU emulates FP8
    emulated = [f"fastgpt2{FP8}{COMPILED}"] if scale is Scale.DRY else []
    return (*names, f"plain{COMPILED}", *emulated)


class TrainStep(Race):
    """The training steps of all contenders on one workload."""

    def __init__(
        self, workload: Workload, contenders: tuple[str, ...], *, memory: bool = False
    ) -> None:
        self.workload, self.group = workload, workload.group
        self.with_memory = memory
        self.contenders = contenders
        self._families: dict[str, Family] = {}
        self._memory: dict[str, int] = {}

    def family(self, name: str, device: torch.device) -> Family:
        """The model of a contender, shared by its eager and compiled forms."""
        kind = name.removesuffix(COMPILED)
        if kind not in self._families:
            self._families[kind] = Family(kind, self.workload, device)
        return self._families[kind]

    def step(self, name: str, settings: Settings) -> Callable[[], Tensor]:
        """A contender's step."""
        family = self.family(name, settings.device)
        return family.step(family.forward(name.endswith(COMPILED), settings.scale))

    def prepare(self, name: str, settings: Settings) -> Work:
        """A compiled step whose first two losses are right."""
        w, device = self.workload, settings.device
        expected = expected_losses(w.config, w.B, w.T, device)
        family = self.family(name, device)
        family.reset()
        step = self.step(name, settings)
        others = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            others = torch.cuda.memory_allocated() - family.held()
        losses = [float(step()) for _ in expected]
        tolerance = LOSS_TOLERANCE_FP8 if family.kind.endswith(FP8) else LOSS_TOLERANCE
        for ours, reference in zip(losses, expected, strict=True):
            assert abs(ours - reference) <= tolerance, (
                f"{name}: losses {losses}, the fp32 reference has {expected}"
            )
        if device.type == "cuda":
            self._memory[name] = torch.cuda.max_memory_allocated() - others
        elif settings.memory and self.with_memory:
            self._memory[name] = peak_memory(w, name, settings.scale)
        return step

    def facts(self, name: str, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
        """Tokens per second, MFU, peak memory."""
        w = self.workload
        tokens = w.B * w.T
        family = self.family(name, torch.device("cpu"))
        with torch.device("meta"):
            flops = GPT(w.config).flops_per_token(w.T) * tokens
        peak = peak_flops(family.device)
        return {
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
            "flops": flops,
            "TFLOP_per_s": flops / seconds / 1e12,
            "mfu": None if peak is None else flops / seconds / peak,
            "mfu_formula": "(6 N + 12 L C T) FLOPs per token / data-sheet peak",
            "matmul_share": flops / seconds / ceilings.flops[dtype_name(w.dtype)],
            "peak_bytes": self._memory.get(name),
            "dtype": dtype_name(w.dtype),
            "B": w.B,
            "T": w.T,
        }

    def close(self) -> None:
        """Free the models of the race."""
        self._families.clear()


def peak_memory(workload: Workload, name: str, scale: Scale) -> int:
    """Bytes of the largest resident set of a process that runs two steps."""
    command = [sys.executable, "-m", "benchmarks.bench_train_step", scale, workload.group, name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{name}: {done.stderr}"
    return int(done.stdout.split()[-1])


def races(settings: Settings) -> list[Race]:
    """A race for each dtype."""
    scale = settings.scale
    return [
        # memory takes a process per contender, so measure it in one dtype only
        TrainStep(w, contenders(scale, w.dtype), memory=w.dtype == compute_dtype(scale))
        for w in workloads(scale)
    ]


def test_train_step(lane: Lane, record: Callable[[Lane], None]) -> None:
    """One contender's step."""
    record(lane)


def lone_step(scale: Scale, workload: Workload, name: str) -> Callable[[], Tensor]:
    """A contender's step on a CPU, for a process that runs nothing else."""
    settings = Settings(scale, torch.device("cpu"), rounds=1, seconds=0.0, budget=inf, memory=False)
    return TrainStep(workload, (name,)).step(name, settings)


def peak_resident() -> int:
    """Bytes of this process's largest resident set, interpreter and libraries included."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would include the process that started this one
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # kilobytes, except on a Mac
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(scale: str, group: str, name: str) -> None:
    """Run two steps of a contender on a CPU and print the process's largest resident set."""
    (workload,) = (w for w in workloads(Scale(scale)) if w.group == group)
    step = lone_step(Scale(scale), workload, name)
    step()
    step()
    print(peak_resident())


if __name__ == "__main__":
    main(*sys.argv[1:])
