"""Token plus position embedding: every implementation against fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.kernels import linear_cross_entropy, philox, tuning
from fastgpt2.kernels.embedding import (
    _embedding_bwd,
    _embedding_fwd,
    embedding,
    tied_embedding,
)
from tests.kernels import budget
from tests.kernels.budget import DEVICE
from tests.kernels.graphs import assert_compiles_whole, assert_graph_replays

SEED = 2**40 + 7
# (rows, tokens a row, width)
SHAPES = budget.grid(
    [(1, 1, 63), (2, 17, 80), (3, 5, 1)],
    [(B, T, C) for B, T in ((1, 1023), (5, 127), (64, 1024)) for C in budget.WIDTHS],
)


def _inputs(
    B: int, T: int, C: int, dtype: torch.dtype, *, V: int = 37, block_size: int | None = None
) -> dict[str, Tensor]:
    """Few ids, so that most occur several times, and some not at all."""
    idx = torch.randint(V - 1, (B, T), device=DEVICE)
    return {
        "idx": idx.where(idx != V // 2, 0),
        "wte": torch.randn(V, C, device=DEVICE).to(dtype),
        "wpe": torch.randn(block_size or T + 3, C, device=DEVICE).to(dtype),
    }


def _op(**options: Any) -> Callable[..., Tensor]:
    def op(
        impl: str, idx: Tensor, wte: Tensor, wpe: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        given = options
        if impl == "reference" and wte.dtype == torch.float64:
            given = options | {"dtype": torch.float64}
        return embedding(idx, wte, wpe, positions=positions, impl=impl, **given)

    return op


@pytest.mark.parametrize("dtype", budget.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_budget(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    budget.check_op(_op(), _inputs(*shape, dtype))


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_other_implementations_are_within_budget(p: float, impl: str) -> None:
    # each is the other's measure
    eager = "reference" if impl == "torch" else "torch"
    inputs = _inputs(3, 17, 40, torch.float32)
    budget.check_op(_op(dropout_p=p, seed=SEED), inputs, impl=impl, eager=eager)


def test_reference_is_the_sum_of_two_rows() -> None:
    inputs = _inputs(2, 3, 8, torch.float64)
    x = _op()("reference", **inputs)
    for b in range(2):
        for t in range(3):
            assert torch.equal(x[b, t], inputs["wte"][inputs["idx"][b, t]] + inputs["wpe"][t])


@pytest.mark.parametrize("dtype", budget.DTYPES, ids=str)
def test_dropout_is_within_budget(dtype: torch.dtype) -> None:
    budget.check_op(_op(dropout_p=0.3, seed=SEED), _inputs(3, 17, 70, dtype))


def test_mask_is_the_reference_s_bit_for_bit() -> None:
    inputs = _inputs(2, 9, 65, torch.float32)
    keep = philox.keep_mask(torch.tensor(SEED, device=DEVICE), (2, 9, 65), 0.4)
    for impl in ("triton", "reference", "torch"):
        assert torch.equal(_op(dropout_p=0.4, seed=SEED)(impl, **inputs) != 0, keep)


def test_seed_none_draws_a_fresh_mask() -> None:
    inputs = _inputs(2, 30, 64, torch.float32)
    first, second = (_op(dropout_p=0.5)("triton", **inputs) for _ in range(2))
    assert not torch.equal(first, second)
    assert 0.4 < float((first == 0).float().mean()) < 0.6


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_positions_of_a_row_and_of_each(p: float, impl: str) -> None:
    inputs = _inputs(3, 7, 40, torch.float32)
    for shape in ((7,), (3, 7)):
        given = inputs | {"positions": torch.randint(10, shape, device=DEVICE)}
        budget.check_op(_op(dropout_p=p, seed=SEED), given, impl=impl)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize(
    ("tables", "dtype"),
    [(torch.float32, torch.float16), (torch.float16, torch.float32)],
    ids=["rounds", "keeps"],
)
def test_result_in_another_dtype(tables: torch.dtype, dtype: torch.dtype, impl: str) -> None:
    inputs = _inputs(2, 17, 40, tables)
    budget.check_op(_op(dtype=dtype), inputs, impl=impl, eager="reference")
    assert _op(dtype=dtype)(impl, **inputs).dtype == dtype


def test_counting_positions_are_given_ones() -> None:
    inputs = _inputs(3, 7, 40, torch.float32)
    given = inputs | {"positions": torch.arange(7, device=DEVICE)}
    upstream = [torch.randn(3, 7, 40, device=DEVICE)]
    expected = budget.run_with_gradients(_op(), "triton", inputs, upstream)
    for name, value in budget.run_with_gradients(_op(), "triton", given, upstream).items():
        assert torch.equal(value, expected[name]), name


def test_rows_that_do_not_occur_get_zero_gradients() -> None:
    inputs = _inputs(2, 5, 24, torch.float32)
    upstream = [torch.ones(2, 5, 24, device=DEVICE)]
    found = budget.run_with_gradients(_op(), "triton", inputs, upstream)
    counts = torch.bincount(inputs["idx"].flatten(), minlength=37)
    assert torch.equal(found["dwte"], counts[:, None].expand(37, 24).float())
    assert (found["dwpe"][:5] == 2.0).all() and not found["dwpe"][5:].any()


def test_a_frequent_token_is_summed_in_fp32() -> None:
    inputs = _inputs(2, 600, 3, torch.float16)
    inputs["idx"] = torch.full_like(inputs["idx"], 5)
    # in fp16 the sum, from 512 on, could only grow by halves
    upstream = [torch.full((2, 600, 3), 1.0625, device=DEVICE)]
    found = budget.run_with_gradients(_op(), "triton", inputs, upstream)
    assert (found["dwte"][5] == 1275.0).all()


def test_ids_outside_their_tables_give_nan() -> None:
    inputs = _inputs(1, 4, 8, torch.float32)
    inputs["idx"] = torch.tensor([[3, 37, -1, 2**40]], device=DEVICE)
    leaves = {n: t.requires_grad_(t.is_floating_point()) for n, t in inputs.items()}
    x = _op()("triton", **leaves)
    assert x[0, 0].isfinite().all() and x[0, 1:].isnan().all()
    (dwte,) = torch.autograd.grad(x, leaves["wte"], torch.ones_like(x))
    assert (dwte[3] == 1.0).all() and dwte.sum() == 8.0
    positions = torch.tensor([0, 7, 0, 0], device=DEVICE)
    y = embedding(
        inputs["idx"] * 0, inputs["wte"], inputs["wpe"], positions=positions, impl="triton"
    )
    assert y[0, 1].isnan().all() and y[0, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_int32_ids_and_strided_tables(impl: str) -> None:
    inputs = _inputs(2, 5, 24, torch.float32)
    expected = _op()("reference", **inputs)
    assert torch.equal(_op()(impl, **inputs | {"idx": inputs["idx"].int()}), expected)
    strided = {
        "idx": inputs["idx"].T.contiguous().T,
        "wte": torch.cat([inputs["wte"], inputs["wte"]], -1)[:, :24],
        "wpe": inputs["wpe"].T.contiguous().T,
    }
    assert torch.equal(_op()(impl, **strided), expected)


def test_strided_upstream_gradient() -> None:
    inputs = _inputs(2, 5, 24, torch.float32)
    dx = torch.randn(2, 5, 24, device=DEVICE)
    expected = budget.run_with_gradients(_op(), "triton", inputs, [dx])
    for strided in (
        torch.cat([dx, dx], -1)[..., :24],
        dx.transpose(0, 2).contiguous().transpose(0, 2),
    ):
        found = budget.run_with_gradients(_op(), "triton", inputs, [strided])
        assert all(torch.equal(found[name], expected[name]) for name in ("dwte", "dwpe"))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_batch(shape: tuple[int, int]) -> None:
    inputs = _inputs(*shape, 24, torch.float32)
    upstream = [torch.ones(*shape, 24, device=DEVICE)]
    found = budget.run_with_gradients(_op(dropout_p=0.1, seed=1), "triton", inputs, upstream)
    assert found["y0"].shape == (*shape, 24)
    assert not found["dwte"].any() and not found["dwpe"].any()
    assert found["dwte"].shape == (37, 24)


def _tied(**options: Any) -> Callable[..., list[Tensor]]:
    """The embedding, and what a head makes of the table."""

    def op(impl: str, idx: Tensor, wte: Tensor, wpe: Tensor) -> list[Tensor]:
        given = options
        if impl == "reference" and wte.dtype == torch.float64:
            given = options | {"dtype": torch.float64}
        x, head = tied_embedding(idx, wte, wpe, impl=impl, **given)
        return [x, head * 0.5]

    return op


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", budget.DTYPES, ids=str)
def test_tied_gradients_are_the_sum_of_both_uses(dtype: torch.dtype, impl: str) -> None:
    options = {"dropout_p": 0.2, "seed": SEED, "dtype": torch.float32}
    budget.check_op(_tied(**options), _inputs(2, 17, 70, dtype), impl=impl)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_tied_gradient_is_added_in_place(impl: str) -> None:
    inputs = _inputs(2, 5, 24, torch.float32)
    wte = inputs["wte"].requires_grad_()
    x, head = tied_embedding(inputs["idx"], wte, inputs["wpe"], impl=impl)
    assert torch.equal(head, wte) and head.data_ptr() == wte.data_ptr()
    dhead = torch.randn_like(wte)
    # every id counts as often as it occurs
    counts = torch.bincount(inputs["idx"].flatten(), minlength=37)
    expected = dhead + counts[:, None]
    (dwte,) = torch.autograd.grad([x, head], wte, [torch.ones_like(x), dhead])
    assert dwte.data_ptr() == dhead.data_ptr()
    torch.testing.assert_close(dwte, expected)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_tied_with_one_use_and_with_two(impl: str) -> None:
    inputs = _inputs(2, 5, 24, torch.float32)
    wte = inputs["wte"].requires_grad_()
    counts = torch.bincount(inputs["idx"].flatten(), minlength=37)[:, None].expand(37, 24)
    x, head = tied_embedding(inputs["idx"], wte, inputs["wpe"], impl=impl)
    assert torch.equal(torch.autograd.grad(x.sum(), wte, retain_graph=True)[0], counts.float())
    assert (torch.autograd.grad(head.sum(), wte, retain_graph=True)[0] == 1.0).all()
    # the gradient of a sum is one number for all, expanded: not to be written to
    both = torch.autograd.grad(x.sum() + head.sum(), wte)[0]
    assert torch.equal(both, counts + 1.0)


def test_tied_in_a_compiled_step() -> None:
    inputs = _inputs(2, 5, 24, torch.float32)
    leaves = {n: t.requires_grad_(t.is_floating_point()) for n, t in inputs.items()}
    targets = torch.randint(37, (2, 5), device=DEVICE)

    def loss(impl: str) -> Tensor:
        x, head = tied_embedding(leaves["idx"], leaves["wte"], leaves["wpe"], impl=impl)
        return linear_cross_entropy(x.tanh(), head, targets, impl=impl)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss("reference"), leaves["wte"])[0]
    for impl in ("triton", "torch"):
        found = torch.autograd.grad(compiled(impl), leaves["wte"])[0]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("op", ["embedding_fwd", "segment_sum"])
def test_every_config_sums_alike(op: str) -> None:
    inputs = _inputs(3, 17, 80, torch.float32)
    # whole numbers: the sums are exact in any order
    dx = [torch.randint(-8, 9, (3, 17, 80), device=DEVICE).float()]
    expected = budget.run_with_gradients(_op(), "reference", inputs, dx)
    for config in tuning.candidates(op):
        with tuning.overriding(op, config):
            for name, value in budget.run_with_gradients(_op(), "triton", inputs, dx).items():
                assert torch.equal(value, expected[name]), name


@budget.rehearsed
@pytest.mark.parametrize("dtype", budget.DTYPES, ids=str)
def test_same_bits_a_thousand_times(dtype: torch.dtype, full: bool) -> None:
    op, shape = _op(dropout_p=0.3, seed=SEED), (8, 1024, 768) if full else (2, 9, 40)
    budget.assert_repeatable(op, _inputs(*shape, dtype), times=1000 if full else 2)


def test_opcheck() -> None:
    inputs = _inputs(2, 5, 24, torch.float32)
    wte, wpe = (inputs[n].requires_grad_() for n in ("wte", "wpe"))
    seed = torch.tensor(SEED, device=DEVICE)
    positions = torch.randint(8, (2, 5), device=DEVICE)
    for extras in ((None, None, 0.0), (positions, seed, 0.2)):
        arguments = (inputs["idx"], wte, wpe, *extras, torch.float16)
        torch.library.opcheck(_embedding_fwd, arguments)
        tables = [table.detach().clone() for table in (wte, wpe)]
        dx = torch.randn(2, 5, 24, device=DEVICE)
        torch.library.opcheck(_embedding_bwd, (dx, inputs["idx"], *extras, *tables))


def test_compiles_whole_at_two_lengths() -> None:
    def step(**inputs: Tensor) -> Tensor:
        return _op(dropout_p=0.2, seed=SEED)("triton", **inputs)

    batches = [_inputs(2, T, 24, torch.float32, block_size=16) for T in (5, 9)]
    assert_compiles_whole(step, batches)


@budget.rehearsed
def test_captured_in_a_cuda_graph(full: bool) -> None:
    B, T, C, V = (4, 256, 768, 50304) if full else (2, 9, 24, 37)
    inputs = _inputs(B, T, C, torch.bfloat16, V=V)
    leaves = {n: t.requires_grad_(t.is_floating_point()) for n, t in inputs.items()}
    wanted = [leaves["wte"], leaves["wpe"]]

    def step() -> list[Tensor]:
        x = _op()("triton", **leaves)
        return [x, *torch.autograd.grad(x, wanted, x)]

    assert_graph_replays(step, [*wanted, leaves["idx"]])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"idx": torch.zeros(2, 5)}, TypeError, "idx must be int64 or int32, got torch.float32"),
        ({"idx": torch.zeros(5).long()}, ValueError, r"idx must be \(B, T\), got shape \(5,\)"),
        ({"idx": torch.zeros(2, 9).long()}, ValueError, "9 tokens, but wpe has only 8 positions"),
        ({"idx": torch.zeros(2, 5, device="meta").long()}, ValueError, "idx must be on cpu"),
        ({"wte": torch.zeros(9, 8).long()}, TypeError, "wte must be floating point"),
        ({"wte": torch.zeros(9)}, ValueError, r"wte must be \(V, C\), got shape \(9,\)"),
        ({"wpe": torch.zeros(8, 7)}, ValueError, r"wpe must have shape \(8, 8\) to match wte"),
        ({"wpe": torch.zeros(8)}, ValueError, r"wpe must be \(T_max, C\), got shape \(8,\)"),
        ({"wpe": torch.zeros(8, 8).long()}, TypeError, "wpe must be floating point"),
        ({"wpe": torch.zeros(8, 8, device="meta")}, ValueError, "wpe must be on cpu, got meta"),
        (
            {"positions": torch.zeros(5, device="meta").long()},
            ValueError,
            "positions must be on cpu, got meta",
        ),
        ({"positions": torch.zeros(5)}, TypeError, "positions must be int64 or int32"),
        ({"positions": torch.zeros(4).long()}, ValueError, r"positions must have shape \(5,\)"),
        ({"dropout_p": -0.5}, ValueError, r"dropout_p must be in \[0, 1\), got -0.5"),
        ({"impl": "cuda"}, ValueError, "impl must be one of auto, triton, torch, reference"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "idx": torch.zeros(2, 5).long(),
        "wte": torch.zeros(9, 8),
        "wpe": torch.zeros(8, 8),
    }
    with pytest.raises(error, match=message):
        embedding(**(arguments | change))
