"""The guard against assemblers that get attention wrong: whom it suspects, what it does then."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.kernels import attention, backend
from fastgpt2.kernels.jit import attention_check
from fastgpt2.kernels.jit.attention import launch_fwd
from fastgpt2.kernels.jit.attention_bwd import launch_bwd
from tests.kernels import budget
from tests.kernels.budget import DEVICE, on_gpu

# the package's attribute of that name is the op
contract = sys.modules["fastgpt2.kernels.attention"]


@pytest.mark.parametrize(
    ("dtype", "capability", "ptxas", "suspect"),
    [
        (torch.bfloat16, (9, 0), "12.8", True),
        (torch.float16, (9, 0), "13.0", True),
        (torch.bfloat16, (9, 0), "13.1", False),
        (torch.bfloat16, (9, 0), "14.0", False),
        (torch.bfloat16, (9, 0), "12.8.93", True),
        (torch.bfloat16, (8, 0), "12.8", False),
        (torch.bfloat16, (10, 0), "12.8", False),
        # fp32 has no wgmma with its left operand in registers
        (torch.float32, (9, 0), "12.8", False),
    ],
)
def test_whom_it_suspects(
    dtype: torch.dtype, capability: tuple[int, int], ptxas: str, suspect: bool
) -> None:
    assert attention_check.is_suspect(dtype, capability, ptxas) is suspect


@pytest.mark.parametrize("D", budget.grid([64, 80], [32, 128]))
@pytest.mark.parametrize(
    ("masked", "dropout"), [(False, False), (True, True), on_gpu(True, False), on_gpu(False, True)]
)
@pytest.mark.parametrize("dtype", [torch.float16, on_gpu(torch.bfloat16)], ids=str)
def test_right_kernels_pass(
    D: int, masked: bool, dropout: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(attention_check, "LENGTHS", (32, 41))
    with torch.inference_mode():
        assert attention_check.passes(DEVICE, dtype, D, masked=masked, dropout=dropout)


def _nudged(x: Tensor) -> Tensor:
    """One element off by a quarter: what a lost register might look like."""
    return x.flatten().index_add(0, torch.tensor(200), x.new_tensor([0.25])).view_as(x)


def _first_tile(x: Tensor, value: float) -> Tensor:
    return x.index_fill(1, torch.arange(16, device=x.device), value)


@pytest.mark.parametrize("how", ["nudged", "nan", "lost gradient", "nan gradient"])
def test_wrong_kernels_do_not_pass(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_fwd(*arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = launch_fwd(*arguments)
        return _nudged(out) if how == "nudged" else _first_tile(out, torch.nan), lse

    def wrong_bwd(*arguments: Any) -> Tensor:
        dqkv = launch_bwd(*arguments)
        return _first_tile(dqkv, torch.nan if "nan" in how else 0.0)

    monkeypatch.setattr(attention_check, "LENGTHS", (32,))
    if "gradient" in how:
        monkeypatch.setattr(attention_check, "launch_bwd", wrong_bwd)
    else:
        monkeypatch.setattr(attention_check, "launch_fwd", wrong_fwd)
    assert not attention_check.passes(DEVICE, torch.float16, 16, masked=False, dropout=False)


@dataclass
class Hopper:
    """A Hopper GPU, its assembler, and what the self-check says of them."""

    ptxas: str = "12.8"
    is_right: bool = True
    checks: int = 0

    def passes(self, *_arguments: Any, **_options: Any) -> bool:
        self.checks += 1
        return self.is_right


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hopper]:
    """The machine, as far as the guard can see."""
    gpu = Hopper()
    tool = SimpleNamespace(nvidia=SimpleNamespace(ptxas=SimpleNamespace(version=gpu.ptxas)))
    monkeypatch.setattr(attention_check, "passes", gpu.passes)
    monkeypatch.setattr(attention_check, "knobs", tool)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (9, 0))
    monkeypatch.setattr(contract, "INTERPRETED", False)
    attention_check.obstacle.cache_clear()
    yield gpu
    attention_check.obstacle.cache_clear()


def test_a_new_assembler_is_not_checked(hopper: Hopper, monkeypatch: pytest.MonkeyPatch) -> None:
    new = SimpleNamespace(nvidia=SimpleNamespace(ptxas=SimpleNamespace(version="13.1")))
    monkeypatch.setattr(attention_check, "knobs", new)
    assert attention_check.obstacle(0, torch.bfloat16, 64, False, False) is None
    assert hopper.checks == 0


def test_checked_once_a_process_and_kind(hopper: Hopper) -> None:
    kinds = [(64, False, False), (64, False, False), (64, False, True), (32, False, False)]
    for kind in kinds:
        assert attention_check.obstacle(0, torch.bfloat16, *kind) is None
    assert hopper.checks == 3


def test_wrong_numbers_warn_once_and_say_what_helps(hopper: Hopper) -> None:
    hopper.is_right = False
    with pytest.warns(UserWarning, match=r"ptxas 12\.8 builds .* TRITON_PTXAS_PATH") as warned:
        faults = {attention_check.obstacle(0, torch.float16, 64, False, False) for _ in range(3)}
    assert len(warned) == len(faults) == 1
    assert "13.1" in str(faults.pop())


@pytest.mark.filterwarnings("ignore:attention")
@pytest.mark.parametrize("is_right", [True, False])
def test_what_runs(is_right: bool, hopper: Hopper, monkeypatch: pytest.MonkeyPatch) -> None:
    hopper.is_right = is_right
    x = torch.randn(1, 9, 48, device=DEVICE).half()
    # auto takes the kernels on a GPU only: play one
    monkeypatch.setattr(backend, "_triton_obstacle", lambda x: None)
    on_device: Any = SimpleNamespace(is_cuda=True)
    choice = backend.resolve(
        "attention", "auto", on_device, lambda: contract._obstacle(x, 1, False, False)
    )
    assert choice is (backend.Impl.TRITON if is_right else backend.Impl.TORCH)
    if is_right:
        assert attention(x, n_head=1, impl="triton").isfinite().all()
    else:
        with pytest.raises(RuntimeError, match=r"attention: impl='triton' cannot run: ptxas 12"):
            attention(x, n_head=1, impl="triton")


def test_compiles_whole_with_the_check_inside(hopper: Hopper) -> None:
    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 9, 48, device=DEVICE).half()
    outs = [f(x, n_head=1, impl="triton") for f in (compiled, attention)]
    assert torch.equal(*outs)
    assert hopper.checks == 1
