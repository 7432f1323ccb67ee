"""Under autocast, what an op computes has the dtype that torch.compile was told (its fake's)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from fastgpt2 import kernels
from tests.kernels.budget import DEVICE

B, T, H, D = 1, 3, 2, 16
C, F, V = H * D, 4 * H * D, 48

# a cache of keys, and those of one new token
CACHE, NEW = (B, H, 8, D), (B, 1, H, D)

Run = Callable[..., Any]
# name -> (the op, the shapes of its floating-point tensors)
OPS: dict[str, tuple[Run, tuple[tuple[int, ...], ...]]] = {
    "add_branch": (kernels.add_branch, ((B, T, C), (B, T, C), (C,))),
    "add_layer_norm": (kernels.add_layer_norm, ((B, T, C), (B, T, C), (C,), (C,))),
    "attention": (lambda qkv, impl: kernels.attention(qkv, n_head=H, impl=impl), ((B, T, 3 * C),)),
    "bias_gelu": (kernels.bias_gelu, ((B, T, F), (F,))),
    "cross_entropy": (
        lambda logits, impl: kernels.cross_entropy(logits, _ids(T), impl=impl),
        ((T, V),),
    ),
    "decode_attention": (
        lambda q, k, v, impl: kernels.decode_attention(q, k, v, _ids(B), impl=impl),
        (NEW, CACHE, CACHE),
    ),
    "decode_head": (
        lambda x, weight, bias, impl: kernels.decode_head(x, weight, bias, impl=impl),
        ((T, C), (V, C), (V,)),
    ),
    "decode_linear": (
        lambda x, weight, bias, impl: kernels.decode_linear(x, weight, bias, impl=impl),
        ((T, C), (F, C), (F,)),
    ),
    "decode_qkv": (
        lambda x, weight, k, v, impl: kernels.decode_qkv(x, weight, None, k, v, _ids(B), impl=impl),
        ((B, C), (3 * C, C), CACHE, CACHE),
    ),
    "embedding": (
        lambda wte, wpe, impl: kernels.embedding(_ids(B, T), wte, wpe, impl=impl),
        ((V, C), (T, C)),
    ),
    "gelu": (kernels.gelu, ((B, T, F),)),
    "layer_norm": (kernels.layer_norm, ((B, T, C), (C,), (C,))),
    "linear": (
        lambda x, weight, bias, impl: kernels.linear(x, weight, bias),
        ((T, C), (F, C), (F,)),
    ),
    "linear_cross_entropy": (
        lambda x, weight, impl: kernels.linear_cross_entropy(x, weight, _ids(T), impl=impl),
        ((T, C), (V, C)),
    ),
    "linear_fp8": (
        kernels.linear_fp8,
        ((16, C), (F, C), (F,)),
    ),
    "linear_gelu": (kernels.linear_gelu, ((B, T, C), (F, C), (F,))),
    "linear_gelu, fused": (
        lambda x, weight, bias, impl: kernels.linear_gelu(x, weight, bias, fused=True, impl=impl),
        ((B, T, C), (F, C), (F,)),
    ),
    "mlp": (kernels.mlp, ((B, T, C), (F, C), (F,), (C, F))),
    "stream_layer_norm": (kernels.stream_layer_norm, ((B, T, C), (C,), (C,))),
    "tied_embedding": (
        lambda wte, wpe, impl: kernels.tied_embedding(_ids(B, T), wte, wpe, impl=impl),
        ((V, C), (T, C)),
    ),
}
# what the package exports beside its ops, and two that write in place and return nothing
NOT_OPS = {"Impl", "append_kv", "decode_greedy", "explain", "use_impl"}
NO_GRADIENT = {name for name in OPS if name.startswith("decode_")}


def _ids(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int64, device=DEVICE)


def test_every_op_is_here() -> None:
    assert {name.partition(",")[0] for name in OPS} == set(kernels.__all__) - NOT_OPS


def _dtypes(name: str, dtype: torch.dtype, impl: str) -> Any:
    """Dtypes of the outputs and of every gradient."""
    run, shapes = OPS[name]
    wants_gradient = name not in NO_GRADIENT
    leaves = [torch.randn(s, device=DEVICE, dtype=dtype) for s in shapes]
    leaves = [leaf.requires_grad_(wants_gradient) for leaf in leaves]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        outputs = run(*leaves, impl=impl)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    seen = [y for y in outputs if y.requires_grad]
    upstream = [torch.ones_like(y) for y in seen]
    grads = torch.autograd.grad(seen, leaves, upstream, allow_unused=True) if seen else ()
    dtypes: Any = tree_map_only(Tensor, lambda y: y.dtype, (outputs, grads))
    return dtypes


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_eager_and_fake_dtypes_agree(name: str, dtype: torch.dtype, impl: str) -> None:
    if name == "linear_fp8" and dtype == torch.float16:
        pytest.skip("linear_fp8 refuses fp16")
    eager = _dtypes(name, dtype, impl)
    with FakeTensorMode():
        assert _dtypes(name, dtype, impl) == eager


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("name", ["linear", "linear_gelu", "linear_gelu, fused", "mlp"])
def test_products_are_in_autocasts_dtype(name: str, impl: str) -> None:
    (output, *_), _ = _dtypes(name, torch.float32, impl)
    assert output == torch.bfloat16
