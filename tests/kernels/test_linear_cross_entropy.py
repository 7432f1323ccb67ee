"""Head and loss as one op: every implementation and option against fp64, in one chunk and many."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.kernels.cross_entropy import cross_entropy
from fastgpt2.kernels.linear import matmul
from fastgpt2.kernels.linear_cross_entropy import linear_cross_entropy
from tests.kernels import budget
from tests.kernels.budget import DEVICE
from tests.kernels.graphs import assert_compiles_whole, assert_graph_replays

# the package exports the function under its module's name
op_module = importlib.import_module("fastgpt2.kernels.linear_cross_entropy")

IGNORE = -100
# (rows, width, columns, true columns)
SHAPES = budget.grid(
    [(1, 63, 40, 40), (37, 48, 160, 129)],
    [(N, C, 50304, 50257) for N in budget.ROWS for C in (768, 1600)],
)
OPTIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "both": {"label_smoothing": 0.2, "z_loss": 1e-2},
}
FAST = ("triton", "torch")


def _inputs(N: int, C: int, columns: int, vocab_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Logits of about 1, every fourth target ignored."""
    targets = torch.randint(vocab_size, (N,), device=DEVICE)
    targets[1::4] = IGNORE
    return {
        "x": torch.randn(N, C, device=DEVICE).to(dtype),
        "weight": (torch.randn(columns, C, device=DEVICE) / C**0.5).to(dtype),
        "targets": targets,
    }


