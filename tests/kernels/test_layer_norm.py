"""LayerNorm and the residual addition fused with it: every implementation against fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.kernels import philox, tuning
from fastgpt2.kernels.layer_norm import _layer_norm_fwd, add_layer_norm, layer_norm
from tests.kernels import budget
from tests.kernels.budget import DEVICE
from tests.kernels.graphs import assert_compiles_whole, assert_graph_replays
from tests.kernels.layouts import LAYOUTS, lay_out

# (rows, width): one of each kind here, all of them on a GPU
SHAPES = budget.grid(
    [(1, 63), (3, 768), (129, 1), (9, 1600)],
    [(N, C) for N in budget.ROWS for C in (*budget.WIDTHS, 4096)],
)
SEED = 2**40 + 7


def _inputs(N: int, C: int, dtype: torch.dtype, *, offset: float = 0.5) -> dict[str, Tensor]:
    """Rows away from zero, and a gamma and beta that no kernel can ignore."""
    return {
        "x": (torch.randn(N, C, device=DEVICE) + offset).to(dtype),
        "weight": torch.randn(C, device=DEVICE).to(dtype),
        "bias": torch.randn(C, device=DEVICE).to(dtype),
    }


def _fused_inputs(
    N: int, C: int, dtype: torch.dtype, stream: torch.dtype | None = None
) -> dict[str, Tensor]:
    inputs = _inputs(N, C, dtype)
    return inputs | {
        "x": inputs["x"].to(stream or dtype),
        "branch": torch.randn(N, C, device=DEVICE).to(dtype),
        "branch_bias": torch.randn(C, device=DEVICE).to(dtype),
    }


def _norm(impl: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return layer_norm(x, weight, bias, impl=impl)


def _fused(dropout_p: float = 0.0) -> Callable[..., tuple[Tensor, Tensor]]:
    def op(
        impl: str,
        x: Tensor,
        branch: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        branch_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return add_layer_norm(
            x,
            branch,
            weight,
            bias,
            branch_bias=branch_bias,
            dropout_p=dropout_p,
            seed=SEED,
            impl=impl,
        )

    return op


def _without(inputs: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: x for name, x in inputs.items() if name not in names}


@pytest.mark.parametrize("dtype", budget.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_is_within_budget(shape: tuple[int, int], dtype: torch.dtype) -> None:
    budget.check_op(_norm, _inputs(*shape, dtype))


@pytest.mark.parametrize("dtype", budget.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_is_within_budget(shape: tuple[int, int], dtype: torch.dtype) -> None:
    budget.check_op(_fused(), _fused_inputs(*shape, dtype))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_other_implementations_are_within_budget(impl: str) -> None:
    # in fp32 each is the other's measure
    eager = "reference" if impl == "torch" else "torch"
    budget.check_op(_norm, _inputs(17, 96, torch.float32), impl=impl, eager=eager)
    for p in (0.0, 0.3):
        inputs = _fused_inputs(17, 96, torch.float32)
        budget.check_op(_fused(p), inputs, impl=impl, eager=eager)


def test_reference_matches_its_formula_in_fp64() -> None:
    inputs = {name: x.double() for name, x in _inputs(5, 33, torch.float32).items()}
    x = inputs["x"]
    expected = torch.nn.functional.layer_norm(x, (33,), inputs["weight"], inputs["bias"])
    torch.testing.assert_close(_norm("reference", **inputs), expected)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_fp32_stream_with_a_short_branch(impl: str, p: float) -> None:
    budget.check_op(_fused(p), _fused_inputs(13, 96, torch.float16, torch.float32), impl=impl)


@pytest.mark.parametrize("dtype", budget.DTYPES, ids=str)
def test_fused_with_dropout_is_within_budget(dtype: torch.dtype) -> None:
    # more blocks of rows than programs, so that each walks over several
    budget.check_op(_fused(0.2), _fused_inputs(131, 63, dtype))


@pytest.mark.parametrize("missing", [("bias",), ("branch_bias",), ("bias", "branch_bias")])
def test_biases_are_optional(missing: tuple[str, ...]) -> None:
    inputs = _without(_fused_inputs(6, 40, torch.float32), *missing)
    budget.check_op(_fused(0.1), inputs)
    budget.check_op(_norm, _without(_inputs(6, 40, torch.float32), "bias"))


def test_far_mean_keeps_its_precision() -> None:
    budget.check_op(_norm, _inputs(5, 768, torch.float32, offset=1e3))


def test_parameters_keep_their_own_dtype() -> None:
    inputs = _fused_inputs(7, 64, torch.float16)
    for name in ("weight", "bias", "branch_bias"):
        inputs[name] = inputs[name].float()
    # eager CPU takes no mixture: hold against the reference, whose gradients are cast alike
    budget.check_op(_fused(), inputs, eager="reference")


def test_stream_and_mask_are_the_reference_s_bit_for_bit() -> None:
    inputs = _fused_inputs(33, 65, torch.float16)
    inputs["x"].zero_()
    streams = [_fused(0.4)(impl, **inputs)[0] for impl in ("triton", "reference", "torch")]
    assert torch.equal(streams[0], streams[1])
    keep = philox.keep_mask(torch.tensor(SEED, device=DEVICE), (33, 65), 0.4)
    for stream in streams:
        assert torch.equal(stream != 0, keep)


def test_norm_is_of_the_rounded_stream() -> None:
    inputs = _fused_inputs(9, 64, torch.float16)
    # so large a stream that rounding it moves the norm by far more than the norm's own rounding
    inputs["x"] = (torch.randn(9, 1, device=DEVICE) * 500).to(torch.float16).expand(9, 64)
    stream, y = _fused()("triton", **inputs)
    expected = _norm("reference", stream.double(), inputs["weight"], inputs["bias"])
    torch.testing.assert_close(y.double(), expected, atol=4e-3, rtol=2e-3)


def test_rows_of_different_strides() -> None:
    inputs = _fused_inputs(6, 40, torch.float32)
    expected = _fused()("triton", **inputs)
    inputs["branch"] = lay_out(inputs["branch"], "rows with a stride")
    for a, b in zip(_fused()("triton", **inputs), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [1, 8])
def test_results_do_not_depend_on_tiles(rows: int) -> None:
    """Neither dropout's offsets, nor where the rows of a program end."""
    inputs = _fused_inputs(19, 48, torch.float32)
    expected = _fused(0.5)("triton", **inputs)
    with tuning.overriding("layer_norm_fwd", tuning.config(4, 1, BLOCK_N=rows)):
        found = _fused(0.5)("triton", **inputs)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_seed_none_draws_a_fresh_mask() -> None:
    x = torch.zeros(64, 64, device=DEVICE)
    weight = torch.ones(64, device=DEVICE)
    streams = [
        add_layer_norm(x, x + 1, weight, None, dropout_p=0.5, impl="triton")[0] for _ in range(2)
    ]
    assert not torch.equal(*streams)
    assert 0.4 < float((streams[0] == 0).float().mean()) < 0.6


