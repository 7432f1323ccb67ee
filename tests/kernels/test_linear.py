"""A linear layer by either library: the same numbers, and which of them is asked."""

import importlib
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastgpt2.kernels import linear
from fastgpt2.kernels.linear import _onednn_linear, matmul
from tests.kernels import budget
from tests.kernels.layouts import LAYOUTS, lay_out
from tests.kernels.processors import ALWAYS, FEW, FORWARD, NEVER, Processor, give_onednn
from tests.tiny_gpt import gradients, tiny_batch, tiny_gpt

# the package exports the function under its module's name
op_module = importlib.import_module("fastgpt2.kernels.linear")

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
    reason="this build of PyTorch has no oneDNN",
)


@pytest.fixture(params=[True, False], ids=["onednn", "pytorch's choice"])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor is one on which fp32 products go to oneDNN."""
    give_onednn(monkeypatch, ALWAYS if request.param else NEVER)
    return bool(request.param)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the products that oneDNN was asked for."""
    shapes: list[tuple[int, ...]] = []
    asked = op_module._onednn

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shapes.append((x.shape[0], x.shape[1], weight.shape[0]))
        out: Tensor = asked(x, weight, bias)
        return out

    monkeypatch.setattr(op_module, "_onednn", counted)
    return shapes


def _op(impl: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return (linear if impl == "linear" else F.linear)(x, weight, bias)


def _inputs(*shape: int, C: int = 33, F: int = 20) -> dict[str, Tensor]:
    return {
        "x": torch.randn(*shape, C),
        "weight": torch.randn(F, C) / C**0.5,
        "bias": torch.randn(F),
    }


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(), (1,), (37,), (2, 3, 5)], ids=str)
def test_within_budget(onednn: bool, shape: tuple[int, ...], with_bias: bool) -> None:
    inputs = _inputs(*shape)
    if not with_bias:
        del inputs["bias"]
    budget.check_op(_op, inputs, impl="linear")


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["x", "weight"])
def test_any_layout(name: str, layout: str) -> None:
    inputs = _inputs(37)
    expected = F.linear(**inputs)
    inputs[name] = lay_out(inputs[name], layout)
    torch.testing.assert_close(linear(**inputs), expected)
    leaves = {key: x.requires_grad_() for key, x in inputs.items()}
    # an upstream gradient whose rows are one and the same memory
    dy = torch.randn(20).expand(37, 20)
    got = torch.autograd.grad(linear(**leaves), list(leaves.values()), dy)
    wanted = torch.autograd.grad(F.linear(**leaves), list(leaves.values()), dy)
    for pair in zip(got, wanted, strict=True):
        torch.testing.assert_close(*pair)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize(("rows", "C", "features"), [(0, 33, 20), (5, 0, 20), (5, 33, 0)])
