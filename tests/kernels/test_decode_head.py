"""The logits of few rows with the largest of every eight, and the greedy choice from them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.kernels import decode_greedy, decode_head, tuning
from fastgpt2.kernels.decode_head import _decode_greedy, _decode_head
from fastgpt2.kernels.decode_linear import MAX_ROWS
from fastgpt2.kernels.reference import block_tops
from tests.kernels import budget
from tests.kernels.budget import DEVICE
from tests.kernels.graphs import assert_graph_replays

IMPLS = ["triton", "torch", "reference"]
# (B, C, V): vocabularies that end within a tile, within a block of eight, and below one
SHAPES = budget.grid(
    [(1, 33, 70), (3, 40, 97), (MAX_ROWS, 17, 64), (2, 24, 5)],
    [(B, C, V) for B in (1, 2, 4, MAX_ROWS) for C in (768, 1600) for V in (50257, 50304)],
)


def _layer(B: int, C: int, V: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    shapes = {"x": (B, C), "weight": (V, C), "bias": (V,), "norm_weight": (C,), "norm_bias": (C,)}
    layer = {name: torch.randn(shape, device=DEVICE).to(dtype) for name, shape in shapes.items()}
    # products of C terms of size 1
    layer["weight"] /= C**0.5
    return layer


def _logits_of(**options: Any) -> Callable[..., Tensor]:
    return lambda impl, **layer: decode_head(**layer, impl=impl, **options)[0]


@pytest.mark.parametrize("dtype", budget.grid(budget.DTYPES, []), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_within_budget(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    budget.check_op(_logits_of(eps=0.1), _layer(*shape, dtype), backward=False)


@pytest.mark.parametrize("dtype", budget.dtype_grid(), ids=str)
def test_int8_weights_and_their_scales(dtype: torch.dtype) -> None:
    layer = _layer(2, 40, 50, dtype)
    layer["weight"] = torch.randint(-127, 128, (50, 40), dtype=torch.int8, device=DEVICE)
    layer["scales"] = torch.rand(50, device=DEVICE) / 500
    budget.check_op(_logits_of(), layer, backward=False)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", budget.grid(budget.DTYPES, []), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tops_are_the_largest_of_every_eight_rounded_logits(
    shape: tuple[int, int, int], dtype: torch.dtype, impl: str
) -> None:
    logits, tops = decode_head(**_layer(*shape), dtype=dtype, impl=impl)
    assert (logits.dtype, tops.dtype) == (dtype, torch.float32)
    blocks = [row.split(8) for row in logits.float()]
    assert tops.tolist() == [[float(block.max()) for block in row] for row in blocks]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_logit_that_is_not_a_number_is_the_largest(impl: str) -> None:
    layer = _layer(2, 12, 30)
    layer["bias"][13] = math.nan
    layer["bias"][20:] = -math.inf
    logits, tops = decode_head(**layer, impl=impl)
    assert logits[:, 13].isnan().all()
    assert tops[:, 1].tolist() == [math.inf] * 2 and tops[:, 3].tolist() == [-math.inf] * 2
    assert tops[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize(
    "config",
    dict.fromkeys(c for rows in (1, 4, 8) for c in tuning.candidates("decode_head", rows=rows)),
    ids=lambda c: c.label,
)
def test_every_config_of_the_head_is_exact_on_integers(config: tuning.Config) -> None:
    x, weight = (torch.randint(-8, 9, s, device=DEVICE).float() for s in ((5, 300), (77, 300)))
    with tuning.overriding("decode_head", config):
        logits, tops = decode_head(x, weight, impl="triton")
    assert torch.equal(logits, x @ weight.t()) and torch.equal(tops, block_tops(logits))


def _choice(logits: Tensor, *, with_tops: bool = True) -> dict[str, Any]:
    """The arguments of the choice, at steps of two and more rows: the second is not in use."""
    B = logits.shape[0]
    steps = torch.arange(B, device=DEVICE) % 3
    steps[1:2] = -1
    return {
        "logits": logits,
        "tops": block_tops(logits) if with_tops else None,
        "tokens": torch.arange(B, device=DEVICE) + 100,
        "lengths": torch.arange(B, device=DEVICE) + 7,
        "steps": steps,
        "recent": torch.full((2, 3, B), -5.0, dtype=torch.float64, device=DEVICE),
    }


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("with_tops", [True, False])
@pytest.mark.parametrize("dtype", budget.DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 8, 97, 1000])
def test_the_largest_logit_is_chosen_and_counted(
    V: int, dtype: torch.dtype, with_tops: bool, impl: str
) -> None:
    logits = torch.randn(5, V, device=DEVICE).to(dtype)
    given = _choice(logits, with_tops=with_tops)
    kept = {name: x.clone() for name, x in given.items() if x is not None}
    decode_greedy(**given, impl=impl)
    for b, row in enumerate(logits.float().tolist()):
        used, step = b != 1, int(kept["steps"][b])
        best = max(row)
        token = row.index(best) if used else b + 100
        after = [int(given[name][b]) for name in ("tokens", "lengths", "steps")]
        assert after == [token, b + 7 + used, step + used]
        recent = kept["recent"][:, :, b].clone()
        if used:
            recent[:, step] = torch.tensor([token, best])
        assert torch.equal(given["recent"][:, :, b], recent)
    assert torch.equal(logits, kept["logits"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("with_tops", [True, False])
def test_of_equal_logits_the_first_is_taken(with_tops: bool, impl: str) -> None:
    logits = torch.zeros(4, 70, device=DEVICE)
    # twice in a block of eight; in two blocks, the second of them first in its lane; all equal
    logits[0, [21, 23]] = 1.0
    logits[2, [37, 50, 69]] = 2.0
    logits[3] = -math.inf
    given = _choice(logits, with_tops=with_tops)
    decode_greedy(**given, impl=impl)
    assert given["tokens"].tolist() == [21, 101, 37, 0]
    assert given["recent"][1].amax(0).tolist() == [1.0, -5.0, 2.0, -5.0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("with_tops", [True, False])
def test_what_is_not_a_number_is_chosen_and_seen(with_tops: bool, impl: str) -> None:
    logits = torch.randn(1, 40, device=DEVICE)
    logits[0, 29] = math.nan
    given = _choice(logits, with_tops=with_tops)
    decode_greedy(**given, impl=impl)
    assert given["tokens"].tolist() == [29]
    assert given["recent"][:, 0, 0].tolist() == [29, math.inf]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_step_after_the_last_is_counted_and_not_kept(impl: str) -> None:
    given = _choice(torch.randn(2, 9, device=DEVICE))
    # what lies after the steps is not theirs
    whole = torch.full((3, 3, 2), -5.0, dtype=torch.float64, device=DEVICE)
    given["recent"], given["steps"][0] = whole[:2], 3
    decode_greedy(**given, impl=impl)
    assert given["steps"].tolist() == [4, -1] and given["lengths"].tolist() == [8, 8]
    assert (whole == -5.0).all()


def test_strided_logits_and_small_integers() -> None:
    logits = torch.randn(3, 20, device=DEVICE)
    expected = _choice(logits)
    decode_greedy(**expected, impl="triton")
    for apart in (torch.cat([logits, logits + 1], 1)[:, :20], torch.stack([logits] * 2, 2)[..., 0]):
        given = _choice(logits) | {"logits": apart}
        given |= {name: given[name].int() for name in ("tokens", "lengths", "steps")}
        # a part of a longer buffer
        given["recent"] = torch.full((2, 9, 3), -5.0, dtype=torch.float64, device=DEVICE)[:, 2:5]
        decode_greedy(**given, impl="triton")
        for name in ("tokens", "lengths", "steps", "recent"):
            assert torch.equal(given[name].double(), expected[name].double())


def test_every_config_of_the_choice() -> None:
    logits = torch.randn(2, 9000, device=DEVICE)
    for config in tuning.candidates("decode_greedy"):
        for with_tops in (True, False):
            given = _choice(logits, with_tops=with_tops)
            with tuning.overriding("decode_greedy", config):
                decode_greedy(**given, impl="triton")
            assert given["tokens"].tolist() == [int(logits[0].argmax()), 101]


def test_opcheck_and_compiled() -> None:
    layer = _layer(2, 20, 19)
    tensors = (layer["x"], layer["weight"], None, layer["bias"], None, None)
    torch.library.opcheck(_decode_head, (*tensors, 1e-5, torch.float16))
    for with_tops in (True, False):
        given = _choice(torch.randn(2, 19, device=DEVICE), with_tops=with_tops)
        torch.library.opcheck(_decode_greedy, tuple(given.values()))

    def step(layer: dict[str, Any], given: dict[str, Any]) -> Tensor:
        logits, tops = decode_head(**layer, impl="triton")
        decode_greedy(logits, tops, **given, impl="triton")
        return logits

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for run in (step, compiled):
        given = _choice(torch.zeros(2, 19, device=DEVICE))
        given.pop("logits")
        given.pop("tops")
        results.append([run(layer, given), *given.values()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@budget.rehearsed
def test_a_captured_graph_follows_its_inputs(full: bool) -> None:
    layer = _layer(2, *((768, 50257) if full else (20, 90)), budget.HALF)
    given = _choice(torch.zeros(2, 90, device=DEVICE))
    counters = {name: given[name] for name in ("tokens", "lengths", "steps", "recent")}

    def step() -> list[Tensor]:
        logits, tops = decode_head(**layer, impl="triton")
        fresh = {name: x.clone() for name, x in counters.items()}
        decode_greedy(logits, tops, **fresh, impl="triton")
        return [logits, tops, *fresh.values()]

    assert_graph_replays(step, [layer["x"], *counters.values()])


def test_many_rows_are_the_librarys() -> None:
    layer = _layer(MAX_ROWS + 1, 8, 12)
    with pytest.raises(RuntimeError, match="made for up to 8 rows, not 9"):
        decode_head(**layer, impl="triton")
    logits, tops = decode_head(**layer)
    assert torch.equal(tops, block_tops(logits))
    # the choice takes any number of them
    given = _choice(logits)
    decode_greedy(**given, impl="triton")
    chosen = logits.argmax(1)
    chosen[1] = 101
    assert torch.equal(given["tokens"], chosen)


def test_nothing_to_do() -> None:
    for impl in IMPLS:
        logits, tops = decode_head(**_layer(0, 8, 12), impl=impl)
        assert (logits.shape, tops.shape) == ((0, 12), (0, 2))
        decode_greedy(**_choice(logits), impl=impl)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.ones(9)}, ValueError, r"logits must be \(B, V\), got shape \(9,\)"),
        ({"tops": torch.ones(2, 1)}, ValueError, r"tops must have shape \(2, 2\) to match logits"),
        ({"steps": torch.ones(2)}, TypeError, "steps must be int64 or int32"),
        ({"recent": torch.ones(2, 2)}, ValueError, r"recent must be \(2, steps, B\)"),
        ({"recent": torch.ones(2, 3, 4)}, ValueError, r"recent must have shape \(2, 3, 2\)"),
        (
            {"tokens": torch.ones(4).long()[::2]},
            ValueError,
            "tokens must have a contiguous last dimension, got stride 2",
        ),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = _choice(torch.ones(2, 9)) | change
    with pytest.raises(error, match=f"decode_greedy: {message}"):
        decode_greedy(**arguments)