@pytest.mark.parametrize("used", [0, 1], ids=["stream", "norm"])
def test_only_one_output_used(used: int) -> None:
    inputs = _fused_inputs(5, 32, torch.float32)
    results = []
    for impl in ("triton", "reference"):
        leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
        torch.autograd.backward(_fused()(impl, **leaves)[used].square().sum())
        results.append([torch.zeros_like(x) if x.grad is None else x.grad for x in leaves.values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs_and_gradients(layout: str) -> None:
    inputs = _fused_inputs(6, 40, torch.float32)
    inputs |= {n: inputs[n].view(2, 3, 40) for n in ("x", "branch")}
    inputs |= {n: lay_out(inputs[n], "columns with a stride") for n in ("weight", "bias")}
    dys = [torch.randn(2, 3, 40, device=DEVICE) for _ in range(2)]
    results = []
    for laid_out in (torch.Tensor.contiguous, lambda x: lay_out(x, layout)):
        given = inputs | {n: laid_out(inputs[n]) for n in ("x", "branch")}
        leaves = {n: x.detach().requires_grad_() for n, x in given.items()}
        outputs = _fused()("triton", **leaves)
        upstream = [laid_out(dy) for dy in dys]
        results.append([*outputs, *torch.autograd.grad(outputs, list(leaves.values()), upstream)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_expanded_upstream_gradient() -> None:
    inputs = {n: x.requires_grad_() for n, x in _inputs(4, 24, torch.float32).items()}
    torch.autograd.backward(_norm("triton", **inputs).sum())
    # with an all-ones dy the gradient of bias is the number of rows
    assert inputs["bias"].grad is not None
    assert torch.equal(inputs["bias"].grad, torch.full((24,), 4.0, device=DEVICE))


def test_any_number_of_dimensions() -> None:
    inputs = _inputs(12, 16, torch.float32)
    flat = _norm("triton", **inputs)
    for shape in ((16,), (2, 6, 16), (2, 1, 3, 2, 16)):
        x = inputs["x"][: 1 if len(shape) == 1 else 12].reshape(shape)
        y = layer_norm(x, inputs["weight"], inputs["bias"], impl="triton")
        assert torch.equal(y.reshape(-1, 16), flat[: y.numel() // 16])


def test_empty_batch() -> None:
    leaves = {n: x.requires_grad_() for n, x in _fused_inputs(0, 32, torch.float32).items()}
    stream, y = _fused(0.1)("triton", **leaves)
    assert stream.shape == y.shape == (0, 32)
    gradients = torch.autograd.grad((stream, y), list(leaves.values()), (stream, y))
    for x, g in zip(leaves.values(), gradients, strict=True):
        assert g.shape == x.shape and not g.any()


@budget.rehearsed
@pytest.mark.parametrize("dtype", budget.DTYPES, ids=str)
def test_same_bits_a_thousand_times(dtype: torch.dtype, full: bool) -> None:
    shape = (1023, 768) if full else (33, 72)
    inputs = _fused_inputs(*shape, dtype)
    budget.assert_repeatable(_fused(0.3), inputs, times=1000 if full else 2)


def _integers(N: int, C: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Small integers: sums over rows are exact whatever the tiles, so they must be equal."""
    inputs = _fused_inputs(N, C, dtype)
    return {n: torch.randint_like(x, -3, 4) for n, x in inputs.items()}


@pytest.mark.parametrize("C", budget.grid([96], [768, 1600]))
def test_every_config_sums_alike(C: int) -> None:
    inputs = {n: x.requires_grad_() for n, x in _integers(37, C, torch.float32).items()}
    dy = torch.randint(-3, 4, (37, C), device=DEVICE).float()
    names = [n for n in ("bias", "branch_bias")]
    for op in ("layer_norm_fwd", "layer_norm_bwd", "column_sum"):
        for config in tuning.candidates(op, C=C, dropout=0):
            with tuning.overriding(op, config):
                stream, y = _fused()("triton", **inputs)
                dbias, dbranch_bias = torch.autograd.grad(
                    (stream, y), [inputs[n] for n in names], (dy, dy)
                )
            assert torch.equal(stream, inputs["x"] + inputs["branch"] + inputs["branch_bias"])
            assert torch.equal(dbias, dy.sum(0))
            # LayerNorm's own gradient has rows that sum to zero, so this sum is not exact
            torch.testing.assert_close(dbranch_bias.sum(), dy.sum(), atol=1e-2, rtol=1e-4)


def test_second_derivatives_raise() -> None:
    inputs = {n: x.requires_grad_() for n, x in _inputs(4, 24, torch.float32).items()}
    y = _norm("triton", **inputs)
    (dx,) = torch.autograd.grad(y.square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(dx.square().sum(), inputs["x"])


def test_opcheck() -> None:
    inputs = _fused_inputs(5, 24, torch.float32)
    for p in (0.0, 0.2):
        leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
        seed = torch.tensor(SEED, device=DEVICE) if p else None
        vectors = leaves["weight"], leaves["bias"], leaves["branch_bias"]
        torch.library.opcheck(
            _layer_norm_fwd, (leaves["x"], leaves["branch"], *vectors, seed, p, 1e-5)
        )
    x, weight = leaves["x"], leaves["weight"]
    torch.library.opcheck(_layer_norm_fwd, (x, None, weight, None, None, None, 0.0, 1e-5))


def test_compiles_whole_at_two_lengths() -> None:
    def step(weight: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        stream, y = _fused(0.2)("triton", weight=weight, **inputs)
        return stream, layer_norm(y, weight, None, impl="triton")

    assert_compiles_whole(step, [_fused_inputs(N, 24, torch.float32) for N in (4, 9)])


@budget.rehearsed
def test_captured_in_a_cuda_graph(full: bool) -> None:
    shape = (257, 768) if full else (9, 72)
    inputs = {n: x.requires_grad_() for n, x in _fused_inputs(*shape, torch.bfloat16).items()}
    leaves = list(inputs.values())

    def step() -> list[Tensor]:
        stream, y = _fused()("triton", **inputs)
        return [stream, y, *torch.autograd.grad((stream, y), leaves, (stream, y))]

    assert_graph_replays(step, leaves)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.ones(5)}, ValueError, r"weight must have shape \(8,\) to match x"),
        ({"bias": torch.ones(5)}, ValueError, r"bias must have shape \(8,\) to match x"),
        ({"branch_bias": torch.ones(5)}, ValueError, r"branch_bias must have shape \(8,\)"),
        ({"branch": torch.ones(3, 8)}, ValueError, r"branch must have shape \(2, 8\) to match x"),
        ({"branch": torch.ones(2, 8).long()}, TypeError, "branch must be floating point"),
        ({"x": torch.ones(2, 8).long()}, TypeError, "x must be floating point, got torch.int64"),
        ({"x": 3.0}, TypeError, "x must be a tensor, got float"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have a last dimension of 1 or more"),
        ({"x": torch.ones(2, 0)}, ValueError, r"1 or more, got shape \(2, 0\)"),
        ({"weight": torch.ones(8).long()}, TypeError, "weight must be floating point"),
        ({"bias": torch.ones(8).long()}, TypeError, "bias must be floating point"),
        ({"bias": torch.ones(8, device="meta")}, ValueError, "bias must be on cpu, got meta"),
        ({"branch_bias": torch.ones(8, device="meta")}, ValueError, "branch_bias must be on cpu"),
        ({"branch": torch.ones(2, 8, device="meta")}, ValueError, "branch must be on cpu"),
        ({"weight": torch.ones(8, device="meta")}, ValueError, "weight must be on cpu, got meta"),
        ({"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"impl": "cuda"}, ValueError, "impl must be one of auto, triton, torch, reference"),
        ({"impl": ["triton"]}, ValueError, "impl must be one of auto, triton, torch, reference"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.ones(2, 8),
        "branch": torch.ones(2, 8),
        "weight": torch.ones(8),
        "bias": torch.ones(8),
        "branch_bias": torch.ones(8),
    }
    with pytest.raises(error, match=message):
        add_layer_norm(**(arguments | change))
    own = {"x", "weight", "bias", "eps", "impl"}
    if own & set(change):
        plain = {n: v for n, v in (arguments | change).items() if n in own}
        with pytest.raises(error, match=message):
            layer_norm(**plain)


def test_fp64_is_refused_by_triton() -> None:
    with pytest.raises(RuntimeError, match="the kernels take fp32, fp16 and bf16"):
        _norm("triton", **{n: x.double() for n, x in _inputs(2, 8, torch.float32).items()})
