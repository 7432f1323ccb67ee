"""Linear layers: choose oneDNN or PyTorch's own choice of a library.

PyTorch gives a CPU's fp32 products to MKL, which keeps its AVX-512 code to Intel's processors.
oneDNN, which PyTorch carries as well and gives the bf16 ones to, has no such preference. On an AMD
processor with AVX-512 it is the faster one. With AVX2 alone it is slower, by up to a factor of two,
where an operand is transposed, as in the gradients, and otherwise faster: MKL multiplies one row by
one thread. On Intel's with AVX-512 it is faster for a few rows, as in decoding.
Everywhere else, and for small weights, the library is PyTorch's choice.

One row of bf16, as in decoding, is a matter of reading the weights. PyTorch gives it to oneDNN,
which reads them at half the speed of PyTorch's own product of a matrix and a vector.
Shapes: N rows, C wide, F features.
"""

import platform
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import checks
from fastgpt2.kernels.backend import wants_gradient
from fastgpt2.kernels.modes import autocasts, exported, is_ordinary, transformed


class Share(NamedTuple):
    """The products that go to oneDNN.

    Attributes:
        first: the smallest number of rows.
        end: the number of rows to stop before; 0 means that no product goes there.
        gradients: whether products with a transposed operand, as in gradients, go there too.
    """

    first: int = 0
    end: int = 0
    gradients: bool = True


def _share_of_onednn(info: Path = Path("/proc/cpuinfo")) -> Share:
    """The products that oneDNN computes faster on this processor.

    ``info`` is the file in which Linux describes the processors.
    """
    mkl, onednn = torch.backends.mkl, torch.backends.mkldnn
    if not (mkl.is_available() and onednn.is_available()):  # type: ignore[no-untyped-call]
        return Share()
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX512", "AVX2"):
        return Share()
    processor = platform.processor()
    if info.exists():
        with info.open(encoding="utf-8", errors="replace") as file:
            # the first core's lines name the vendor, and there may be hundreds of cores
            processor += file.read(1000)
    if "AuthenticAMD" in processor:
        return Share(1, sys.maxsize, gradients=capability == "AVX512")
    return Share(4, 65) if capability == "AVX512" else Share()


# read once: the compiler cannot trace it
_ONEDNN = _share_of_onednn()
# entries of the smallest weight that goes there: a call takes 12 us longer than PyTorch's own
_FEWEST = 1 << 18


def _takes_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    # an empty one, which oneDNN rejects, is small
    if weight.numel() < _FEWEST:
        return False
    first, end, gradients = _ONEDNN
    if end == 0 or torch.is_autocast_enabled("cpu"):
        # autocast makes a bf16 product of fp32 operands
        return False
    in_rows = x.stride(-1) == weight.stride(-1) == 1
    if not gradients and (not in_rows or wants_gradient(x, weight, bias)):
        return False
    if torch.compiler.is_compiling():
        # a condition on the number of rows would compile one program for each outcome
        return end == sys.maxsize and not exported() and not transformed()
    return is_ordinary(x, weight, bias) and first <= x.numel() // x.shape[-1] < end


# the processors whose bf16 products PyTorch gives to oneDNN
_HAS_BF16 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def _is_alone() -> bool:
    """Whether this is the only thread of Python's, beside those of progress bars."""
    me = threading.current_thread()
    others = (type(thread).__module__ for thread in threading.enumerate() if thread is not me)
    return all(module.startswith("tqdm.") for module in others)


