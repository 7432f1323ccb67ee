"""The guard against assemblers that get attention wrong: whom it suspects, what it does then."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.kernels import attention, backend, reference, tuning
from fastgpt2.kernels.jit import attention_check, attention_dropout, attention_parts, launch
from fastgpt2.kernels.jit.attention import launch_fwd
from fastgpt2.kernels.jit.attention_bwd import launch_bwd
from tests.kernels import budget
from tests.kernels.budget import DEVICE, on_gpu

# the package's attribute of that name is the op
contract = sys.modules["fastgpt2.kernels.attention"]


real_passes = attention_check.passes
KIND = attention_check.Kind(torch.bfloat16, 64, 2, None, None, False)


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
        ids, ranges = (torch.int64, torch.int32) if masked else (None, None)
        kind = attention_check.Kind(dtype, D, 2, ids, ranges, dropout)
        assert attention_check.passes(DEVICE, kind)


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
    assert not attention_check.passes(DEVICE, KIND._replace(dtype=torch.float16, D=16))


def test_it_runs_where_kernels_are_only_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_check, "LENGTHS", (1,))
    launches: list[launch.Launch] = []
    with launch.noting(launches):
        assert attention_check.passes(DEVICE, KIND._replace(dtype=torch.float16, D=16))
    assert not launches


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
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(contract, "INTERPRETED", False)
    attention_check.obstacle.cache_clear()
    yield gpu
    attention_check.obstacle.cache_clear()


def test_a_new_assembler_is_not_checked(hopper: Hopper, monkeypatch: pytest.MonkeyPatch) -> None:
    new = SimpleNamespace(nvidia=SimpleNamespace(ptxas=SimpleNamespace(version="13.1")))
    monkeypatch.setattr(attention_check, "knobs", new)
    assert attention_check.obstacle(0, KIND) is None
    assert hopper.checks == 0


def test_checked_once_a_process_and_kind(hopper: Hopper) -> None:
    other = [
        KIND._replace(D=32),
        KIND._replace(n_head=1),
        KIND._replace(dropout=True),
        KIND._replace(segments=torch.int32),
        KIND._replace(segments=torch.int64),
        KIND._replace(key_range=torch.int64),
    ]
    for kind in (KIND, KIND, *other, KIND):
        assert attention_check.obstacle(0, kind) is None
    assert hopper.checks == 1 + len(other)


def test_never_within_a_graph_capture(hopper: Hopper, monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    with pytest.raises(RuntimeError, match=r"while a CUDA graph is captured; run attention once"):
        attention_check.obstacle(0, KIND)
    assert hopper.checks == 0
    capturing = False
    assert attention_check.obstacle(0, KIND) is None
    capturing = True
    # checked before: nothing has to run
    assert attention_check.obstacle(0, KIND) is None
    assert hopper.checks == 1


def test_wrong_numbers_warn_once_and_say_what_helps(hopper: Hopper) -> None:
    hopper.is_right = False
    with pytest.warns(UserWarning, match=r"ptxas 12\.8 builds .* TRITON_PTXAS_PATH") as warned:
        faults = {attention_check.obstacle(0, KIND) for _ in range(3)}
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
        "attention", "auto", on_device, lambda: contract._obstacle(x, 1, None, None, False)
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


def _specialisation(argument: Any) -> Any:
    """What Triton builds another binary for: types, ones, multiples of 16, what is not there."""
    if isinstance(argument, tuple):
        return tuple(_specialisation(part) for part in argument)
    if isinstance(argument, Tensor):
        return argument.dtype
    if isinstance(argument, bool) or not isinstance(argument, int):
        return type(argument)
    return "one" if argument == 1 else "multiple of 16" if argument % 16 == 0 else "int"


@pytest.mark.parametrize("T", [1, 64, 1000, 127])
@pytest.mark.parametrize(("n_head", "D"), [(1, 16), (2, 64), (16, 16), (3, 20)])
@pytest.mark.parametrize(
    ("segments", "key_range", "dropout"),
    [
        (None, None, False),
        (torch.int64, None, False),
        (torch.int32, None, True),
        (None, torch.int64, False),
        (torch.int32, torch.int64, True),
    ],
    ids=str,
)
def test_it_checks_the_specialisations_that_run(
    T: int,
    n_head: int,
    D: int,
    segments: torch.dtype | None,
    key_range: torch.dtype | None,
    dropout: bool,
    hopper: Hopper,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    def record(kernel: Any, grid: Any, *arguments: Any, **meta: Any) -> None:
        seen.append((kernel.fn.__name__, _specialisation(arguments), tuple(meta.items())))

    monkeypatch.setattr(attention_parts, "launch_kernel", record)
    # nothing reads the mask, which takes the interpreter minutes
    monkeypatch.setattr(attention_dropout, "launch_kernel", lambda *_, **__: None)
    # on a GPU's tiles
    monkeypatch.setattr(tuning, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(reference, "attention", lambda qkv, *_: qkv.chunk(3, -1)[0] * 1.0)
    asked: list[attention_check.Kind] = []
    monkeypatch.setattr(contract, "_miscompiled", lambda index, *k: asked.append(k))
    B = 3
    x = torch.zeros(B, T, 3 * n_head * D, dtype=torch.float16)
    x.requires_grad_()
    out = attention(
        x,
        n_head=n_head,
        dropout_p=0.5 if dropout else 0.0,
        seed=7 if dropout else None,
        segment_ids=None if segments is None else torch.zeros(B, T, dtype=segments),
        key_range=None if key_range is None else torch.zeros(B, 2, dtype=key_range),
        impl="triton",
    )
    torch.autograd.grad(out.sum(), x)
    run, seen[:] = list(seen), []
    for length in attention_check.LENGTHS:
        # nothing is computed here, so the check ends with the first length that it is given
        monkeypatch.setattr(attention_check, "LENGTHS", (length,))
        real_passes(torch.device("cpu"), attention_check.Kind(*asked[0]))
    assert len(run) == 3
    assert set(run) <= set(seen)
