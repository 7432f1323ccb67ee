"""Every op is launched as on a GPU: bound, specialised and compiled, all but executed."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgpt2.kernels.gpus import ARCHITECTURES
from fastgpt2.kernels.jit.launch import launch_kernel
from tests.played_gpus import PlayedGPUs

JIT = Path(__file__).resolve().parents[2] / "kernels" / "jit"


def _kernels() -> set[str]:
    """Names of all kernels: private functions that are called ``_..._kernel``."""
    return {
        node.name
        for path in JIT.glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and re.fullmatch("_.*_kernel", node.name)
    }


# the second at the width that does not divide by the tiles
@pytest.mark.parametrize(
    ("arch", "dtype", "sizes"),
    [("sm_90", "bfloat16", ("124M", "1558M")), ("sm_80", "float32", ("1558M",))],
    ids=["sm_90", "sm_80"],
)
def test_every_kernel_is_launched(arch: str, dtype: str, sizes: tuple[str, ...]) -> None:
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.launch_without_gpu", arch, dtype, *sizes],
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout.splitlines()[-1])
    assert set(shared) == _kernels()
    limit = ARCHITECTURES[arch].block_shared
    assert not {name: size for name, size in shared.items() if size > limit}


class SeenKernel:
    """A kernel that sees which GPU is the current one, and with what it is launched."""

    def __init__(self, gpus: PlayedGPUs, fault: Exception | None = None) -> None:
        self.gpus, self.fault = gpus, fault
        self.device: int | None = None
        self.grid: tuple[int, ...] = ()
        self.arguments: tuple[Any, ...] = ()
        self.meta: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> "SeenKernel":
        self.grid = grid
        return self

    def __call__(self, *arguments: Any, **meta: Any) -> None:
        self.device, self.arguments, self.meta = self.gpus.current, arguments, meta
        if self.fault is not None:
            raise self.fault


@pytest.mark.parametrize("in_tuples", [False, True])
@pytest.mark.parametrize("index", [0, 1, 3])
def test_a_launch_is_on_the_tensors_gpu(
    index: int, in_tuples: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = PlayedGPUs(monkeypatch)
    gpus.current = 2
    kernel = SeenKernel(gpus)
    with FakeTensorMode():
        x = torch.empty(4, device=f"cuda:{index}")
    arguments = ((x, x), x, 4) if in_tuples else (x, None, 4)
    launch_kernel(kernel, (7, 2), *arguments, BLOCK_N=8, num_warps=4)
    assert kernel.device == index
    assert kernel.grid == (7, 2)
    assert kernel.arguments == arguments
    # floating-point fusion is not left to Triton's default
    assert kernel.meta == {"BLOCK_N": 8, "num_warps": 4, "enable_fp_fusion": True}
    assert gpus.current == 2


def test_a_failed_launch_leaves_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = PlayedGPUs(monkeypatch)
    kernel = SeenKernel(gpus, RuntimeError("no"))
    with FakeTensorMode():
        x = torch.empty(4, device="cuda:1")
    with pytest.raises(RuntimeError, match="no"):
        launch_kernel(kernel, (1,), x)
    assert (kernel.device, gpus.current) == (1, 0)


def test_a_launch_without_a_gpu_selects_none(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = PlayedGPUs(monkeypatch)
    gpus.current = 2
    kernel = SeenKernel(gpus)
    launch_kernel(kernel, (1,), torch.empty(4))
    assert (kernel.device, gpus.current) == (2, 2)
