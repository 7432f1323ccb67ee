"""Beam search: the likeliest texts found by following several at once.

A finished text scores sum(log p) / length^length_penalty over its new tokens. What is kept, and
when the search ends, follows transformers' ``generate``, so the texts are the same.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt2.errors import UserError
from fastgpt2.generate.checks import check_prompt, evaluating, kept_tokens
from fastgpt2.generate.processors import is_count, is_number, plain, require
from fastgpt2.generate.sampling import Sampling
from fastgpt2.generate.slots import Slots


class Beam(NamedTuple):
    """A text.

    Attributes:
        ids: what follows the prompt, without the stop id.
        score: the text's score, length penalty included, once it has ended.
        finish_reason: as in ``Stream``.
        log_probs: log-probability of each id in nats under the model itself: before processors.
    """

    ids: list[int]
    score: float
    finish_reason: str
    log_probs: list[float]


class _Running(NamedTuple):
    """A text that goes on: its new ids, and their log p after the processors and before."""

    ids: list[int]
    score: float
    log_probs: list[float]


class BeamSearch:
    """Beam search from one prompt after another, in the first rows of a cache.

    Args:
        slots: at least ``num_beams`` rows.
        num_beams: texts that are followed at once.
        window: what happens when a text outgrows the context: see ``Generator``.
        length_penalty: above 0 favours long texts, below 0 short ones.
        early_stopping: end as soon as ``num_beams`` texts have ended, rather than when no running
            one looks better than they do.

    Raises:
        UserError: an option is out of its range.
    """

    def __init__(
        self,
        slots: Slots,
        num_beams: int,
        window: str = "slide",
        *,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
    ) -> None:
        num_beams, length_penalty = plain(num_beams), plain(length_penalty)
        require("num_beams", num_beams, is_count(num_beams, 1), "an integer of 1 or more")
        fine = is_number(length_penalty) and abs(length_penalty) <= 30
        require("length_penalty", length_penalty, fine, "in [-30, 30]")
        if not isinstance(early_stopping, bool):
            raise UserError(f"early_stopping must be true or false, got {early_stopping!r:.80}")
        self.slots, self.num_beams, self.window = slots, num_beams, window
        self.keep = kept_tokens(slots.model, window)
        self.length_penalty, self.early_stopping = length_penalty, early_stopping

    @torch.no_grad()
    def search(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        sampling: Sampling,
        stop: frozenset[int] = frozenset(),
        ended: Callable[[list[int]], bool] | None = None,
    ) -> list[Beam]:
        """The best ``num_beams`` texts, the best one first; fewer if there are no more.

        Args:
            prompt: token ids.
            max_new_tokens: the most that follow.
            sampling: only its processors that do not draw are used; they get log-probabilities.
            stop: ids that end a text.
            ended: tells from new ids, without the prompt, whether their text has ended otherwise.

        Raises:
            UserError: logits are not finite, or the prompt cannot be continued.
        """
        check_prompt(self.slots.model, prompt, self.window)
        require(
            "max_new_tokens", max_new_tokens, is_count(max_new_tokens, 0), "an integer of 0 or more"
        )
        with evaluating(self.slots.model):
            return self._search(prompt, max_new_tokens, sampling, stop, ended)

    def _search(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        stop: frozenset[int],
        ended: Callable[[list[int]], bool] | None,
    ) -> list[Beam]:
        limit = "length"
        # the last token is never fed
        room = self.slots.model.config.block_size + 1 - len(prompt)
        if self.window == "stop" and room < max_new_tokens:
            max_new_tokens, limit = room, "window"
        if max_new_tokens == 0:
            return [Beam([], 0.0, "length", [])]
        context = list(prompt)[-self._context(len(prompt)) :]
        self.slots.cut([0])
        logits = self.slots.feed(0, [context])
        running = [_Running([], 0.0, [])]
        finished: list[Beam] = []
        for length in range(1, max_new_tokens + 1):
            last_step = length == max_new_tokens
            with self.slots.choosing():
                candidates = self._candidates(running, prompt, logits, sampling, len(stop))
            if not candidates:
                finished = finished or [self._end(text, "no token left") for text in running]
                break
            running, parents = [], []
            for rank, (parent, candidate) in enumerate(candidates):
                ids, score, log_probs = candidate
                hits_stop = ids[-1] in stop
                over = hits_stop or (ended is not None and ended(ids))
                if (over or last_step) and rank < self.num_beams:
                    reason = "stop" if over else limit
                    score /= length**self.length_penalty
                    kept = length - hits_stop
                    finished.append(Beam(ids[:kept], score, reason, log_probs[:kept]))
                elif not (over or last_step) and len(running) < self.num_beams:
                    running.append(candidate)
                    parents.append(parent)
            # a stable sort: among equal scores the earlier text stays
            finished = sorted(finished, key=lambda beam: -beam.score)[: self.num_beams]
            if not running or self._is_done(finished, running[0].score, length):
                break
            logits = self._advance(prompt, running, parents)
        return finished or [self._end(text, limit) for text in running]

    def _end(self, text: _Running, reason: str) -> Beam:
        score = text.score / max(1, len(text.ids)) ** self.length_penalty
        return Beam(text.ids, score, reason, text.log_probs)

    def _context(self, length: int) -> int:
        return length if length <= self.slots.model.config.block_size else self.keep

    def _candidates(
        self,
        running: list[_Running],
        prompt: Sequence[int],
        logits: Tensor,
        sampling: Sampling,
        stops: int,
    ) -> list[tuple[int, _Running]]:
        """The best continuations, best first, each with the number of the text it continues."""
        ids = torch.tensor([[*prompt, *text.ids] for text in running], device=logits.device)
        log_probs = logits.float().log_softmax(dim=-1)
        of_the_model = log_probs.flatten()
        if not log_probs.amax(dim=-1).isfinite().all():
            raise UserError("the logits are not finite: damaged weights, or too large for fp16")
        log_probs = sampling.process(ids, log_probs)
        scores = torch.tensor([text.score for text in running], device=logits.device)
        flat = (log_probs + scores[:, None]).flatten()
        # enough for num_beams running texts, even if the best candidates all stop
        count = min(max(2, 1 + stops) * self.num_beams, len(flat))
        best, at = flat.topk(count)
        V, found = logits.shape[-1], []
        columns = (best.tolist(), at.tolist(), of_the_model[at].tolist())
        for score, i, log_prob in zip(*columns, strict=True):
            if score > -float("inf"):
                text = running[i // V]
                new = _Running([*text.ids, i % V], score, [*text.log_probs, log_prob])
                found.append((i // V, new))
        return found

    def _is_done(self, finished: list[Beam], best_running: float, length: int) -> bool:
        if len(finished) < self.num_beams:
            return False
        return self.early_stopping or (
            best_running / length**self.length_penalty <= finished[-1].score
        )

    def _advance(
        self, prompt: Sequence[int], running: list[_Running], parents: list[int]
    ) -> Tensor:
        """The logits after the new last tokens."""
        block_size = self.slots.model.config.block_size
        if self.slots.lengths[parents[0]] == block_size:
            whole = [[*prompt, *text.ids][-self.keep :] for text in running]
            self.slots.cut([0] * len(running))
            return self.slots.feed(0, whole)
        self.slots.reorder(parents)
        return self.slots.feed(0, [text.ids[-1:] for text in running])
