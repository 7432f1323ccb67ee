"""Speculative decoding: tokens are proposed cheaply and verified in one pass of the model.

Leviathan et al., "Fast inference from transformers via speculative decoding", 2023: a proposed
token x with the proposer's probability q(x) is accepted with probability min(1, p(x) / q(x)), where
p is the model's. The first one that is rejected is redrawn from max(0, p - q), normalised. So every
token has the distribution p. Greedy decoding accepts a proposal if it is the best token.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastgpt2.errors import UserError
from fastgpt2.generate.checks import evaluating
from fastgpt2.generate.request import Request
from fastgpt2.generate.sampling import allows_some, draw
from fastgpt2.generate.slots import Slots
from fastgpt2.model import GPT

if TYPE_CHECKING:
    from fastgpt2.generate.chooser import Row

# numbers of last tokens that a lookup searches for, the longest first
_NGRAMS = (3, 2, 1)


class Proposal(NamedTuple):
    """Tokens proposed for one row.

    Attributes:
        tokens: the tokens in order.
        probs: (tokens, V), the distribution of each; None if the proposer is certain.
    """

    tokens: list[int]
    probs: Tensor | None


def verify(request: Request, proposal: Proposal, logits: Tensor) -> list[int | None]:
    """The tokens to append: the accepted ones and one more, which is None if none is allowed.

    Args:
        request: the request that the tokens are for.
        proposal: K tokens.
        logits: (K + 1, V), processed: before each proposed token, and after the last.

    Raises:
        UserError: logits are not finite.
    """
    allowed = allows_some(logits)
    best = logits.argmax(dim=-1).tolist() if request.sampling.is_greedy else []
    for j, token in enumerate(proposal.tokens):
        if not allowed[j]:
            return [*proposal.tokens[:j], None]
        if request.sampling.is_greedy:
            other = best[j] if best[j] != token else None
        else:
            q = None if proposal.probs is None else proposal.probs[j]
            other = _other(token, q, logits[j].softmax(dim=-1), request.generator)
        if other is not None:
            return [*proposal.tokens[:j], other]
    last = best[-1] if request.sampling.is_greedy else int(draw(logits[-1:], request.generator))
    return [*proposal.tokens, last if allowed[-1] else None]


def _other(token: int, q: Tensor | None, p: Tensor, generator: torch.Generator) -> int | None:
    """The replacement of a token drawn from q, or None if it is accepted."""
    if q is None:
        q = torch.zeros_like(p)
        q[token] = 1.0
    u = torch.rand((), generator=generator, device=p.device)
    if u * q[token] < p[token]:
        return None
    rest = (p - q).clamp(min=0.0)
    # p and q may agree up to rounding: then no mass is left to draw from
    rest = rest if rest.sum() > 0 else p
    return int(torch.multinomial(rest, 1, generator=generator))


class PromptLookup:
    """Propose what followed the last tokens where they occurred earlier in the text.

    Saxena, "Prompt lookup decoding", 2023.

    Args:
        count: the most tokens to propose.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def propose(self, rows: "Sequence[Row]", limits: Sequence[int]) -> list[Proposal]:
        """A proposal for each row, of at most its limit."""
        return [
            Proposal(self._find(row.ids, min(self.count, limit)), None)
            for row, limit in zip(rows, limits, strict=True)
        ]

    @staticmethod
    def _find(ids: list[int], count: int) -> list[int]:
        if count < 1:
            return []
        for n in _NGRAMS:
            last = ids[-n:]
            # the latest occurrence first: its continuation is the likeliest
            for at in range(len(ids) - n - 1, -1, -1):
                if ids[at : at + n] == last:
                    return ids[at + n : at + n + count]
        return []


