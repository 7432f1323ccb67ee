"""Cross-entropy: every implementation and option against fp64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.kernels import tuning
from fastgpt2.kernels.cross_entropy import _cross_entropy_fwd, cross_entropy
from fastgpt2.kernels.jit import cross_entropy as jit
from tests.kernels import budget
from tests.kernels.budget import DEVICE
from tests.kernels.graphs import assert_compiles_whole, assert_graph_replays
from tests.kernels.layouts import LAYOUTS, lay_out

IGNORE = -100
# (rows, columns, true columns)
SHAPES = budget.grid(
    [(1, 63, 63), (3, 304, 257), (33, 17, 16)],
    [(N, *columns) for N in budget.ROWS for columns in ((63, 63), (1600, 1531), (50304, 50257))],
)
OPTIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "both": {"label_smoothing": 0.2, "z_loss": 1e-2},
}


def _inputs(N: int, columns: int, vocab_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Logits as a model has them, every fourth target ignored."""
    targets = torch.randint(vocab_size, (N,), device=DEVICE)
    targets[1::4] = IGNORE
    return {"logits": (3 * torch.randn(N, columns, device=DEVICE)).to(dtype), "targets": targets}


def _op(vocab_size: int | None = None, **options: float) -> Callable[..., Tensor]:
    def op(impl: str, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets, vocab_size=vocab_size, impl=impl, **options)  # type: ignore[arg-type]

    return op


