"""Documents packed into blocks: where they end, and what a block predicts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


def document_ids(idx: Tensor, eot: int) -> Tensor:
    """The number of each token's document in its block; the end-of-text id ends its own.

    Args:
        idx: (B, T) token ids.
        eot: the end-of-text id.

    Returns:
        (B, T) int32, from 0 on.
    """
    ends = (idx == eot).to(torch.int32)
    return ends.cumsum(1, dtype=torch.int32) - ends


def inside_documents(idx: Tensor, targets: Tensor, eot: int) -> Tensor:
    """The targets without those of end-of-text ids, which belong to the next document.

    Args:
        idx: (B, T) token ids.
        targets: (B, T) the tokens after them.
        eot: the end-of-text id.

    Returns:
        (B, T): -100 where nothing is to be predicted.
    """
    return targets.masked_fill(idx == eot, IGNORE_INDEX)


def packed(forward: Callable[..., Any], eot: int) -> Callable[..., Any]:
    """The forward pass of blocks in which each document is alone.

    Args:
        forward: the model, or what calls it: takes token ids, targets and ``segment_ids``.
        eot: the id that ends a document.
    """

    def call(idx: Tensor, targets: Tensor, **options: Any) -> Any:
        return forward(idx, targets, segment_ids=document_ids(idx, eot), **options)

    return call
