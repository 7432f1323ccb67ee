"""The decoding step compiled: programs over buffers with fixed addresses.

TorchInductor compiles one C++ function for a block, which all blocks share, and one for the head.
They are compiled for a number of rows and the model's shapes. The cache's size and the number of
keys in use are variables, so no length needs another compilation. One program for the whole step
would save the calls between blocks, a tenth of a step of GPT-2 124M in int8, but take four times as
long to compile and to load. Inductor keeps the programs on disk, in its own cache, where a second
process finds them.
"""

import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastgpt2.compiler import compiler_obstacle, failure
from fastgpt2.devices import device_kind
from fastgpt2.generate.step import (
    Layer,
    Options,
    Position,
    Weights,
    block_after,
    head_after,
    logits_after,
)
from fastgpt2.model import GPT

# the signature of ``logits_after``, without its compiled parts
Run = Callable[[Weights, Tensor, Tensor, list[Tensor], Tensor], Tensor]
# the number of keys in use is rounded up to this, so that loops over them have no remainder
BLOCK = 64
# the compiler tells dimensions apart by their first sizes: no two of these may be equal, and the
# cache is always larger than the part of it that is in use
_TRIAL_SIZE, _TRIAL_KEYS = 3 * BLOCK, 2 * BLOCK
# programs kept for one function: shapes, rows, dtypes
_PROGRAMS = 32
# what has had a trial run: rows, dtypes, shapes
_TRIED: set[Hashable] = set()
_OPTIONS: dict[str, Any] = {
    # multiplications and sums become one instruction
    "cpp.enable_floating_point_contract_flag": "fast",
    # a vector that all features of a layer read is computed once, not in their loop
    "realize_reads_threshold": 0,
    "max_pointwise_cat_inputs": 0,
}
# seconds on two cores with AVX2: the cost of compiling, and what each token saves per weight
_COST = 25.0
_SAVED, _SAVED_INT8 = 2.5e-10, 8e-10


def pays(model: GPT, new_tokens: int) -> bool:
    """Whether compiling takes less time than it saves, for so many steps of this model.

    For GPT-2 124M it pays from about 800 steps on in fp32, and from 250 in int8. A program that is
    on disk already would pay earlier; that is not checked.
    """
    quantized = model.lm_head.weight.dtype == torch.int8
    size = sum(p.numel() for p in model.parameters())
    saved = new_tokens * size * (_SAVED_INT8 if quantized else _SAVED)
    on_cpu = device_kind(model.transformer.wpe.weight.device).host
    return on_cpu and saved > _COST


def compiled_step(
    weights: Weights, rows: int, notify: Callable[[str], None] | None = None
) -> Run | None:
    """The compiled step, or None, with one line that says why.

    The first time for such weights and rows in a process, a trial run compiles it, or fails to.

    Args:
        weights: the model's weights.
        rows: B of all steps to come.
        notify: shows each decision in a line; None shows only failures, as a warning.
    """
    obstacle = compiler_obstacle(weights.positions.device)
    if obstacle is not None:
        (notify or warnings.warn)(f"compile: {obstacle}; generating without it")
        return None
    if notify is not None:
        notify("compile: on; the first time takes half a minute or so, later ones seconds")

    def any_length(
        layer: Layer, x: Tensor, cache: Tensor, position: Position, options: Options
    ) -> Tensor:
        torch._dynamo.mark_dynamic(cache, 3)
        torch._dynamo.mark_dynamic(position.visible, 1)
        out: Tensor = block(layer, x, cache, position, options)
        return out

    def step(
        weights: Weights, tokens: Tensor, lengths: Tensor, kv: list[Tensor], seen: Tensor
    ) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=_PROGRAMS), torch.no_grad():
            return logits_after(weights, tokens, lengths, kv, seen, block=any_length, head=head)

    H = weights.n_head
    shape = (2, rows, H, _TRIAL_SIZE, weights.positions.shape[1] // H)
    kind = (rows, _kind(weights), torch.get_num_threads())
    try:
        block, head = (
            torch.compile(part, fullgraph=True, dynamic=False, options=_OPTIONS)
            for part in (block_after, head_after)
        )
        if kind in _TRIED:
            return step
        kv = [torch.zeros(shape, dtype=weights.positions.dtype) for _ in weights.layers]
        tokens, lengths = torch.zeros(2, rows, dtype=torch.int64)
        step(weights, tokens, lengths, kv, torch.arange(_TRIAL_KEYS))
    except Exception as error:
        (notify or warnings.warn)(f"compile: failed ({failure(error)}); generating without it")
        return None
    _TRIED.add(kind)
    return step


def _kind(weights: Weights) -> Hashable:
    """What the program is compiled for: shapes, dtypes and settings, but not the values."""
    leaves = tree_leaves(weights, is_leaf=lambda leaf: leaf is None)
    return tuple(
        (leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else leaf
        for leaf in leaves
    )
