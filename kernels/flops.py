"""How many FLOPs our ops take, for PyTorch's ``torch.utils.flop_counter.FlopCounterMode``.

It counts multiplications and additions of matrix products, 2 M K N for (M, K) @ (K, N), and ignores
elementwise ops. Attention counts all T S scores of a head, masked or not, and five products in
backward, as for PyTorch's own fused attention. The loss computes its gradients in the forward pass,
and they are counted there. Shapes: N rows, C wide, F features, V vocabulary.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from math import prod
from types import ModuleType
from typing import Any

import torch

Shape = Sequence[int]

_COUNTER = "torch.utils.flop_counter"


def _product(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """x (..., C) @ weight (F, C)^T."""
    return 2 * prod(x) * weight[0]


def _attention(products: int, qkv: Shape) -> int:
    B, T, three_C = qkv
    return 2 * products * B * T * T * three_C // 3


def _attention_fwd(qkv: Shape, *_: Any, **__: Any) -> int:
    return _attention(2, qkv)


def _attention_bwd(dout: Shape, qkv: Shape, *_: Any, **__: Any) -> int:
    return _attention(5, qkv)


def _decode_attention(q: Shape, k_cache: Shape, *_: Any, **__: Any) -> int:
    return 2 * 2 * prod(q) * k_cache[2]


def _mlp_fwd(x: Shape, fc: Shape, fc_bias: Shape | None, proj: Shape, *_: Any, **__: Any) -> int:
    return 2 * x[0] * (prod(fc) + prod(proj))


def _linear_cross_entropy_fwd(x: Shape, weight: Shape, *options: Any, **_: Any) -> int:
    # after the targets and four numbers: whether the gradients of x and weight are wanted
    products: int = 1 + sum(options[5:7])
    return products * 2 * x[0] * prod(weight)


FORMULAS: dict[str, Callable[..., int]] = {
    "attention_fwd": _attention_fwd,
    "attention_bwd": _attention_bwd,
    "blocked_attention_fwd": _attention_fwd,
    "blocked_attention_bwd": _attention_bwd,
    "decode_attention": _decode_attention,
    "decode_head": _product,
    "decode_linear": _product,
    "decode_qkv": _product,
    "fp8_matmul": _product,
    "linear_cross_entropy_fwd": _linear_cross_entropy_fwd,
    "linear_gelu_fwd": _product,
    "mlp_fwd": _mlp_fwd,
    "onednn_linear": _product,
}


def _register(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.fastgpt2, name))(formula)
    # PyTorch has formulas for its fused attention on GPUs, and counts 0 for the one on CPUs
    for name, formula in (("", counter.sdpa_flop), ("_backward", counter.sdpa_backward_flop)):
        op = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{name}")
        counter.flop_registry.setdefault(op, formula)


class _AfterImport(MetaPathFinder):
    """Registers the formulas when the counter is imported: it imports Triton, which we must not."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The counter's own spec, with a loader that calls ``_register`` at its end."""
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def run(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = run  # type: ignore[method-assign]
        return spec


if _COUNTER in sys.modules:
    _register(sys.modules[_COUNTER])
else:
    sys.meta_path.insert(0, _AfterImport())