@pytest.mark.parametrize("dtype", budget.DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_budget(
    shape: tuple[int, int, int], options: dict[str, float], dtype: torch.dtype
) -> None:
    budget.check_op(_op(shape[2], **options), _inputs(*shape, dtype))


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_other_implementations_are_within_budget(options: dict[str, float], impl: str) -> None:
    # each is the other's measure
    eager = "reference" if impl == "torch" else "torch"
    inputs = _inputs(13, 72, 65, torch.float32)
    # autograd sums the reference's gradients of three terms, each of them rounded
    roundings = 4.0 if impl == "reference" else 2.0
    budget.check_op(_op(65, **options), inputs, impl=impl, eager=eager, roundings=roundings)


def test_reference_is_pytorch_s_in_fp64() -> None:
    inputs = _inputs(9, 40, 33, torch.float64)
    logits, targets = inputs["logits"], inputs["targets"]
    expected = torch.nn.functional.cross_entropy(logits[:, :33], targets, label_smoothing=0.1)
    actual = _op(33, label_smoothing=0.1)("reference", **inputs)
    torch.testing.assert_close(actual, expected)
    z = logits[targets != IGNORE][:, :33].logsumexp(-1).square().mean()
    with_z = _op(33, label_smoothing=0.1, z_loss=0.5)("reference", **inputs)
    torch.testing.assert_close(with_z, expected + 0.5 * z)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nothing_kept_gives_zero(options: dict[str, float], impl: str) -> None:
    logits = torch.randn(5, 40, device=DEVICE, requires_grad=True)
    targets = torch.full((5,), IGNORE, device=DEVICE)
    loss = _op(33, **options)(impl, logits, targets)
    assert loss.item() == 0.0
    (dlogits,) = torch.autograd.grad(loss, logits)
    assert not dlogits.any()


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_ignored_rows_and_padding_get_zero_gradients(impl: str) -> None:
    inputs = _inputs(9, 72, 65, torch.float32)
    logits = inputs["logits"].requires_grad_()
    loss = _op(65, **OPTIONS["both"])(impl, logits, inputs["targets"])
    (dlogits,) = torch.autograd.grad(loss, logits)
    assert not dlogits[:, 65:].any()
    ignored = inputs["targets"] == IGNORE
    assert not dlogits[ignored].any() and dlogits[~ignored][:, :65].all()


@pytest.mark.parametrize("V", [1, 127, 128, 129])
def test_padding_of_several_tiles(V: int) -> None:
    """The interpreter's tiles are of 128 columns: the last one with logits is not the last one."""
    inputs = _inputs(4, 500, V, torch.float32)
    budget.check_op(_op(V), inputs)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_padding_may_hold_anything(options: dict[str, float]) -> None:
    inputs = _inputs(5, 300, 257, torch.float32)
    expected = budget.run_with_gradients(_op(257, **options), "triton", inputs, [torch.ones(())])
    inputs["logits"][:, 257:] = math.nan
    inputs["logits"][inputs["targets"] == IGNORE] = math.nan
    actual = budget.run_with_gradients(_op(257, **options), "triton", inputs, [torch.ones(())])
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_large_logits_do_not_overflow(scale: float) -> None:
    inputs = _inputs(7, 300, 300, torch.float32)
    inputs["logits"] = scale * inputs["logits"].clamp(-1, 1)
    budget.check_op(_op(), inputs)


def test_logits_of_minus_infinity_are_excluded() -> None:
    inputs = _inputs(4, 300, 300, torch.float32)
    # the first tile whole, and single ones
    excluded = torch.arange(300, device=DEVICE) < 130
    excluded[200::7] = True
    inputs["targets"] = torch.tensor([131, 140, IGNORE, 198], device=DEVICE)
    inputs["logits"] = inputs["logits"].masked_fill(excluded, -math.inf)
    budget.check_op(_op(), inputs)


def test_targets_outside_the_vocabulary_give_nan() -> None:
    logits = torch.randn(2, 40, device=DEVICE)
    for wrong in (33, 40, 10**12, -1):
        targets = torch.tensor([3, wrong], device=DEVICE)
        assert cross_entropy(logits, targets, vocab_size=33, impl="triton").isnan()


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_any_shape_and_integer_dtype(impl: str) -> None:
    inputs = _inputs(12, 33, 33, torch.float32)
    expected = _op()("reference", **inputs)
    logits, targets = inputs["logits"].view(3, 4, 33), inputs["targets"].view(3, 4)
    for given in (targets, targets.int()):
        torch.testing.assert_close(cross_entropy(logits, given, impl=impl), expected)
    torch.testing.assert_close(
        cross_entropy(logits[0, 0], targets[0, 0], impl=impl),
        cross_entropy(logits[0, :1], targets[0, :1], impl="reference"),
    )
    ignoring_7 = cross_entropy(
        logits, targets.where(targets != IGNORE, 7), ignore_index=7, impl=impl
    )
    reference = cross_entropy(
        logits, targets.where(targets != 7, IGNORE), ignore_index=IGNORE, impl="reference"
    )
    torch.testing.assert_close(ignoring_7, reference)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_logits(layout: str) -> None:
    inputs = _inputs(6, 40, 40, torch.float32)
    logits, targets = inputs["logits"].view(2, 3, 40), inputs["targets"].view(2, 3)
    results = []
    for given in (logits, lay_out(logits, layout)):
        leaf = given.detach().requires_grad_()
        loss = cross_entropy(leaf, targets, impl="triton")
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_fp16_gradient_of_a_mean_survives_a_loss_scale() -> None:
    inputs = _inputs(64, 128, 128, torch.float16)
    logits = inputs["logits"].requires_grad_()
    loss = cross_entropy(logits, inputs["targets"], impl="triton")
    (dlogits,) = torch.autograd.grad(loss, logits, torch.tensor(2.0**16, device=DEVICE))
    wide = inputs["logits"].detach().double().requires_grad_()
    gold_loss = cross_entropy(wide, inputs["targets"], impl="reference")
    (gold,) = torch.autograd.grad(gold_loss, wide, torch.tensor(2.0**16, device=DEVICE).double())
    # 1 / count is of the size of fp16's smallest numbers: rounding it would cost 10 % and more
    torch.testing.assert_close(dlogits.double(), gold, rtol=2e-3, atol=1e-6)


def test_in_place_kernel_leaves_the_gradient_of_the_sum() -> None:
    inputs = _inputs(6, 300, 257, torch.float32)
    options = (IGNORE, 257, 0.1, 1e-2)
    around = torch.full((6, 320), 7.0, device=DEVICE)
    logits = around[:, :300].copy_(inputs["logits"])
    losses = jit.launch_in_place(logits, inputs["targets"], options, with_grad=False)
    assert torch.equal(logits, inputs["logits"])
    again = jit.launch_in_place(logits, inputs["targets"], options, with_grad=True)
    assert torch.equal(losses, again)
    assert torch.equal(losses, jit.launch_fwd(inputs["logits"], inputs["targets"], options)[0])
    wide = inputs["logits"].double().requires_grad_()
    mean = _op(257, label_smoothing=0.1, z_loss=1e-2)("reference", wide, inputs["targets"])
    count = (inputs["targets"] != IGNORE).sum()
    (gold,) = torch.autograd.grad(mean * count, wide)
    torch.testing.assert_close(logits.double(), gold, atol=1e-6, rtol=1e-5)
    assert (around[:, 300:] == 7.0).all()


def test_empty_batch() -> None:
    logits = torch.empty(0, 33, device=DEVICE, requires_grad=True)
    targets = torch.empty(0, dtype=torch.int64, device=DEVICE)
    loss = cross_entropy(logits, targets, impl="triton")
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, logits)[0].shape == (0, 33)