def test_empty_products(rows: int, C: int, features: int) -> None:
    inputs = _inputs(rows, C=max(C, 1), F=features)
    inputs["x"], inputs["weight"] = inputs["x"][:, :C], inputs["weight"][:, :C]
    torch.compiler.reset()
    for op in (linear, torch.compile(linear, backend="eager")):
        assert torch.equal(op(**inputs), F.linear(**inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_pytorch_s(
    dtype: torch.dtype, calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    give_onednn(monkeypatch, ALWAYS)
    inputs = {name: x.to(dtype) for name, x in _inputs(5).items()}
    assert torch.equal(linear(**inputs), F.linear(**inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(**_inputs(5)).dtype == torch.bfloat16
    assert not calls


class _Odd(Tensor):
    """A subclass, such as torchao's quantised weights."""


def test_what_is_more_than_a_plain_call_is_pytorch_s(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operators of a subclass, of a mode and of a recorded program are PyTorch's own."""
    give_onednn(monkeypatch, ALWAYS)
    inputs = _inputs(5)
    plain = linear(**inputs)
    assert len(calls) == 1
    for name in inputs:
        odd = inputs | {name: inputs[name].as_subclass(_Odd)}
        torch.testing.assert_close(linear(**odd).as_subclass(Tensor), plain)
    traced = torch.jit.trace(lambda x: linear(x, inputs["weight"]), inputs["x"], check_trace=False)  # type: ignore[no-untyped-call]
    assert "_linear_pointwise" not in str(traced.graph)
    with FlopCounterMode(display=False):
        linear(**inputs)
    assert len(calls) == 1


def test_the_processor_decides(onednn: bool, calls: list[tuple[int, ...]]) -> None:
    inputs = _inputs(2, 5)
    with torch.no_grad():
        linear(**inputs)
        matmul(inputs["x"][0], inputs["weight"].t())
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    torch.autograd.backward(linear(**leaves).sum())
    # without a gradient, as a product alone, and forward, dx and dweight
    expected = [(10, 33, 20), (5, 33, 20), (10, 33, 20), (10, 20, 33), (20, 10, 33)]
    assert calls == (expected if onednn else [])


def test_only_wanted_gradients_are_computed(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    give_onednn(monkeypatch, ALWAYS)
    for wanted in ("x", "weight", "bias"):
        calls.clear()
        leaves = {name: x.requires_grad_(name == wanted) for name, x in _inputs(5).items()}
        torch.autograd.backward(linear(**leaves).sum())
        assert [name for name, x in leaves.items() if x.grad is not None] == [wanted]
        assert len(calls) == (1 if wanted == "bias" else 2)


@pytest.mark.usefixtures("onednn")
def test_matmul_into_a_buffer() -> None:
    a, b = torch.randn(7, 33), torch.randn(33, 20)
    torch.testing.assert_close(matmul(a, b), a @ b)
    torch.testing.assert_close(matmul(a, b, into=lambda: torch.empty(7, 20)), a @ b)
    torch.testing.assert_close(matmul(a.t(), a), a.t() @ a)


def test_a_buffer_is_made_only_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, made = torch.randn(7, 33), torch.randn(33, 20), []

    def buffer() -> Tensor:
        made.append(torch.empty(7, 20))
        return made[-1]

    give_onednn(monkeypatch, ALWAYS)
    matmul(a, b, into=buffer)
    assert not made
    give_onednn(monkeypatch, NEVER)
    assert matmul(a, b, into=buffer).data_ptr() == made[0].data_ptr()


def test_share_of_each_processor(processor: Processor) -> None:
    assert processor.onednn == op_module._ONEDNN


def test_processors_that_no_file_describes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, none = op_module._share_of_onednn, tmp_path / "none"
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for name, expected in (("", FEW), ("x86, AuthenticAMD", ALWAYS)):
        monkeypatch.setattr(op_module.platform, "processor", lambda name=name: name)
        assert read(none) == expected


def test_a_few_rows(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    give_onednn(monkeypatch, FEW)
    with torch.no_grad():
        for shape in ((3,), (4,), (64,), (65,), (2, 2), (8, 9), ()):
            linear(**_inputs(*shape))
    assert [rows for rows, _, _ in calls] == [4, 64, 4]


def test_small_weights_are_pytorch_s(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For them, a call of oneDNN takes longer than the product."""
    fewest = op_module._FEWEST
    give_onednn(monkeypatch, ALWAYS)
    monkeypatch.setattr(op_module, "_FEWEST", fewest)
    x, width = torch.randn(2, 512), fewest // 512
    with torch.no_grad():
        for features in (width - 1, width):
            linear(x, torch.randn(features, 512))
    assert calls == [(2, 512, width)]


def test_forward_only(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transposed operands are slow: neither they nor a layer that will have a gradient."""
    give_onednn(monkeypatch, FORWARD)
    x, weight, bias = _inputs(5).values()
    for compiled in (False, True):
        layer = torch.compile(linear, backend="eager", fullgraph=True) if compiled else linear
        layer(x, weight, bias)
        assert calls == [(5, 33, 20)]
        calls.clear()
        torch.autograd.backward(layer(x, weight.requires_grad_(), bias).sum())
        weight = weight.detach()
        layer(x, weight.t().contiguous().t())
        layer(x.t().contiguous().t(), weight)
        assert not calls
    matmul(x, weight.t())
    assert len(calls) == 1
    matmul(x.t(), x)
    matmul(x, weight.t().contiguous())
    assert len(calls) == 1


def test_a_model_trains_and_answers_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, Tensor]] = []
    idx, targets = tiny_batch()
    for share in (ALWAYS, FORWARD, NEVER):
        give_onednn(monkeypatch, share)
        model = tiny_gpt()
        found.append(gradients(model, idx, targets) | {"logits": model.logits(idx)})
    for name, expected in found.pop().items():
        for other in found:
            torch.testing.assert_close(other[name], expected)


@pytest.mark.usefixtures("onednn")
def test_contract_and_compile() -> None:
    inputs = _inputs(37)
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    torch.library.opcheck(_onednn_linear, (*leaves[:2], None))
    torch.library.opcheck(_onednn_linear, tuple(leaves))
    torch.compiler.reset()

    results = []
    for function in (linear, torch.compile(linear, fullgraph=True, backend="aot_eager")):
        y = function(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, y)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether oneDNN is on, at each product of PyTorch's; no other thread seems to run."""
    switched: list[bool] = []
    product = F.linear

    def seen(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        switched.append(torch._C._get_mkldnn_enabled())
        return product(x, weight, bias)

    monkeypatch.setattr(op_module, "_HAS_BF16", True)
    monkeypatch.setattr(op_module.threading, "enumerate", lambda: [threading.current_thread()])
    monkeypatch.setattr(op_module.F, "linear", seen)
    return switched


def _bf16(*shape: int) -> dict[str, Tensor]:
    return {name: x.bfloat16() for name, x in _inputs(*shape, C=300, F=70).items()}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_row_of_bf16_without_onednn(
    alone: list[bool], shape: tuple[int, ...], layout: str
) -> None:
    inputs = _bf16(*shape)
    exact = torch.matmul(inputs["x"].double(), inputs["weight"].double().t()) + inputs["bias"]
    inputs["weight"] = lay_out(inputs["weight"], layout)
    got = linear(**inputs)
    # sums in fp32, and one rounding
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-5)
    # PyTorch's own code wants adjacent columns
    assert alone == [layout != "rows with a stride"]
    assert torch._C._get_mkldnn_enabled()


def test_onednn_stays_on(alone: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """For several rows, other dtypes, a mode, and where another thread would notice."""
    linear(**_bf16(2))
    linear(**_inputs(1, C=4, F=3))
    with FlopCounterMode(display=False):
        linear(**_bf16(1))
    threads = [threading.current_thread(), threading.Thread()]
    monkeypatch.setattr(op_module.threading, "enumerate", lambda: threads)
    linear(**_bf16(1))
    assert alone == [True] * 4


def test_a_progress_bars_thread_does_not_multiply(
    alone: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tqdm import TMonitor, tqdm

    monitor = TMonitor(tqdm, 10)
    threads = [threading.current_thread(), monitor]
    monkeypatch.setattr(op_module.threading, "enumerate", lambda: threads)
    linear(**_bf16(1))
    monitor.exit()
    assert alone == [False]


def test_onednn_is_on_again_after_an_error(alone: list[bool]) -> None:
    inputs = _bf16(1)
    with pytest.raises(RuntimeError):
        op_module._gemv(inputs["x"], inputs["weight"][:, 1:], None)
    assert alone == [False]
    assert torch._C._get_mkldnn_enabled()


def test_onednn_stays_off_where_it_was_off(alone: list[bool]) -> None:
    torch._C._set_mkldnn_enabled(False)
    try:
        linear(**_bf16(1))
        assert not torch._C._get_mkldnn_enabled()
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert alone == [False]


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_what_follows_a_product_is_fused(with_bias: bool, approximate: str) -> None:
    x, weight, bias = _inputs(37).values()
    # GELUs of several units, too
    x = 4 * x
    given = bias if with_bias else None
    product = x.double() @ weight.double().t() + (bias.double() if with_bias else 0.0)
    residual = torch.randn(37, 20)
    got = op_module.linear_and_gelu(x, weight, given, approximate)
    wanted = F.gelu(product, approximate=approximate)
    torch.testing.assert_close(got.double(), wanted, atol=2e-5, rtol=1e-5)
    got = op_module.linear_and_add(x, weight, given, residual)
    torch.testing.assert_close(got.double(), residual + product, atol=2e-5, rtol=1e-5)
    # which is neither changed nor the result
    assert got.data_ptr() != residual.data_ptr()


def test_a_wide_residual_stays_wide() -> None:
    inputs = {name: x.bfloat16() for name, x in _inputs(5).items()}
    residual = torch.randn(5, 20) + 100
    out = op_module.linear_and_add(*inputs.values(), residual)
    assert out.dtype == torch.float32
    assert torch.equal(out, residual + F.linear(*inputs.values()))
