"""Many prompts through one generator: rows share its passes, results come when they are ready."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastgpt2.generate.beams import Beam, BeamSearch
from fastgpt2.generate.generator import Generator
from fastgpt2.generate.inputs import Job
from fastgpt2.generate.processors import InVocabulary, Processor
from fastgpt2.generate.request import Stream, likeliest
from fastgpt2.generate.sampling import Sampling
from fastgpt2.generate.slots import Slots
from fastgpt2.generate.text import TextPieces, encode_prompt
from fastgpt2.model import GPT
from fastgpt2.text.encoding import Tokenizer


@dataclass(eq=False)
class Task:
    """One text to generate.

    Attributes:
        job: the prompt and its options.
        sample: the number of the text among the prompt's.
        seed: seed of its random numbers; with several candidates, the first one's.
        streams: the candidates, once they are submitted.
    """

    job: Job
    sample: int
    seed: int
    streams: list[Stream] = field(default_factory=list)
    counted: int = 0


class Result(NamedTuple):
    """A text that has ended.

    Attributes:
        task: whose text it is.
        text: what follows the prompt; it ends before a stop string.
        ids: its tokens, those that completed a stop string included.
        log_probs: log-probability of each id in nats, under the model itself.
        finish_reason: as in ``Stream``.
    """

    task: Task
    text: str
    ids: list[int]
    log_probs: list[float]
    finish_reason: str

    def record(self) -> dict[str, Any]:
        """The result as an object of JSON."""
        job = self.task.job
        return {
            **_name(job),
            "sample": self.task.sample,
            "seed": self.task.seed,
            "prompt": job.prompt,
            "text": self.text,
            "ids": self.ids,
            "log_probs": self.log_probs,
            "finish_reason": self.finish_reason,
        }


class Event(NamedTuple):
    """The result of one pass for a task.

    Attributes:
        task: the task.
        text: the next piece, perhaps empty; with several candidates or beams, empty until the end.
        tokens: how many new tokens there are, over all candidates.
        result: the result if the task has ended.
    """

    task: Task
    text: str
    tokens: int
    result: Result | None


def plan(jobs: Iterable[Job], seed: int) -> Iterator[Task]:
    """The texts of the jobs, with their seeds.

    A text's seed does not depend on the other jobs: it is the job's own or ``seed``, plus the
    number of the sample. If a prompt is repeated, the count continues.

    Args:
        jobs: the jobs in the order of the input.
        seed: seed of jobs that have none.
    """
    seen: Counter[str | tuple[int, ...]] = Counter()
    for job in jobs:
        options, first = job.options, job.options.seed
        if first is None:
            key = job.prompt if isinstance(job.prompt, str) else tuple(job.prompt)
            first = seed + seen[key]
            seen[key] += options.samples * options.best_of
        for sample in range(options.samples):
            yield Task(job, sample, first + sample * options.best_of)


def run(
    engine: Generator, tasks: Iterable[Task], poll: Callable[[], None] = lambda: None
) -> Iterator[Event]:
    """Generate the texts, as many at once as the generator has rows.

    Args:
        engine: a generator with a tokenizer.
        tasks: they begin in this order.
        poll: called before each pass, after every event of the last one was taken; may raise.
    """
    waiting = iter(tasks)
    active: list[Task] = []
    beams = _Beams(engine)
    while True:
        while len(active) < engine.batch_size:
            task = next(waiting, None)
            if task is None:
                break
            if task.job.options.num_beams > 1:
                poll()
                yield beams.event(task)
                continue
            for i in range(task.job.options.best_of):
                task.streams.append(submit(engine, task.job, task.seed + i))
            active.append(task)
        if not active:
            return
        poll()
        engine.step()
        failed = [stream for task in active for stream in task.streams if stream.error is not None]
        events = [_event(task) for task in active if not {*failed} & {*task.streams}]
        active = [event.task for event in events if event.result is None]
        yield from events
        # what the other rows have is not lost
        for stream in failed:
            stream.check()


def submit(engine: Generator, job: Job, seed: int, follows: Stream | None = None) -> Stream:
    """A job's text as a stream of the generator, with text as its pieces.

    Args:
        engine: a generator with a tokenizer.
        job: the prompt and its options.
        seed: seed of the random numbers.
        follows: the ended stream to whose text the prompt, which may then be empty, is added.

    Raises:
        UserError: the prompt cannot be continued.
    """
    options, tokenizer = job.options, _tokenizer(engine)
    # a prompt that is added to a text may be empty
    ids = _ids(job, tokenizer) if job.prompt or follows is None else []
    before = 0 if follows is None else len(follows.request.prompt) + len(follows.ids)
    return engine.submit(
        ids,
        options.max_new_tokens,
        temperature=options.drawn_temperature,
        top_k=options.top_k,
        processors=options.processors(before + len(ids), _stop_ids(job, tokenizer)),
        stop=options.stop,
        seed=seed,
        log_probs=True,
        as_text=True,
        follows=follows,
    )


def prompt_text(job: Job, tokenizer: Tokenizer) -> str:
    """The text of a job's prompt.

    Args:
        job: the job.
        tokenizer: the model's.
    """
    return job.prompt if isinstance(job.prompt, str) else tokenizer.decode(job.prompt)


def scores(
    model: GPT,
    tokenizer: Tokenizer,
    jobs: Sequence[Job],
    batch_size: int,
    poll: Callable[[], None] = lambda: None,
) -> Iterator[tuple[dict[str, Any], int]]:
    """The log-probabilities of the jobs' prompts, as objects of JSON, and the tokens of each.

    Args:
        model: the model.
        tokenizer: the model's.
        jobs: their prompts are scored.
        batch_size: texts at once.
        poll: called before each batch; may raise.
    """
    for first in range(0, len(jobs), batch_size):
        poll()
        batch = jobs[first : first + batch_size]
        rows = [_ids(job, tokenizer) for job in batch]
        for job, ids, values in zip(batch, rows, model.log_probs(rows, batch_size), strict=True):
            yield (
                {
                    **_name(job),
                    "prompt": job.prompt,
                    "ids": ids,
                    # nothing comes before the first token
                    "log_probs": [None, *values],
                    "total": sum(values),
                },
                len(ids),
            )


def _name(job: Job) -> dict[str, Any]:
    return {"index": job.index} | ({} if job.id is None else {"id": job.id})


def _ids(job: Job, tokenizer: Tokenizer) -> list[int]:
    return encode_prompt(tokenizer, job.prompt) if isinstance(job.prompt, str) else job.prompt


def _event(task: Task) -> Event:
    tokens = sum(len(stream.ids) for stream in task.streams)
    new, task.counted = tokens - task.counted, tokens
    text = "".join(map(str, task.streams[0].poll())) if len(task.streams) == 1 else ""
    if any(stream.finish_reason is None for stream in task.streams):
        return Event(task, text, new, None)
    best = likeliest(task.streams)
    assert best.finish_reason is not None
    result = Result(task, best.text, best.ids, best.log_probs, best.finish_reason)
    return Event(task, text if len(task.streams) == 1 else best.text, new, result)


class _Beams:
    """Beam search for one task after another; the samples of a job are its best beams."""

    def __init__(self, engine: Generator) -> None:
        self._engine = engine
        self._slots: Slots | None = None
        self._job: Job | None = None
        self._found: list[Beam] = []

    def event(self, task: Task) -> Event:
        """The whole text at once."""
        tokens = 0
        if task.job is not self._job:
            self._found, self._job = self._search(task.job), task.job
            tokens = len(self._found[0].ids)
        # there may be fewer texts than samples
        none = Beam([], 0.0, "no token left", [])
        beam = self._found[task.sample] if task.sample < len(self._found) else none
        tokenizer = _tokenizer(self._engine)
        text = _text(tokenizer, beam.ids, _stop_texts(task.job))
        result = Result(task, text, beam.ids, beam.log_probs, beam.finish_reason)
        return Event(task, text, tokens, result)

    def _search(self, job: Job) -> list[Beam]:
        options, engine = job.options, self._engine
        tokenizer, model = _tokenizer(engine), engine.model
        ids = _ids(job, tokenizer)
        if self._slots is None or len(self._slots.lengths) < options.num_beams:
            own = engine.slots
            self._slots = Slots(
                model,
                options.num_beams,
                model.config.block_size,
                compile=own.compiled is not None or own.graph is not None,
            )
        penalty = 1.0 if options.length_penalty is None else options.length_penalty
        search = BeamSearch(
            self._slots,
            options.num_beams,
            engine.window,
            length_penalty=penalty,
            early_stopping=options.early_stopping,
        )
        stop_ids, stops = _stop_ids(job, tokenizer), _stop_texts(job)
        known = InVocabulary(tokenizer.vocab_size)
        edits: list[Processor] = [*options.processors(len(ids), stop_ids), known]
        return search.search(
            ids,
            options.max_new_tokens,
            sampling=Sampling(0.0, None, edits),
            stop=stop_ids,
            ended=lambda new: any(stop in tokenizer.decode(new) for stop in stops),
        )


def _stop_ids(job: Job, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end a text, including the vocabulary's own."""
    own = () if tokenizer.eot is None else (tokenizer.eot,)
    return frozenset([*own, *(stop for stop in job.options.stop if isinstance(stop, int))])


def _stop_texts(job: Job) -> list[str]:
    return [stop for stop in job.options.stop if isinstance(stop, str)]


def _text(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str]) -> str:
    pieces = TextPieces(tokenizer, stops)
    return "".join([*map(pieces.push, ids), pieces.finish()])


def _tokenizer(engine: Generator) -> Tokenizer:
    assert engine.tokenizer is not None
    return engine.tokenizer
