"""Log-likelihoods of continuations, each given its context, for the multiple-choice tasks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fastgpt2 import distributed
from fastgpt2.errors import UserError
from fastgpt2.evaluate.bars import progress
from fastgpt2.evaluate.scoring import score
from fastgpt2.evaluate.windows import Window, make_batch
from fastgpt2.model import GPT


@dataclass(frozen=True)
class Request:
    """Token ids of a continuation and of its context (at least one each)."""

    context: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class Likelihoods:
    """Results of N requests, in their order.

    ``nll`` is the sum over the continuation's tokens in nats, ``tokens`` their number; ``greedy``
    says whether each of them was the likeliest token.
    """

    nll: NDArray[np.float64]
    tokens: NDArray[np.int64]
    greedy: NDArray[np.bool_]


def score_continuations(
    model: GPT, requests: Sequence[Request], *, batch_size: int, dtype: torch.dtype
) -> Likelihoods:
    """-log p(continuation | context), summed in fp64, long requests first.

    A context that does not fit is cut at its start. With several processes, each scores its share
    of the batches and all return the same result.

    Raises:
        UserError: a continuation is longer than the model's context.
    """
    block_size = model.config.block_size
    tokens = np.array([len(request.continuation) for request in requests], np.int64)
    if tokens.max() > block_size:
        raise UserError(
            f"a continuation of {tokens.max()} tokens does not fit the model's context of "
            f"{block_size}"
        )
    # inputs are all tokens but the last
    ids = [
        np.array((request.context + request.continuation)[-(block_size + 1) :])
        for request in requests
    ]
    lengths = np.array([len(x) for x in ids])
    order = np.argsort(-lengths, kind="stable")
    nll, misses = np.zeros(len(requests)), np.zeros(len(requests))
    starts = distributed.share(len(requests), batch_size)
    for start in progress(starts, "scoring", "batch"):
        chosen = order[start : start + batch_size]
        # join the requests of a batch into one text, with a window per request
        ends = np.cumsum(lengths[chosen]).tolist()
        windows = [
            Window(end - length, end - count, end)
            for end, length, count in zip(
                ends, lengths[chosen].tolist(), tokens[chosen].tolist(), strict=True
            )
        ]
        idx, targets = make_batch(np.concatenate([ids[i] for i in chosen]), windows)
        scores = score(model, idx, targets, dtype)
        row = np.repeat(chosen, tokens[chosen])
        np.add.at(nll, row, scores.nll)
        np.add.at(misses, row, ~scores.correct)
    return Likelihoods(distributed.all_sum(nll), tokens, distributed.all_sum(misses) == 0)
