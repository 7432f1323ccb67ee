"""Every public op through Triton's real launcher, for a GPU that is not there.

Arguments are bound, specialised and compiled exactly as on that GPU, at first all at once as
``compile_ahead`` does it, so that the launches find everything compiled. Only the launch itself and
PyTorch's matrix products are left out, so what comes back is garbage. As a program it takes an
architecture, a dtype and the names of sizes, and prints a line of JSON: the kernels launched, each
with its shared memory. Not under TRITON_INTERPRET=1, and never within a test's own process: it
replaces Triton's driver and PyTorch's products.
"""

import importlib
import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.op_case import Sizes
from benchmarks.op_race import works
from benchmarks.ops import cases_at
from fastgpt2.kernels import backend, tuning
from fastgpt2.kernels.ahead import compile_ahead
from fastgpt2.kernels.jit.compile import TARGETS

# GPT-2's widths, which decide what is compiled; few tokens, and a vocabulary that overruns the
# tiles as the padded one does
VOCABULARY = 4096 + 50304 % 4096
SIZES = (
    Sizes("124M", 1, 64, 768, 12, VOCABULARY),
    Sizes("1558M", 1, 40, 1600, 25, VOCABULARY),
)
DECODE_BATCHES = (1, 16)
# what is registered with it lasts as long as it does
PRODUCTS = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]


class AbsentGPU:
    """What Triton's launcher asks its driver for before it compiles."""

    def __init__(self, arch: str) -> None:
        self.target = TARGETS[arch]

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_current_target(self) -> Any:
        """What to compile for."""
        return self.target


def leave_out_products() -> None:
    """Products between the kernels are memory as it comes: some CPUs take half a minute in bf16."""
    register: Any = PRODUCTS.impl
    register("mm", lambda a, b: a.new_empty(a.shape[0], b.shape[1]), "CPU")
    register("mm.out", lambda a, b, out: out, "CPU")
    register("addmm", lambda c, a, b, **_: a.new_empty(a.shape[0], b.shape[1]), "CPU")


def launch_everything(arch: str, dtype: torch.dtype, sizes: Sequence[Sizes]) -> dict[str, int]:
    """Launch each op's kernels; kernel function's name -> largest shared memory in bytes."""
    shared: dict[str, int] = {}
    run = JITFunction.run

    def bind_and_compile(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, warmup=True, **kwargs)
        name = self.__name__
        shared[name] = max(shared.get(name, 0), compiled.metadata.shared)
        return compiled

    leave_out_products()
    driver.set_active(AbsentGPU(arch))
    for module, name, value in (
        (backend, "_triton_obstacle", lambda x: None),
        (tuning, "_architecture", lambda device: arch),
        (tuning, "multiprocessors", lambda device: 132),
        # what would run on the GPU itself, to check its assembler
        (importlib.import_module("fastgpt2.kernels.attention"), "_miscompiled", lambda *_: None),
    ):
        setattr(module, name, value)

    def everything() -> None:
        for case in (case for s in sizes for case in cases_at(s, DECODE_BATCHES, on_kernels=True)):
            inputs = case.inputs(torch.device("cpu"), dtype)
            for _, work in works(case, partial(case.run, "triton"), inputs):
                work()

    compiled: list[str] = []
    # Triton calls it after each compilation
    knobs.runtime.jit_post_compile_hook = lambda **hook: compiled.append(hook["repr"])
    ahead = compile_ahead(everything)
    assert ahead == len(compiled), f"{len(compiled)} binaries compiled, {ahead} needed"
    JITFunction.run = bind_and_compile
    everything()
    assert len(compiled) == ahead, f"compiled when launched, not ahead: {compiled[ahead:]}"
    return shared


if __name__ == "__main__":
    arch, dtype, *names = sys.argv[1:]
    chosen = [size for size in SIZES if size.name in names]
    print(json.dumps(launch_everything(arch, getattr(torch, dtype), chosen)))
