"""Documents packed into blocks: where documents end and which targets count."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


def document_ids(idx: Tensor, eot: int) -> Tensor:
    """The number of each token's document in its block; an end-of-text id belongs to the document
    that it ends.

    Args:
        idx: (B, T) token ids.
        eot: the end-of-text id.

    Returns:
        (B, T) int32, counted from 0.
    """
    ends = (idx == eot).to(torch.int32)
    return ends.cumsum(1, dtype=torch.int32) - ends


def inside_documents(idx: Tensor, targets: Tensor, eot: int) -> Tensor:
    """The targets, ignored after end-of-text ids: there they belong to the next document.

    Args:
        idx: (B, T) token ids.
        targets: (B, T) the token after each.
        eot: the end-of-text id.

    Returns:
        (B, T): -100 where a target is ignored.
    """
    return targets.masked_fill(idx == eot, IGNORE_INDEX)


def packed(forward: Callable[..., Any], eot: int) -> Callable[..., Any]:
    """A forward pass in which tokens attend only within their own document.

    Args:
        forward: the model or a wrapper of it: takes token ids, targets and ``segment_ids``.
        eot: the id that ends a document.
    """

    def call(idx: Tensor, targets: Tensor, **options: Any) -> Any:
        return forward(idx, targets, segment_ids=document_ids(idx, eot), **options)

    return call
