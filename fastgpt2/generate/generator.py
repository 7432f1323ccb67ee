"""The generator: requests in, streams out; rows of one batch that come and go.

A step is one forward pass of the model. Rows whose context is not in the cache yet (new ones, and
those whose window slid) go first, adjacent ones together. Otherwise every row gets one token, or
several if a proposal is verified. Active rows are the first ones of the cache: when a row leaves,
the last one takes its place, and waiting requests enter at the end. A row's tokens do not depend on
the other rows: lengths, random numbers and processors are its own.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch

from fastgpt2.errors import UserError
from fastgpt2.generate.ahead import Ahead, may_run_ahead
from fastgpt2.generate.checks import (
    Stop,
    as_ids,
    check_generator,
    check_prompt,
    evaluating,
    kept_tokens,
    row_generator,
    split_stops,
)
from fastgpt2.generate.chooser import Chooser, Row, take
from fastgpt2.generate.graph import AHEAD
from fastgpt2.generate.processors import Processor, is_count, plain, require
from fastgpt2.generate.request import Request, Stream
from fastgpt2.generate.sampling import Sampling
from fastgpt2.generate.slots import Slots
from fastgpt2.generate.speculation import Draft, PromptLookup, Proposal
from fastgpt2.generate.text import TextPieces, encode_prompt
from fastgpt2.model import GPT
from fastgpt2.precision import compute_dtype
from fastgpt2.text.encoding import Tokenizer


class Generator:
    """Continuous batching: prompts are submitted at any time and share the model's passes.

    >>> generator = Generator(model, tokenizer, batch_size=4)
    >>> streams = [generator.submit(prompt, 50, seed=1) for prompt in prompts]
    >>> for piece in streams[0]:
    ...     print(piece, end="")

    Use it from one thread only. The model runs in evaluation mode.

    Args:
        model: the model.
        tokenizer: for prompts and stop strings that are text.
        batch_size: rows that run at once; further requests wait.
        size: tokens that a row of the cache holds; None means the model's block_size.
        window: when a text outgrows the context: ``slide`` goes on with the last half of it,
            ``stop`` ends the text, ``crop`` recomputes the last block_size tokens for every token.
        draft: a smaller model with the same vocabulary that proposes tokens.
        prompt_lookup: propose what followed the last tokens earlier in the text, up to this many.
        proposals: tokens that the draft model proposes at once.
        compile: compile the decoding step, on a CPU: some seconds the first time. On a GPU:
            capture it as a CUDA graph, in which the tokens are chosen some steps ahead.
        notify: shows what came of that, in a line; None shows only failures, as a warning.

    Raises:
        UserError: an option is out of its range, or the draft does not fit.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer | None = None,
        *,
        batch_size: int = 8,
        size: int | None = None,
        window: str = "slide",
        draft: GPT | None = None,
        prompt_lookup: int = 0,
        proposals: int = 4,
        compile: bool = False,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        block_size = model.config.block_size
        size = block_size if size is None else plain(size)
        batch_size, prompt_lookup = plain(batch_size), plain(prompt_lookup)
        proposals = plain(proposals)
        require("batch_size", batch_size, is_count(batch_size, 1), "an integer of 1 or more")
        require("size", size, is_count(size, 1) and size <= block_size, f"in [1, {block_size}]")
        require("prompt_lookup", prompt_lookup, is_count(prompt_lookup, 0), "0 or more")
        require("proposals", proposals, is_count(proposals, 1), "1 or more")
        if draft is not None and prompt_lookup:
            raise UserError("draft and prompt_lookup exclude each other")
        if draft is not None and not isinstance(draft, GPT):
            raise UserError(f"draft: expected a GPT, got {draft!r:.80}")
        self.model, self.tokenizer, self._draft = model, tokenizer, draft
        self.batch_size, self.window = batch_size, window
        self.keep = kept_tokens(model, window)
        self._chooser = Chooser(None if tokenizer is None else tokenizer.vocab_size)
        self._proposer: Draft | PromptLookup | None = None
        # what is allocated in inference mode could not be written outside it
        with torch.inference_mode(False):
            if draft is not None:
                self._proposer = Draft(
                    draft, model, batch_size, proposals, compile=compile, notify=notify
                )
            elif prompt_lookup:
                # more tokens than the window holds would never be accepted
                self._proposer = PromptLookup(min(prompt_lookup, block_size))
            # a pass writes as many keys into every row as the longest proposal needs
            spare = 0 if self._proposer is None else self._proposer.count
            with evaluating(model):
                self.slots = Slots(model, batch_size, size + spare, compile=compile, notify=notify)
        self._size = size
        self._rows: list[Row] = []
        self._waiting: deque[Row] = deque()
        # the text that is still in the cache's first row after the last active row has left
        self._left: Stream | None = None

    def submit(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 200,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        processors: Sequence[Processor] = (),
        stop: Stop = (),
        seed: int | None = None,
        generator: torch.Generator | None = None,
        log_probs: bool = False,
        as_text: bool | None = None,
        follows: Stream | None = None,
    ) -> Stream:
        """Add a request; it starts when a row is free.

        Args:
            prompt: text, or token ids; empty text starts a new one, if the vocabulary has a token
                for that.
            max_new_tokens: the most that follow.
            temperature: below 1 sharper, above 1 flatter; 0 is greedy.
            top_k: draw from the k most likely tokens only.
            processors: callables ``(ids, logits) -> logits``.
            stop: token ids and strings that end the text. For a prompt that is text, the
                vocabulary's end-of-text token ends it, too.
            seed: seed of the row's own random numbers; None means a new one.
            generator: a source of randomness in place of a seed.
            log_probs: keep the tokens' log-probabilities.
            as_text: whether the pieces are text; None means that they are if the prompt is.
            follows: a stream of this generator that has ended. The prompt, which may be empty,
                is added to its text; what the cache still holds of it is not recomputed.

        Raises:
            UserError: an argument is out of its range, or the prompt cannot be continued.
        """
        ids, max_new_tokens = self._encode(prompt, follows), plain(max_new_tokens)
        is_text = isinstance(prompt, str) if as_text is None else as_text
        if is_text and self.tokenizer is None:
            raise UserError("prompt: text needs a tokenizer; give one, or token ids")
        stop_ids, stop_texts = split_stops(self.model, stop)
        if stop_texts and not is_text:
            raise UserError("stop: a string needs a prompt that is text; give token ids")
        if is_text and self.tokenizer is not None and self.tokenizer.eot is not None:
            stop_ids |= {self.tokenizer.eot}
        require(
            "max_new_tokens",
            max_new_tokens,
            is_count(max_new_tokens, 0),
            "an integer of 0 or more",
        )
        start = 0 if follows is None else follows.start
        # the last token is never fed
        context = min(self.model.config.block_size, len(ids) - start + max_new_tokens - 1)
        if context > self._size:
            raise UserError(f"size: rows hold {self._size} tokens, this text needs {context}")
        sampling = Sampling(temperature, top_k, processors)
        check_generator(generator)
        if generator is None:
            generator = row_generator(self.slots.device, seed)
        request = Request(tuple(ids), max_new_tokens, sampling, stop_ids, generator, log_probs)
        pieces = None
        if is_text:
            assert self.tokenizer is not None
            pieces = TextPieces(self.tokenizer, sorted(stop_texts))
        stream = Stream(request, pieces, self.step, start)
        if max_new_tokens == 0:
            stream._finish("length")
        else:
            self._waiting.append(Row(stream, ids, start, follows))
        return stream

    def _encode(self, prompt: str | Sequence[int], follows: Stream | None) -> list[int]:
        before: list[int] = []
        if follows is not None:
            if follows.finish_reason is None:
                raise UserError("follows: the stream has not ended")
            before = [*follows.request.prompt, *follows.ids]
        if not isinstance(prompt, str):
            ids = as_ids(prompt)
        elif not prompt and before:
            ids = []
        elif self.tokenizer is None:
            raise UserError("prompt: text needs a tokenizer; give one, or token ids")
        else:
            ids = encode_prompt(self.tokenizer, prompt)
        start = 0 if follows is None else follows.start
        check_prompt(self.model, [*before[start:], *ids], self.window)
        return [*before, *ids]

    @torch.no_grad()
    def step(self) -> bool:
        """One pass of the model for the active rows; False if there was nothing to do.

        After an error or Ctrl-C in the middle of it, the next pass goes on correctly. An error that
        a request causes, by its processors or by logits that are not finite, ends that request
        alone: its stream raises it.
        """
        try:
            return self._step()
        except BaseException:
            self._forget()
            raise

    def _step(self) -> bool:
        self._leave()
        while self._waiting and len(self._rows) < self.batch_size:
            row = self._waiting[0]
            # an interrupt may have come before it left the queue
            if row.stream.finish_reason is None and row not in self._rows:
                self._enter(row)
            self._waiting.popleft()
        if not self._rows:
            return False
        with evaluating(self.model), evaluating(self._draft or self.model):
            self._slide()
            fresh = [len(self._pending(i)) > 1 for i in range(len(self._rows))]
            if any(fresh) or 0 in self.slots.lengths[: len(fresh)]:
                self._check_dtype()
            if any(fresh):
                for first, stop in _runs(fresh):
                    self._extend(first, [self._pending(i) for i in range(first, stop)])
            elif self._rows:
                self._decode()
        self._leave()
        return True

    def _check_dtype(self) -> None:
        """Keys and values are kept in the dtype in which the model computed at first."""
        kept = self.slots.cache.layers[0].kv.dtype
        now = compute_dtype(self.model.transformer.wpe.weight, self.slots.device)
        if now != kept:
            names = [str(dtype).removeprefix("torch.") for dtype in (now, kept)]
            raise UserError(
                f"generator: the model computes in {names[0]} now, in {names[1]} when this was "
                "made; make a new one"
            )

    def _forget(self) -> None:
        """Drop what a pass that was cut short has left in the caches."""
        self._left = None
        for i, row in enumerate(self._rows):
            row.ids = [*row.stream.request.prompt, *row.stream.ids]
            held = len(row.ids) - 1 - row.start
            self.slots.cut([max(0, min(self.slots.lengths[i], held))], i)
            if isinstance(self._proposer, Draft):
                self._proposer.reset(i)
        # the device's lengths may be those before or after the pass
        self.slots.rewrite()
        if isinstance(self._proposer, Draft):
            self._proposer.slots.rewrite()

    def run(self) -> None:
        """Finish every request.

        Raises:
            Exception: the first error of a request, after all have ended.
        """
        rows = [*self._rows, *self._waiting]
        while self.step():
            pass
        for row in rows:
            row.stream.check()

    def _pending(self, i: int) -> list[int]:
        """The tokens of row i that the cache does not hold yet."""
        row = self._rows[i]
        return row.ids[row.start + self.slots.lengths[i] :]

    def _enter(self, row: Row) -> None:
        """Add a row; the cache keeps the text that it continues, except its last token."""
        i, held = len(self._rows), 0
        if i == 0 and row.follows is not None and row.follows is self._left:
            held = min(self.slots.lengths[0], len(row.ids) - 1 - row.start)
        self._left = None
        self.slots.cut([held], i)
        if isinstance(self._proposer, Draft):
            self._proposer.reset(i)
        self._rows.append(row)

    def _slide(self) -> None:
        """Apply the window's policy to rows whose next pass would not fit."""
        for i, row in enumerate(self._rows):
            if len(row.ids) - row.start > self.model.config.block_size:
                if self.window == "stop":
                    row.stream._finish("window")
                row.start = len(row.ids) - self.keep
                self.slots.cut([0], i)
        self._leave()

    def _leave(self) -> None:
        """Free the rows of finished requests; the last row takes the place of each."""
        for i in reversed(range(len(self._rows))):
            stream = self._rows[i].stream
            if stream.finish_reason is None:
                continue
            stream.start = self._rows[i].start
            last = len(self._rows) - 1
            self._left = None if last else stream
            if i < last:
                self.slots.copy(last, i)
                if isinstance(self._proposer, Draft):
                    self._proposer.copy(last, i)
            # in one assignment: an interrupt before it leaves row i finished, to be freed again
            rows = [*self._rows]
            rows[i] = rows[last]
            self._rows = rows[:last]

    def _decode(self) -> None:
        """One token for every row, or several that were proposed and verified."""
        rows = self._rows
        proposals: list[Proposal] = [Proposal([], None)] * len(rows)
        if self._proposer is not None:
            # a row's proposals and random numbers depend on that row alone
            proposals = self._proposer.propose(rows, [self._spare(row) for row in rows])
        elif self.slots.runs_ahead(len(rows)) and may_run_ahead([r.stream.request for r in rows]):
            self._run_ahead()
            return
        tokens = [[row.ids[-1], *p.tokens] for row, p in zip(rows, proposals, strict=True)]
        if all(len(ids) == 1 for ids in tokens):
            self._extend(0, tokens)
            return
        logits = self.slots.feed(0, tokens, every=True)
        with self.slots.choosing():
            for row, proposal, row_logits in zip(rows, proposals, logits, strict=True):
                self._chooser.verify(row, proposal, row_logits[: len(proposal.tokens) + 1])
        self.slots.cut([len(row.ids) - 1 - row.start for row in rows])

    def _extend(self, first: int, tokens: list[list[int]]) -> None:
        """One more token for each of some adjacent rows, after tokens that the cache lacks."""
        logits = self.slots.feed(first, tokens)
        with self.slots.choosing():
            self._chooser.extend(self._rows[first : first + len(tokens)], logits)

    def _spare(self, row: Row) -> int:
        """How many tokens the row may get after the next one, before it ends or slides."""
        request, context = row.stream.request, self.model.config.block_size
        wanted = request.max_new_tokens - len(row.stream.ids) - 1
        return min(context - (len(row.ids) - row.start), wanted)

    def _run_ahead(self) -> None:
        """Some tokens for every row; those after the end of a text are dropped."""
        rows, requests = self._rows, [row.stream.request for row in self._rows]
        count = min(AHEAD, 1 + min(self._spare(row) for row in rows))
        process = partial(self._chooser.process, requests[0].sampling, [])
        known, newest = self._chooser.vocab_size, [row.ids[-1] for row in rows]
        with self.slots.choosing():
            ahead = Ahead(self.slots, requests, newest, count, process, known)
        for step, (tokens, best) in enumerate(zip(ahead.tokens, ahead.best, strict=True)):
            for i, row in enumerate(rows):
                if row.stream.finish_reason is None and take(row, tokens[i], best[i]):
                    ahead.rewind(i, step + 1)
        self.slots.cut([len(row.ids) - 1 - row.start for row in rows])


def _runs(flags: list[bool]) -> list[tuple[int, int]]:
    """[first, stop) of each run of True."""
    closed = [False, *flags, False]
    edges = [i for i in range(len(flags) + 1) if closed[i] != closed[i + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))