@pytest.mark.parametrize("op", ["cross_entropy_fwd", "cross_entropy_bwd"])
def test_every_config_is_within_budget(op: str) -> None:
    inputs = _inputs(3, 304, 257, torch.float32)
    for config in tuning.candidates(op):
        with tuning.overriding(op, config):
            budget.check_op(_op(257, **OPTIONS["both"]), inputs)


@budget.rehearsed
@pytest.mark.parametrize("dtype", budget.DTYPES, ids=str)
def test_same_bits_a_thousand_times(dtype: torch.dtype, full: bool) -> None:
    N, columns, V = (64, 50304, 50257) if full else (5, 304, 257)
    op = _op(V, **OPTIONS["both"])
    budget.assert_repeatable(op, _inputs(N, columns, V, dtype), times=1000 if full else 2)


@budget.rehearsed
def test_more_logits_than_int32_counts(full: bool) -> None:
    N, columns, vocab_size = (43008, 50304, 50257) if full else (9, 304, 257)
    assert not full or N * columns > 2**31
    logits = torch.randn(N, columns, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.randint(vocab_size, (N,), device=DEVICE)
    targets[:-4] = IGNORE
    logits.requires_grad_()
    loss = cross_entropy(logits, targets, vocab_size=vocab_size, impl="triton")
    (dlogits,) = torch.autograd.grad(loss, logits)
    last = logits.detach()[-4:].double().requires_grad_()
    gold = cross_entropy(last, targets[-4:], vocab_size=vocab_size, impl="reference")
    torch.testing.assert_close(loss.double(), gold, atol=1e-5, rtol=1e-5)
    (dgold,) = torch.autograd.grad(gold, last)
    torch.testing.assert_close(dlogits[-4:].double(), dgold, atol=1e-6, rtol=1e-2)
    assert not dlogits[0].any()


def test_opcheck() -> None:
    inputs = _inputs(5, 40, 33, torch.float32)
    leaf = inputs["logits"].requires_grad_()
    torch.library.opcheck(_cross_entropy_fwd, (leaf, inputs["targets"], IGNORE, 33, 0.1, 1e-2))


def test_compiles_whole_at_two_lengths() -> None:
    def step(logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets, vocab_size=33, z_loss=1e-2, impl="triton")

    assert_compiles_whole(step, [_inputs(N, 40, 33, torch.float32) for N in (4, 9)])


@budget.rehearsed
def test_captured_in_a_cuda_graph(full: bool) -> None:
    N, columns, V = (64, 50304, 50257) if full else (5, 304, 257)
    inputs = _inputs(N, columns, V, torch.bfloat16)
    logits = inputs["logits"].requires_grad_()

    def step() -> list[Tensor]:
        loss = cross_entropy(logits, inputs["targets"], vocab_size=V, impl="triton")
        return [loss, *torch.autograd.grad(loss, logits)]

    assert_graph_replays(step, [logits])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"targets": torch.zeros(3).long()},
            ValueError,
            r"targets must have shape \(2,\) to match",
        ),
        ({"targets": torch.zeros(2)}, TypeError, "targets must be int64 or int32"),
        ({"logits": torch.zeros(2, 8).long()}, TypeError, "logits must be floating point"),
        ({"logits": torch.tensor(1.0)}, ValueError, "logits must have a last dimension of 1"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "logits must have a last dimension of 1"),
        ({"vocab_size": 9}, ValueError, r"vocab_size must be in \[1, 8\], got 9"),
        ({"vocab_size": 0}, ValueError, r"vocab_size must be in \[1, 8\], got 0"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"z_loss": -0.1}, ValueError, "z_loss must be finite and not negative, got -0.1"),
        ({"z_loss": float("nan")}, ValueError, "z_loss must be finite and not negative, got nan"),
        ({"label_smoothing": float("nan")}, ValueError, r"label_smoothing must be in \[0, 1\)"),
        ({"logits": torch.zeros(2, 8, device="meta")}, ValueError, "targets must be on meta"),
        ({"impl": "cuda"}, ValueError, "impl must be one of auto, triton, torch, reference"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"logits": torch.zeros(2, 8), "targets": torch.zeros(2).long()}
    with pytest.raises(error, match=message):
        cross_entropy(**(arguments | change))
