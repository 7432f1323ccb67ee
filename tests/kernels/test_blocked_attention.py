"""Attention on a CPU: blocks of queries against fp64, by the measure of PyTorch's own kernel."""

import math
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import attention, reference
from tests.kernels import budget
from tests.kernels.graphs import assert_compiles_whole

# the package exports another function under a module's name
op_module = import_module("fastgpt2.kernels.blocked_attention")
# (B, T, H, D): a part of a block, a whole one, one more, several; a head that is not a power of two
SHAPES = [(2, 1, 2, 64), (1, 127, 2, 32), (1, 128, 1, 80), (2, 129, 3, 16), (1, 300, 2, 64)]


@pytest.fixture(autouse=True, params=[True, False], ids=["AMX", "no AMX"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether PyTorch's forward kernel is a match for the blocks."""
    monkeypatch.setattr(op_module, "_HAS_AMX", request.param)
    monkeypatch.setattr(op_module, "_BLOCK", 128)


def _qkv(B: int, T: int, H: int, D: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(B, T, 3 * H * D).to(dtype)


def _op(n_head: int) -> budget.Op:
    def op(impl: str, qkv: Tensor) -> Tensor:
        scale = 1.0 / math.sqrt(qkv.shape[2] // (3 * n_head))
        if impl == "blocked":
            blocked: Tensor = op_module.blocked_attention(qkv, n_head, scale)
            return blocked
        if impl == "prefixes":
            by_prefixes: Tensor = op_module.attention_by_prefixes(qkv, n_head, scale)
            return by_prefixes
        if impl == "reference":
            return reference.attention(qkv, n_head, 0.0, None, None, None, scale)
        q, k, v = reference.split_heads(qkv, n_head)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2)

    return op


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_budget(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    # the scores are rounded, too, which PyTorch's kernel does not do
    budget.check_op(
        _op(shape[2]), {"qkv": _qkv(*shape, dtype)}, impl="blocked", eager="sdpa", roundings=4.0
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefixes_within_budget(shape: tuple[int, int, int, int]) -> None:
    budget.check_op(
        _op(shape[2]), {"qkv": _qkv(*shape, torch.float32)}, impl="prefixes", eager="sdpa"
    )


def test_sums_over_many_blocks_are_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    # 64 terms of one sign, of which a sum in bf16 would lose the small ones
    monkeypatch.setattr(op_module, "_BLOCK", 4)
    qkv = _qkv(1, 256, 2, 16, torch.bfloat16)
    dout = torch.rand(1, 256, 32).bfloat16()
    found = op_module._blocked_attention_bwd(dout, qkv, 2, 0.25)
    monkeypatch.setattr(op_module, "_BLOCK", 256)
    whole = op_module._blocked_attention_bwd(dout.double(), qkv.double(), 2, 0.25)
    error = (found.double() - whole)[..., 64:]
    # a rounding of every probability, and one of the sum
    assert error.norm() < 4e-3 * whole[..., 64:].norm()


def test_gradient_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_module, "_BLOCK", 3)
    qkv = _qkv(2, 8, 2, 4, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: op_module.blocked_attention(x, 2, 0.3), (qkv,))


def test_is_what_a_cpu_runs_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = _qkv(1, 5, 2, 8, torch.bfloat16)
    called: list[torch.dtype] = []

    def spy(qkv: Tensor, n_head: int, scale: float) -> Tensor:
        called.append(qkv.dtype)
        return torch.zeros_like(qkv[..., : qkv.shape[2] // 3])

    contract = import_module("fastgpt2.kernels.attention")
    monkeypatch.setattr(contract, "blocked_attention", spy)
    attention(qkv, n_head=2, impl="torch")
    attention(qkv.float(), n_head=2, impl="torch")
    attention(qkv, n_head=2, dropout_p=0.1, impl="torch")
    attention(qkv, n_head=2, key_range=torch.tensor([[0, 4]]), impl="torch")
    assert called == [torch.bfloat16]


def test_prefixes_are_for_lengths_at_which_pytorchs_blocks_are_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[int] = []
    contract = import_module("fastgpt2.kernels.attention")
    plain = op_module.attention_by_prefixes

    def spy(qkv: Tensor, *rest: float) -> Tensor:
        called.append(qkv.shape[1])
        out: Tensor = plain(qkv, *rest)
        return out

    monkeypatch.setattr(contract, "attention_by_prefixes", spy)
    for T in (191, 192, 767, 768):
        qkv = _qkv(1, T, 2, 8, torch.float32)
        expected = reference.attention(qkv, 2, 0.0, None, None, None, 8**-0.5)
        out = attention(qkv, n_head=2, impl="torch")
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    short = _qkv(1, 200, 2, 8, torch.float64)
    attention(short, n_head=2, impl="torch")
    attention(short.float().requires_grad_(), n_head=2, impl="torch")
    torch.func.vmap(lambda x: attention(x, n_head=2, impl="torch"))(short.float()[None])
    assert called == ([] if op_module._HAS_AMX else [192, 767])


def test_a_view_and_an_empty_batch() -> None:
    wide = torch.randn(2, 9, 100)
    view = wide[:, :, 2:50]
    out = op_module.blocked_attention(view, 2, 0.5)
    # two libraries may multiply a view and a copy: equal within roundings, not bit for bit
    torch.testing.assert_close(out, op_module.blocked_attention(view.contiguous(), 2, 0.5))
    assert op_module.blocked_attention(wide[:0, :, :48], 2, 0.5).shape == (0, 9, 16)


def test_opcheck() -> None:
    qkv = _qkv(1, 5, 2, 8, torch.float32).requires_grad_()
    torch.library.opcheck(op_module._blocked_attention_fwd, (qkv, 2, 0.3))


def test_compiles_whole() -> None:
    def op(qkv: Tensor) -> Tensor:
        return attention(qkv, n_head=2, impl="torch")

    assert_compiles_whole(op, [{"qkv": _qkv(1, T, 2, 8, torch.bfloat16)} for T in (9, 140)])