class Draft:
    """Propose what a smaller model would write; it has a cache of its own.

    Args:
        model: the smaller model.
        target: the model that verifies.
        batch_size: number of rows.
        count: the most tokens to propose.
        compile: whether to compile a step for it, if possible.
        notify: as for ``Slots``.

    Raises:
        UserError: the vocabularies differ.
    """

    def __init__(
        self,
        model: GPT,
        target: GPT,
        batch_size: int,
        count: int,
        *,
        compile: bool = False,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        theirs, ours = model.config.vocab_size, target.config.vocab_size
        if theirs != ours:
            raise UserError(f"draft: its vocabulary has {theirs} ids, the model's {ours}")
        if model.config.block_size < 4:
            raise UserError("draft: its block_size must be 4 or more")
        self.model = model
        with evaluating(model):
            self.slots = Slots(
                model, batch_size, model.config.block_size, compile=compile, notify=notify
            )
        self.count = min(count, model.config.block_size // 4)
        # begin of the draft's context in a row's ids, and the tokens in its cache
        self._starts = [0] * batch_size
        self._fed: list[list[int]] = [[] for _ in range(batch_size)]

    def reset(self, i: int) -> None:
        """Give row i to another request."""
        self._starts[i], self._fed[i] = 0, []

    def copy(self, source: int, target: int) -> None:
        """Copy row ``source`` to row ``target``."""
        self._starts[target], self._fed[target] = self._starts[source], self._fed[source]
        self.slots.copy(source, target)

    def propose(self, rows: "Sequence[Row]", limits: Sequence[int]) -> list[Proposal]:
        """A proposal for each row, of at most its limit, drawn as the row's tokens are."""
        counts = [max(0, min(self.count, limit)) for limit in limits]
        tokens: list[list[int]] = [[] for _ in rows]
        probs: list[list[Tensor]] = [[] for _ in rows]
        if not any(counts):
            return [Proposal([], None)] * len(rows)
        last = self._catch_up(rows, counts)
        for k in range(max(counts)):
            logits = self.slots.feed(0, last)
            with self.slots.choosing():
                for i, row in enumerate(rows):
                    if k < counts[i] and row.stream.finish_reason is None:
                        self._draw(row, tokens[i], probs[i], logits[i : i + 1])
                        last[i] = (tokens[i] or row.ids)[-1:]
        for i, row in enumerate(rows):
            self._fed[i] = [] if not counts[i] else [*row.ids[self._starts[i] :], *tokens[i][:-1]]
        return [
            Proposal(drafted, torch.stack(p) if p else None)
            for drafted, p in zip(tokens, probs, strict=True)
        ]

    @staticmethod
    def _draw(row: "Row", tokens: list[int], probs: list[Tensor], logits: Tensor) -> None:
        """One more token of a row, as its request draws them; its own error ends the row alone."""
        request = row.stream.request
        ids = torch.tensor([[*row.ids, *tokens]], device=logits.device)
        try:
            processed = request.sampling.process(ids, logits)
        except Exception as error:
            row.stream._fail(error)
            return
        if request.sampling.is_greedy:
            tokens.append(int(processed.argmax()))
        else:
            tokens.append(int(draw(processed, request.generator)))
            probs.append(processed.softmax(dim=-1)[0])

    def _catch_up(self, rows: "Sequence[Row]", counts: list[int]) -> list[list[int]]:
        """The last token of each row; feeds the earlier tokens that the draft has not seen."""
        pending = []
        for i, row in enumerate(rows):
            if not counts[i]:
                # the row only takes part in the passes: drop what the draft has cached for it
                self.slots.cut([0], i)
                pending.append(row.ids[-1:])
                continue
            if len(row.ids) - self._starts[i] + self.count > self.slots.size:
                self._starts[i], self._fed[i] = len(row.ids) - self.slots.size // 2, []
            ids, fed = row.ids[self._starts[i] :], self._fed[i]
            # keep the accepted tokens of the last draft
            held = max(0, min(len(fed) - self.count, len(ids) - 1))
            while held < min(len(fed), len(ids) - 1) and fed[held] == ids[held]:
                held += 1
            self.slots.cut([held], i)
            if held < len(ids) - 1:
                self.slots.feed(i, [ids[held:-1]])
            pending.append(ids[-1:])
        return pending