def _takes_gemv(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether this is one row of bf16 for PyTorch's own product, which needs oneDNN switched off.

    The switch is the process's: another thread's products of many rows would take a hundred times
    as long meanwhile. So it is not touched where another thread may multiply.
    """
    return (
        _HAS_BF16
        and x.dtype == weight.dtype == torch.bfloat16
        and x.numel() == x.shape[-1]
        # of other layouts PyTorch's own code is ten times as slow
        and x.stride(-1) == weight.stride(-1) == 1
        and not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and is_ordinary(x, weight, bias)
        and _is_alone()
        and torch._C._get_mkldnn_enabled()
    )


def _gemv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    try:
        torch._C._set_mkldnn_enabled(False)
        return F.linear(x, weight, bias)
    finally:
        torch._C._set_mkldnn_enabled(True)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


@torch.library.custom_op("fastgpt2::onednn_linear", mutates_args=())
def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (N, C) @ weight (F, C)^T + bias (F,), fp32."""
    return _onednn(x, weight, bias)


@_onednn_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    dx_wanted, dweight_wanted, *_ = ctx.needs_input_grad
    # a frozen layer keeps nothing of its input
    ctx.save_for_backward(x if dweight_wanted else None, weight if dx_wanted else None)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx_wanted, dweight_wanted, dbias_wanted = ctx.needs_input_grad
    return (
        _onednn_linear(dy, weight.t(), None) if dx_wanted else None,
        _onednn_linear(dy.t(), x.t(), None) if dweight_wanted else None,
        dy.sum(0) if dbias_wanted else None,
    )


_onednn_linear.register_autograd(_backward, setup_context=_save)


def in_autocast_dtype(x: Tensor) -> Tensor:
    """x in the dtype in which autocast computes a product with it; x itself without autocast.

    An op with several products calls this once, so that its result has one dtype, the one that its
    fake implementation states. As in PyTorch's own products, fp64 stays fp64.
    """
    if autocasts(x.device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    op = "linear"
    checks.check_rows(op, "x", x)
    checks.check_layer(op, x, weight, bias)
    for name, given in (("weight", weight), ("bias", bias)):
        if given is None or given.dtype == x.dtype or autocasts(x.device):
            continue
        raise TypeError(f"{op}: {name} must be {x.dtype} like x, got {given.dtype}")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, as ``torch.nn.functional.linear``, by the faster library.

    Args:
        x: (..., C).
        weight: (F, C), in x's dtype.
        bias: (F,) or None, in x's dtype.

    Returns:
        (..., F), accumulated in fp32 or wider; zeros, or the bias, where C is 0.

    Raises:
        TypeError: an argument is not floating point, or not of x's dtype (under autocast,
            which has a dtype of its own, it may be).
        ValueError: weight or bias does not match x's shape or device.
    """
    _check(x, weight, bias)
    return unchecked_linear(x, weight, bias)


def unchecked_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear`` for an op that has already checked these arguments."""
    if _takes_gemv(x, weight, bias):
        return _gemv(x, weight, bias)
    if not _takes_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    # a call through the dispatcher's autograd costs half as much as one token's product
    product = _onednn_linear if wants_gradient(x, weight, bias) else _onednn
    out: Tensor = product(rows, weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def linear_and_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """gelu(x @ weight.T + bias) without a gradient: by oneDNN within the product.

    Args:
        x: (N, C).
        weight: (F, C), in x's dtype.
        bias: (F,) or None, in x's dtype.
        approximate: PyTorch's name of the form: ``tanh`` or ``none``.
    """
    if _takes_onednn(x, weight, bias):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], approximate)
        return out
    z = unchecked_linear(x, weight, bias)
    # in place: fresh memory for the result may take longer than its GELU
    in_place: Tensor = torch.ops.aten.gelu_(z, approximate=approximate)
    return in_place


def linear_and_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """residual + x @ weight.T + bias without a gradient: by oneDNN within the product.

    Args:
        x: (N, C).
        weight: (F, C), in x's dtype.
        bias: (F,) or None, in x's dtype.
        residual: (N, F), in x's dtype or a wider one, which the result has.
    """
    if residual.dtype == x.dtype and _takes_onednn(x, weight, bias):
        fused = torch.ops.mkldnn._linear_pointwise.binary
        out: Tensor = fused(x, residual, weight, bias, "add")
        return out
    return residual + unchecked_linear(x, weight, bias)


def matmul(a: Tensor, b: Tensor, *, into: Callable[[], Tensor] | None = None) -> Tensor:
    """a (M, K) @ b (K, N) with the library that ``linear`` takes, without a gradient.

    ``into`` gives a tensor of the result's shape, and is asked for it only if the library can put
    the result there.
    """
    if _takes_onednn(a, b.t()):
        return _onednn(a, b.t(), None)
    return torch.mm(a, b, out=None if into is None else into())
