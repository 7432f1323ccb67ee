"""The next tokens of rows, chosen from the model's logits; a row alone fails alone."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgpt2.errors import UserError
from fastgpt2.generate.processors import InVocabulary
from fastgpt2.generate.request import Request, Stream
from fastgpt2.generate.sampling import Sampling, allows_some, draw, log_probs_of, may_follow
from fastgpt2.generate.speculation import Proposal, verify


@dataclass(eq=False)
class Row:
    """An active request.

    Attributes:
        stream: the request's output.
        ids: the prompt and the tokens after it.
        start: index in ``ids`` at which the model's context begins.
        follows: the stream whose text it continues.
    """

    stream: Stream
    ids: list[int]
    start: int = 0
    follows: Stream | None = None

    def append(self, id_: int | None, log_prob: float | None) -> None:
        """One more token, or None if every token is forbidden; nothing if the text has ended."""
        if self.stream.finish_reason is not None:
            return
        if id_ is None:
            self.stream._finish("no token left")
            return
        self.ids.append(id_)
        self.stream._push(id_, log_prob)


def take(row: Row, id_: int, best: float) -> bool:
    """Append a token that was chosen elsewhere; True if that ends the row.

    Args:
        row: a row that has not ended.
        id_: the token.
        best: the largest of the logits that it was chosen from.
    """
    try:
        # for each token of each row, so the common case is one call
        allowed = math.isfinite(best) or may_follow([best])[0]
        row.append(id_ if allowed else None, None)
    except UserError as error:
        row.stream._fail(error)
    return row.stream.finish_reason is not None


class Chooser:
    """Appends tokens to rows.

    A row whose processors raise, or whose logits are not finite, ends with that error; the others
    get their tokens.

    Args:
        vocab_size: ids of the tokenizer, if there is one; those beyond are forbidden.
    """

    def __init__(self, vocab_size: int | None) -> None:
        self.vocab_size = vocab_size
        self._known = None if vocab_size is None else InVocabulary(vocab_size)

    def process(self, sampling: Sampling, ids: list[list[int]], logits: Tensor) -> Tensor:
        """The logits to draw from, for rows of one length."""
        seen = torch.tensor(ids, device=logits.device) if sampling.reads_ids else logits
        if self._known is not None:
            logits = self._known(seen, logits)
        return sampling.process(seen, logits)

    def extend(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Append the next token of each row, from its logits (rows, V)."""
        groups: dict[tuple[Hashable, ...], list[int]] = {}
        for i, row in enumerate(rows):
            sampling = row.stream.request.sampling
            length = len(row.ids) if sampling.reads_ids else 0
            groups.setdefault((length, *sampling.key), []).append(i)
        chosen: list[int | None] = [None] * len(rows)
        for members in groups.values():
            some = logits if len(members) == len(rows) else logits[members]
            tokens = self._pick([rows[i] for i in members], some)
            for i, id_ in zip(members, tokens, strict=True):
                chosen[i] = id_
        wanted = [row.stream.request.log_probs for row in rows]
        values = log_probs_of(logits, chosen) if any(wanted) else None
        for i, (row, id_) in enumerate(zip(rows, chosen, strict=True)):
            row.append(id_, values[i] if values is not None and wanted[i] else None)

    def verify(self, row: Row, proposal: Proposal, logits: Tensor) -> None:
        """Append the proposed tokens that are accepted, and one more."""
        request = row.stream.request
        try:
            processed = [
                self.process(
                    request.sampling, [[*row.ids, *proposal.tokens[:j]]], logits[j : j + 1]
                )
                for j in range(len(logits))
            ]
            chosen = verify(request, proposal, torch.cat(processed))
        except Exception as error:
            row.stream._fail(error)
            return
        values = log_probs_of(logits[: len(chosen)], chosen) if request.log_probs else None
        for j, id_ in enumerate(chosen):
            row.append(id_, None if values is None else values[j])

    def _pick(self, rows: Sequence[Row], logits: Tensor) -> list[int | None]:
        """A token for each of some rows that choose alike; None where every token is forbidden."""
        requests = [row.stream.request for row in rows]
        try:
            processed = self.process(requests[0].sampling, [row.ids for row in rows], logits)
            return _drawn(processed, requests)
        except Exception as error:
            if len(rows) == 1:
                rows[0].stream._fail(error)
                return [None]
        # one of them is the reason: each alone
        return [self._pick([row], logits[i : i + 1])[0] for i, row in enumerate(rows)]


def _drawn(processed: Tensor, requests: list[Request]) -> list[int | None]:
    """A token for each row of processed logits; None where every token is forbidden."""
    allowed = allows_some(processed)
    if requests[0].sampling.is_greedy:
        tokens = processed.argmax(dim=-1).tolist()
    elif all(request.generator is requests[0].generator for request in requests):
        tokens = draw(processed, requests[0].generator)[:, 0].tolist()
    else:
        drawn = [draw(processed[i : i + 1], r.generator) for i, r in enumerate(requests)]
        tokens = torch.cat(drawn)[:, 0].tolist()
    return [id_ if fine else None for id_, fine in zip(tokens, allowed, strict=True)]
