"""Every op is launched as on a GPU: bound, specialised and compiled, all but executed."""

import ast
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgpt2.kernels.gpus import ARCHITECTURES, has_fp8
from fastgpt2.kernels.jit.launch import Launch, launch_kernel, noting
from tests.compiling import run_compiling
from tests.played_gpus import PlayedGPUs
from tests.tiny_gpt import tiny_gpt

JIT = Path(__file__).resolve().parents[2] / "kernels" / "jit"


def _kernels() -> set[str]:
    """Names of all kernels: private functions that are called ``_..._kernel``."""
    return {
        node.name
        for path in JIT.glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and re.fullmatch("_.*_kernel", node.name)
    }


# the first at the width that does not divide by the tiles
@pytest.mark.parametrize(
    ("arch", "dtype", "size"),
    [("sm_90", "bfloat16", "1558M"), ("sm_80", "float32", "124M")],
    ids=["sm_90", "sm_80"],
)
def test_every_kernels_binaries_are_launched(arch: str, dtype: str, size: str) -> None:
    done = run_compiling("-m", "tests.kernels.launch_without_gpu", arch, dtype, size)
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout.splitlines()[-1])
    without = set() if has_fp8(arch) else {"_fp8_amax_kernel", "_quantize_fp8_kernel"}
    assert set(shared) == _kernels() - without
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


def test_noted_launches_do_not_run_and_keep_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = SeenKernel(PlayedGPUs(monkeypatch))
    x = torch.empty(40, dtype=torch.float16)
    launches: list[Launch] = []
    with noting(launches):
        launch_kernel(kernel, (3,), (x, 4), x[1:], None, BLOCK_N=8)
    assert kernel.meta == {}
    (noted,) = launches
    assert (noted.grid, noted.meta, noted.device) == ((3,), {"BLOCK_N": 8}, x.device)
    (whole, four), rest, nothing = noted.arguments
    assert (four, nothing) == (4, None)
    assert whole.dtype is rest.dtype is torch.float16
    assert (whole.data_ptr() % 16, rest.data_ptr() % 16) == (x.data_ptr() % 16, 2)
    assert not isinstance(whole, torch.Tensor)
    launch_kernel(kernel, (3,), x)
    assert kernel.grid == (3,)


def _launches_of_a_decoded_token(n_layer: int) -> Counter[str]:
    """How often each kernel is launched for one more token."""
    model = tiny_gpt(impl="triton", n_layer=n_layer).eval()
    cache = model.make_cache(2, 16)
    launches: list[Launch] = []
    with torch.no_grad(), noting(launches):
        model.hidden_states(torch.zeros(2, 4, dtype=torch.int64), cache)
        cache.advance(4)
        launches.clear()
        model.hidden_states(torch.zeros(2, 1, dtype=torch.int64), cache)
    return Counter(launch.kernel.fn.__name__ for launch in launches)


def test_launches_of_a_decoded_token() -> None:
    one, two = (_launches_of_a_decoded_token(n_layer) for n_layer in (1, 2))
    assert dict(two - one) == {
        "_layer_norm_fwd_kernel": 2,
        "_append_kv_kernel": 1,
        "_decode_attention_kernel": 1,
        "_gelu_fwd_kernel": 1,
        "_add_branch_fwd_kernel": 1,
    }
    # the embedding, and the last LayerNorm
    assert (one + one - two).total() == 2
