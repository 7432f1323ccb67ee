"""PyTorch's FLOP counter knows our ops: as many FLOPs as for PyTorch's own operators."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks.rivals import PlainGPT
from fastgpt2 import kernels
from fastgpt2.kernels.flops import FORMULAS
from fastgpt2.kernels.linear import _onednn_linear
from fastgpt2.kernels.linear_fp8 import linear_fp8
from tests.tiny_gpt import tiny_batch, tiny_gpt

B, T, H, D = 2, 8, 3, 16
C = H * D


def flops(call: Callable[[], Any]) -> int:
    counter: Any = FlopCounterMode(display=False)
    with counter:
        call()
    return int(counter.get_total_flops())


def of_products(call: Callable[[], Any]) -> int:
    """The count with PyTorch's attention written out as its products."""
    with sdpa_kernel(SDPBackend.MATH):
        return flops(call)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_attention(impl: str, dropout_p: float) -> None:
    qkv = torch.randn(B, T, 3 * C, requires_grad=True)
    q, k, v = (x.view(B, T, H, D).transpose(1, 2) for x in qkv.chunk(3, dim=2))
    theirs = of_products(lambda: F.scaled_dot_product_attention(q, k, v))
    out: list[Tensor] = []

    def forward() -> None:
        out[:] = [kernels.attention(qkv, n_head=H, dropout_p=dropout_p, impl=impl)]

    assert flops(forward) == theirs == 4 * B * T * T * C
    backward = flops(lambda: torch.autograd.backward(out[0].sum()))
    # a fused backward recomputes the scores: five products and not four
    assert backward in (2 * theirs, 5 * theirs // 2)
    assert impl == "torch" or backward == 5 * theirs // 2


def test_blocked_attention() -> None:
    qkv = torch.randn(B, T, 3 * C, dtype=torch.bfloat16, requires_grad=True)
    step = lambda: torch.autograd.backward(kernels.attention(qkv, n_head=H).sum())  # noqa: E731
    assert flops(step) == 14 * B * T * T * C


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_decode_attention(impl: str) -> None:
    q, (k, v) = torch.randn(B, 1, H, D), torch.randn(2, B, H, T, D)
    lengths = torch.full((B,), T - 1)
    call = lambda: kernels.decode_attention(q, k, v, lengths, impl=impl)  # noqa: E731
    assert flops(call) == 4 * B * T * C


def test_products() -> None:
    x, w, b = torch.randn(10, C, requires_grad=True), torch.randn(32, C), torch.randn(32)
    one = 2 * 10 * C * 32
    assert flops(lambda: _onednn_linear(x, w, b)) == one
    assert flops(lambda: kernels.linear(x, w, b)) == one
    assert flops(lambda: kernels.linear_gelu(x, w, b, fused=True, impl="triton")) == one
    assert flops(lambda: linear_fp8(x.bfloat16(), w, b)) == one
    few = x.detach()[:5]
    assert flops(lambda: kernels.decode_linear(few, w, b, impl="triton")) == one // 2
    assert flops(lambda: kernels.decode_head(few, w, b, impl="triton")) == one // 2
    (k, v), lengths = torch.zeros(2, 5, 2, 3, 4), torch.zeros(5, dtype=torch.long)
    qkv = torch.randn(24, C)
    assert flops(lambda: kernels.decode_qkv(few, qkv, None, k, v, lengths)) == 2 * 5 * C * 24


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_ops_of_several_products(impl: str) -> None:
    x, w, b = torch.randn(10, C, requires_grad=True), torch.randn(32, C), torch.randn(32)
    proj, targets = torch.randn(C, 32), torch.zeros(10, dtype=torch.long)
    one = 2 * 10 * C * 32
    assert flops(lambda: kernels.mlp(x, w, b, proj, impl=impl)) == 2 * one
    # the loss, and with it the gradient of x
    loss = lambda: kernels.linear_cross_entropy(x, w, targets, impl=impl)  # noqa: E731
    assert flops(loss) == 2 * one
    with torch.no_grad():
        assert flops(loss) == one


@pytest.mark.parametrize("training", [True, False])
def test_a_model_counts_as_many_as_a_plain_one(training: bool) -> None:
    model, (idx, _) = tiny_gpt().train(training), tiny_batch()
    plain = PlainGPT(model.config)

    def step(loss: Callable[[], Any]) -> int:
        return flops(lambda: loss().backward() if training else loss())

    ours = step(lambda: model(idx, idx)[1])
    assert ours == step(lambda: plain(idx, idx)) > 0


def test_every_op_is_counted_or_multiplies_nothing() -> None:
    ops = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if "fastgpt2::" in n}
    rows = ("embedding", "layer_norm", "cross_entropy_", "add_branch", "append_kv", "decode_greedy")
    elementwise = (*rows, "gelu_", "quantize_fp8")
    others = {n for n in ops - set(FORMULAS) if "dropout_bits" not in n}
    assert {n for n in others if not any(part in n for part in elementwise)} == set()
    assert all(getattr(torch.ops.fastgpt2, name) in flop_registry for name in FORMULAS)


def test_the_counter_is_not_imported_before_it_is_wanted() -> None:
    code = (
        "import sys, fastgpt2.kernels as k, torch; assert 'triton' not in sys.modules\n"
        "from torch.utils.flop_counter import flop_registry\n"
        "assert torch.ops.fastgpt2.mlp_fwd in flop_registry\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