def _op(vocab_size: int | None = None, **options: float) -> Callable[..., Tensor]:
    """The fused op; as ``eager``, the product and the loss one after the other."""

    def op(impl: str, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        if impl == "two steps":
            logits = x @ weight.to(x.dtype).T
            return cross_entropy(logits, targets, vocab_size=vocab_size, impl="torch", **options)  # type: ignore[arg-type]
        return linear_cross_entropy(
            x,
            weight,
            targets,
            vocab_size=vocab_size,
            impl=impl,
            **options,  # type: ignore[arg-type]
        )

    return op


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks of 8 rows in tiles of 3, the last ones short, for 20 rows of 32 columns."""
    monkeypatch.setattr(op_module, "TRITON_CHUNK_BYTES", 8 * 32 * 4)
    monkeypatch.setattr(op_module, "TORCH_CHUNK_BYTES", 8 * 32 * 4)
    monkeypatch.setattr(op_module, "_CPU_TILE_ELEMENTS", 3 * 32)
    monkeypatch.setattr(op_module, "_TILE_ROWS", 8)


@pytest.mark.parametrize("dtype", budget.dtype_grid(), ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", FAST)
def test_within_budget(
    impl: str, shape: tuple[int, int, int, int], options: dict[str, float], dtype: torch.dtype
) -> None:
    inputs = _inputs(*shape, dtype)
    budget.check_op(_op(shape[3], **options), inputs, impl=impl, eager="two steps")


def test_reference_is_the_two_ops() -> None:
    inputs = _inputs(7, 24, 40, 33, torch.float64)
    logits = inputs["x"] @ inputs["weight"].T
    expected = torch.nn.functional.cross_entropy(
        logits[:, :33], inputs["targets"], label_smoothing=0.1
    )
    actual = _op(33, label_smoothing=0.1)("reference", **inputs)
    torch.testing.assert_close(actual, expected)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", budget.dtype_grid(), ids=str)
@pytest.mark.parametrize("impl", FAST)
def test_several_chunks_are_within_budget(impl: str, dtype: torch.dtype) -> None:
    assert op_module._chunk_rows(20, 32, torch.float32, impl == "triton") == 8
    inputs = _inputs(20, 24, 32, 29, dtype)
    budget.check_op(_op(29, **OPTIONS["both"]), inputs, impl=impl, eager="two steps")


def test_weight_gradient_accumulates_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _inputs(2048, 8, 16, 16, torch.float16)
    inputs["targets"] = torch.zeros_like(inputs["targets"])
    # every row pushes the same way: in fp16 the sum, above 1024, could only grow by whole numbers
    inputs["x"] = inputs["x"].abs()
    monkeypatch.setattr(op_module, "TORCH_CHUNK_BYTES", 32)
    monkeypatch.setattr(op_module, "_TILE_ROWS", 1)
    weight = inputs["weight"].requires_grad_()
    loss = linear_cross_entropy(inputs["x"], weight, inputs["targets"], impl="torch")
    (dweight,) = torch.autograd.grad(loss, weight)
    wide = weight.detach().double().requires_grad_()
    gold = linear_cross_entropy(inputs["x"].double(), wide, inputs["targets"], impl="reference")
    torch.testing.assert_close(
        dweight.double(), torch.autograd.grad(gold, wide)[0], rtol=1.5e-3, atol=1e-4
    )


def test_chunks_are_few_and_even() -> None:
    rows = op_module._chunk_rows
    bf16, fp32 = torch.bfloat16, torch.float32
    # 16 thousand tokens of GPT-2 in bf16 make 1.6 GB of logits, 64 thousand 6.6 GB
    assert rows(16384, 50304, bf16, True) == 16384
    assert rows(65536, 50304, bf16, True) == 16384
    assert rows(65537, 50304, bf16, True) == 16512
    assert rows(65536, 50304, fp32, True) == 9472
    assert rows(4096, 50304, fp32, False) == 1024
    assert rows(0, 50304, fp32, True) == rows(1, 50304, fp32, True) == 1


@pytest.mark.parametrize("impl", [*FAST, "reference"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nothing_kept_gives_zero(options: dict[str, float], impl: str) -> None:
    inputs = _inputs(5, 24, 40, 33, torch.float32)
    inputs["targets"] = torch.full_like(inputs["targets"], IGNORE)
    found = budget.run_with_gradients(_op(33, **options), impl, inputs, [torch.ones(())])
    assert not any(value.any() for value in found.values())


@pytest.mark.parametrize("impl", FAST)
def test_padded_rows_of_the_head_get_no_gradient(impl: str) -> None:
    inputs = _inputs(9, 24, 40, 33, torch.float32)
    found = budget.run_with_gradients(
        _op(33, **OPTIONS["both"]), impl, inputs, [torch.ones((), device=DEVICE)]
    )
    assert not found["dweight"][33:].any() and found["dweight"][:33].any(dim=1).all()
    assert not found["dx"][inputs["targets"] == IGNORE].any()


@pytest.mark.parametrize("impl", FAST)
def test_fp16_gradients_survive_a_loss_scale(impl: str) -> None:
    inputs = _inputs(64, 8, 512, 512, torch.float16)
    # so confident a model that most probabilities are small
    inputs["weight"] *= 3
    scale = torch.tensor(2.0**12, device=DEVICE)
    found = budget.run_with_gradients(_op(), impl, inputs, [scale])
    wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    gold = budget.run_with_gradients(_op(), "reference", wide, [scale.double()])
    # the gradient of the mean, before the scale, has much of itself below fp16's 6e-8
    for name in ("dx", "dweight"):
        error = (found[name].double() - gold[name]).norm() / gold[name].norm()
        assert error < 2e-3, f"{name}: relative error {error:.2g}"


@pytest.mark.parametrize("impl", FAST)
def test_only_wanted_gradients_are_computed(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _inputs(9, 24, 40, 40, torch.float32)
    both = budget.run_with_gradients(_op(), impl, inputs, [torch.ones((), device=DEVICE)])
    products = 0

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal products
        products += 1
        return matmul(*args, **kwargs)

    monkeypatch.setattr(op_module, "matmul", counted)
    for wanted in ((), ("x",), ("weight",), ("x", "weight")):
        products = 0
        leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in inputs.items()}
        loss = _op()(impl, **leaves)
        assert torch.equal(loss, both["y0"])
        assert loss.requires_grad == bool(wanted)
        assert products == 1 + len(wanted)
        for name in wanted:
            (got,) = torch.autograd.grad(loss, leaves[name], retain_graph=True)
            assert torch.equal(got, both[f"d{name}"])
    with torch.no_grad():
        products = 0
        _op()(impl, **leaves)
        assert products == 1


@pytest.mark.parametrize("impl", FAST)
def test_fp32_weight_with_a_short_x_keeps_its_gradient_in_fp32(impl: str) -> None:
    inputs = _inputs(33, 24, 40, 33, torch.float16)
    inputs["weight"] = inputs["weight"].float()
    found = budget.run_with_gradients(_op(33), impl, inputs, [torch.ones((), device=DEVICE)])
    assert found["dx"].dtype == torch.float16 and found["dweight"].dtype == torch.float32
    wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    gold = budget.run_with_gradients(_op(33), "reference", wide, [torch.ones(()).double()])
    torch.testing.assert_close(found["dweight"].double(), gold["dweight"], rtol=2e-3, atol=2e-5)
    # it has never been fp16
    assert not torch.equal(found["dweight"].half().float(), found["dweight"])


def test_backward_twice_gives_the_same() -> None:
    inputs = _inputs(9, 24, 40, 33, torch.float32)
    leaves = {n: t.requires_grad_(t.is_floating_point()) for n, t in inputs.items()}
    loss = _op()("triton", **leaves)
    wanted = [leaves["x"], leaves["weight"]]
    once = torch.autograd.grad(loss, wanted, retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, wanted)
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("impl", [*FAST, "reference"])
def test_any_shape_and_integer_dtype(impl: str) -> None:
    inputs = _inputs(12, 24, 40, 40, torch.float32)
    expected = _op()("reference", **inputs)
    x, targets = inputs["x"].view(3, 4, 24), inputs["targets"].view(3, 4)
    spread = torch.cat([x, x], -1)[..., :24]
    for given_x, given in ((x, targets), (x, targets.int()), (spread, targets.T.contiguous().T)):
        got = linear_cross_entropy(given_x, inputs["weight"], given, impl=impl)
        torch.testing.assert_close(got, expected)
    moved = targets.where(targets != IGNORE, 7)
    got = linear_cross_entropy(x, inputs["weight"], moved, ignore_index=7, impl=impl)
    also = targets.where(targets != 7, IGNORE)
    torch.testing.assert_close(
        got, linear_cross_entropy(x, inputs["weight"], also, impl="reference")
    )


@pytest.mark.parametrize("impl", FAST)
def test_empty_batch(impl: str) -> None:
    inputs = _inputs(0, 24, 40, 33, torch.float32)
    found = budget.run_with_gradients(_op(33), impl, inputs, [torch.ones((), device=DEVICE)])
    assert found["y0"].item() == 0.0
    assert found["dx"].shape == (0, 24)
    assert found["dweight"].shape == (40, 24) and not found["dweight"].any()


@budget.rehearsed
@pytest.mark.usefixtures("small_chunks")
def test_same_bits_a_thousand_times(full: bool) -> None:
    N, C, columns, V = (1024, 768, 50304, 50257) if full else (20, 24, 32, 29)
    inputs = _inputs(N, C, columns, V, budget.HALF)
    op = _op(V, **OPTIONS["both"])
    budget.assert_repeatable(op, inputs, times=1000 if full else 2)


@budget.rehearsed
def test_more_logits_than_int32_counts(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    N, C, columns, V = (43008, 64, 50304, 50257) if full else (300, 16, 48, 41)
    assert not full or N * columns > 2**31
    inputs = _inputs(N, C, columns, V, budget.HALF)
    results = []
    for chunks in (1, 8):
        size = -(-N * columns * budget.HALF.itemsize // chunks)
        monkeypatch.setattr(op_module, "TRITON_CHUNK_BYTES", size)
        assert (op_module._chunk_rows(N, columns, budget.HALF, True) < N) == (chunks > 1)
        # the gradient of the sum: that of the mean over so many rows is below every tolerance
        results.append(budget.run_with_gradients(_op(V), "triton", inputs, [torch.tensor(1.0 * N)]))
    for name, value in results[0].items():
        difference = (value - results[1][name]).float().norm() / value.float().norm()
        assert difference < 1e-2, name


@pytest.mark.parametrize("impl", FAST)
def test_opcheck(impl: str) -> None:
    inputs = _inputs(5, 24, 40, 33, torch.float32)
    x, weight = (inputs[n].requires_grad_() for n in ("x", "weight"))
    flags = (True, True, impl == "triton", False)
    arguments = (x, weight, inputs["targets"], IGNORE, 33, 0.1, 1e-2, *flags)
    for anchor in (None, op_module._anchor(x, weight)):
        torch.library.opcheck(op_module._linear_cross_entropy_fwd, (*arguments, anchor))


@pytest.mark.parametrize("impl", FAST)
def test_compiles_whole_at_two_lengths(impl: str) -> None:
    def step(**inputs: Tensor) -> Tensor:
        return _op(33)(impl, **inputs)

    assert_compiles_whole(step, [_inputs(N, 24, 40, 33, torch.float32) for N in (4, 9)])


@budget.rehearsed
def test_captured_in_a_cuda_graph(full: bool) -> None:
    N, C, columns, V = (256, 768, 50304, 50257) if full else (9, 24, 40, 33)
    inputs = _inputs(N, C, columns, V, budget.HALF)
    leaves = {n: t.requires_grad_(t.is_floating_point()) for n, t in inputs.items()}
    wanted = [leaves["x"], leaves["weight"]]

    def step() -> list[Tensor]:
        loss = _op(V)("triton", **leaves)
        return [loss, *torch.autograd.grad(loss, wanted)]

    assert_graph_replays(step, wanted)


@pytest.mark.parametrize("impl", FAST)
def test_a_gradient_of_the_gradient_is_refused(impl: str) -> None:
    inputs = _inputs(9, 24, 40, 40, torch.float32)
    leaves = {n: t.clone().requires_grad_(n != "targets") for n, t in inputs.items()}
    loss = _op()(impl, **leaves)
    (dx,) = torch.autograd.grad(loss, leaves["x"], create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"double backward is not supported \(create_graph=True\)"
    ):
        torch.autograd.grad(dx.square().sum(), leaves["weight"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"targets": torch.zeros(3).long()},
            ValueError,
            r"targets must have shape \(2,\) to match",
        ),
        ({"targets": torch.zeros(2)}, TypeError, "targets must be int64 or int32"),
        ({"x": torch.zeros(2, 8).long()}, TypeError, "x must be floating point"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have a last dimension of 1 or more"),
        ({"x": torch.zeros(2, 0)}, ValueError, "x must have a last dimension of 1 or more"),
        ({"weight": torch.zeros(9, 8).long()}, TypeError, "weight must be floating point"),
        ({"weight": torch.zeros(8)}, ValueError, r"weight must be \(V, C\), got shape \(8,\)"),
        ({"weight": torch.zeros(9, 7)}, ValueError, r"weight must have shape \(9, 8\) to match x"),
        ({"weight": torch.zeros(9, 8, device="meta")}, ValueError, "weight must be on cpu"),
        ({"targets": torch.zeros(2, device="meta").long()}, ValueError, "targets must be on cpu"),
        ({"vocab_size": 10}, ValueError, r"vocab_size must be in \[1, 9\], got 10"),
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\), got -0.1"),
        ({"z_loss": -0.1}, ValueError, "z_loss must be finite and not negative, got -0.1"),
        ({"z_loss": float("nan")}, ValueError, "z_loss must be finite and not negative, got nan"),
        ({"label_smoothing": float("nan")}, ValueError, r"label_smoothing must be in \[0, 1\)"),
        ({"impl": "cuda"}, ValueError, "impl must be one of auto, triton, torch, reference"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 8),
        "weight": torch.zeros(9, 8),
        "targets": torch.zeros(2).long(),
    }
    with pytest.raises(error, match=message):
        linear_cross_entropy(**(arguments | change))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gradient_is_scaled_some_rows_at_a_time(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op_module, "_CPU_TILE_ELEMENTS", 3 * 16 + 5)
    dweight, scale = torch.randn(10, 16).bfloat16(), torch.tensor(0.3)
    found = op_module._scaled(dweight, scale, dtype)
    assert torch.equal(found, (dweight.float() * scale).to(dtype))
