"""``python -m fastgpt2.generate``: continue a text with a trained model."""

import argparse
import sys
from itertools import tee

import torch

from fastgpt2.cli import Parser, file_name
from fastgpt2.cli import run as run_command
from fastgpt2.config import IMPLS
from fastgpt2.devices import DTYPES, dtype_notice, resolve_device, resolve_dtype, resolve_kernels
from fastgpt2.generate.checks import WINDOWS
from fastgpt2.generate.compiled import CompiledStep
from fastgpt2.generate.flags import check_flags, options_of
from fastgpt2.generate.generator import Generator
from fastgpt2.generate.inputs import Job, read_jobs
from fastgpt2.generate.interactive import converse
from fastgpt2.generate.jobs import plan, prompt_text, run, scores
from fastgpt2.generate.library import pays
from fastgpt2.generate.options import DEFAULT_TEMPERATURE, Options
from fastgpt2.generate.outputs import Display, Meter, ResultFile
from fastgpt2.generate.step import weights_of
from fastgpt2.model import GPT
from fastgpt2.opener import OpenedModel, open_model
from fastgpt2.text import get_tokenizer
from fastgpt2.train.interrupt import Interrupt, Interrupted
from fastgpt2.weights import RELEASES

DEFAULT_WINDOW = "slide"
DEFAULT_BATCH_SIZE = 8
# flag, type, metavar, help; a flag that is not given changes nothing
_PROCESSOR_FLAGS: tuple[tuple[str, type, str, str], ...] = (
    ("--repetition-penalty", float, "X", "divide the score of tokens already used by X [1: none]"),
    ("--presence-penalty", float, "X", "subtract X from the score of tokens already used [0]"),
    ("--frequency-penalty", float, "X", "subtract X for each time a token was used [0]"),
    ("--no-repeat-ngram", int, "N", "never repeat N tokens in a row [repeats are allowed]"),
    ("--top-p", float, "P", "draw from the likeliest tokens that together have P [all]"),
    ("--min-p", float, "P", "draw from tokens at least P times as likely as the best [all]"),
    ("--typical", float, "P", "draw from the most typical tokens that together have P [all]"),
)


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = Parser(
        prog="fastgpt2 generate",
        description="Continue a text with a trained model, printed as it is generated.",
    )
    what = parser.add_argument_group("what")
    what.add_argument(
        "--model",
        "--run",
        required=True,
        metavar="MODEL",
        type=file_name,
        help="run folder, a folder or file in any format that convert reads, or one of "
        + ", ".join(RELEASES),
    )
    what.add_argument(
        "--checkpoint",
        choices=("best", "latest"),
        default="best",
        help="of a run: the one with the lowest validation loss, or the newest [%(default)s]",
    )
    what.add_argument("--prompt", metavar="TEXT", help="text to continue [a line break]")
    what.add_argument(
        "--input",
        metavar="FILE",
        type=file_name,
        help="many prompts: one per line, or JSON Lines with 'prompt' or 'ids', optionally 'id', "
        "and options by the names of their flags ('max_new_tokens', 'stop', ...); - is stdin",
    )
    what.add_argument(
        "--interactive",
        action="store_true",
        help="you and the model take turns writing a text; Ctrl-D ends it",
    )
    what.add_argument(
        "--score",
        action="store_true",
        help="generate nothing: log-probability of each token of the prompts and in total, as JSON",
    )
    out = parser.add_argument_group("results")
    out.add_argument(
        "--output",
        metavar="FILE",
        type=file_name,
        help="JSON Lines, each as soon as it is ready: text, ids, log-probabilities, finish "
        "reason; - is stdout [plain text to stdout]",
    )
    out.add_argument(
        "--resume", action="store_true", help="add the results that are missing in --output"
    )
    out.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    out.add_argument("--samples", type=int, metavar="N", help="texts per prompt [1]")
    out.add_argument(
        "--best-of",
        type=int,
        metavar="N",
        help="generate N texts, keep the one with the highest log-probability per token [1]",
    )
    draw = parser.add_argument_group("sampling")
    draw.add_argument(
        "--temperature",
        type=float,
        metavar="X",
        help=f"below 1 safer, above 1 wilder, 0 is greedy [{DEFAULT_TEMPERATURE}]",
    )
    draw.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    draw.add_argument(
        "--top-k", type=int, metavar="K", help="draw from the K most likely tokens only [all]"
    )
    for flag, kind, metavar, text in _PROCESSOR_FLAGS:
        draw.add_argument(flag, type=kind, metavar=metavar, help=text)
    draw.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="the same seed gives a prompt the same text in any batch [a new seed]",
    )
    beams = parser.add_argument_group("beam search")
    beams.add_argument(
        "--num-beams",
        type=int,
        metavar="N",
        help="follow the N likeliest texts instead of drawing one [1: no beams]",
    )
    beams.add_argument(
        "--length-penalty",
        type=float,
        metavar="X",
        help="above 0 favours long texts, below 0 short ones [1.0]",
    )
    beams.add_argument(
        "--early-stopping", action="store_true", help="end as soon as N texts have ended"
    )
    ends = parser.add_argument_group("length and speed")
    ends.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"generate at most N tokens [{Options.max_new_tokens}]",
    )
    ends.add_argument(
        "--min-new-tokens",
        type=int,
        metavar="N",
        help="generate N tokens before the end-of-text token is allowed [0]",
    )
    ends.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; repeatable [the end-of-text token only]",
    )
    ends.add_argument(
        "--window",
        choices=WINDOWS,
        help="when the text is longer than the model's context: slide keeps the last half, stop "
        f"ends the text, crop recomputes the context for each token [{DEFAULT_WINDOW}]",
    )
    ends.add_argument(
        "--draft",
        metavar="MODEL",
        type=file_name,
        help="a smaller model that proposes tokens: faster, the same text if greedy, else the same "
        "distribution",
    )
    ends.add_argument(
        "--prompt-lookup",
        type=int,
        metavar="N",
        help="propose up to N tokens by repeating what followed the last tokens before [0]",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--quantize", choices=("int8",), help="round the weights to 8 bits, one scale per row"
    )
    model.add_argument("--tokenizer", choices=("gpt2", "bytes"), help="tokenizer [the model's own]")
    model.add_argument(
        "--vocab-dir",
        metavar="DIR",
        type=file_name,
        help="folder with GPT-2's encoder.json and vocab.bpe",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help=f"texts per batch [{DEFAULT_BATCH_SIZE}]",
    )
    machine.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, ... [auto]"
    )
    machine.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of weights and compute [%(default)s]"
    )
    machine.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="on a CPU, compile the decoding step and keep it on disk; on a GPU, capture it as a "
        "CUDA graph [on a CPU, if it is compiled already or pays off for so many tokens]",
    )
    machine.add_argument(
        "--impl", choices=IMPLS, default="auto", help="implementation of the kernels [%(default)s]"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    # with a file, writing the results matters more than the terminal
    steady = arguments.output not in (None, "-")
    return run_command("generate", lambda: _generate(arguments), steady=steady)


def _generate(arguments: argparse.Namespace) -> int:
    check_flags(arguments)
    device, dtype = _machine(arguments)
    resolve_kernels(device, dtype, arguments.impl)
    jobs = _jobs(arguments)
    opened = _open(arguments, arguments.model)
    # a scored text is read in windows
    window = "slide" if arguments.score else arguments.window or DEFAULT_WINDOW
    for job in jobs:
        # a conversation may begin with an empty prompt
        if job.prompt or not arguments.interactive:
            job.check(opened, window)
    if arguments.interactive:
        return _converse(arguments, jobs[0], opened)
    if arguments.output is None and not arguments.score:
        return _print(arguments, jobs, opened)
    with ResultFile(
        arguments.output or "-",
        "total" if arguments.score else "finish_reason",
        overwrite=arguments.overwrite,
        resume=arguments.resume,
    ) as results:
        if results.is_complete(jobs):
            return 0
        if arguments.score:
            return _score(arguments, jobs, opened, results)
        return _write(arguments, jobs, opened, results)


def _jobs(arguments: argparse.Namespace) -> list[Job]:
    options = Options() if arguments.score else options_of(arguments)
    if arguments.input is not None:
        return read_jobs(arguments.input, options, only_text=arguments.score)
    default = "" if arguments.interactive else "\n"
    return [Job(default if arguments.prompt is None else arguments.prompt, options)]


def _converse(arguments: argparse.Namespace, job: Job, opened: OpenedModel) -> int:
    # the length of a conversation is not known
    engine, meter = _engine(arguments, opened, 1, tokens=0), Meter()
    try:
        converse(engine, job, _seed(arguments), meter)
    except Interrupted as signal:
        return _stopped(signal)
    meter.say()
    return 0


def _print(arguments: argparse.Namespace, jobs: list[Job], opened: OpenedModel) -> int:
    """Texts on stdout."""
    engine = _engine(arguments, opened, _rows(jobs), _tokens(jobs))
    tasks, shown = tee(plan(jobs, _seed(arguments)))
    display = Display((task, prompt_text(task.job, opened.tokenizer)) for task in shown)
    with Meter(jobs, bar=not sys.stdout.isatty()) as meter:
        for event in run(engine, tasks):
            display.show(event)
            meter.count(event)
    meter.say()
    return 0


def _write(
    arguments: argparse.Namespace, jobs: list[Job], opened: OpenedModel, results: ResultFile
) -> int:
    """Results as JSON Lines."""
    engine = _engine(arguments, opened, _rows(jobs), _tokens(jobs))
    tasks = (t for t in plan(jobs, _seed(arguments)) if (t.job.index, t.sample) not in results.done)
    with Interrupt() as interrupt, Meter(jobs, bar=True) as meter:
        try:
            for event in run(engine, tasks, interrupt.poll):
                if event.result is not None:
                    results.write(event.result.record())
                meter.count(event)
        except Interrupted as signal:
            return _stopped(signal, results.name)
    meter.say()
    return 0


def _score(
    arguments: argparse.Namespace, jobs: list[Job], opened: OpenedModel, results: ResultFile
) -> int:
    """Log-probabilities as JSON Lines."""
    model = _load(arguments, opened)
    size = arguments.batch_size or DEFAULT_BATCH_SIZE
    left = [job for job in jobs if (job.index, 0) not in results.done]
    with Interrupt() as interrupt, Meter(bar=True) as meter:
        try:
            for record, tokens in scores(model, opened.tokenizer, left, size, interrupt.poll):
                results.write(record)
                meter.add(tokens)
        except Interrupted as signal:
            return _stopped(signal, results.name)
    meter.say()
    return 0


def _stopped(signal: Interrupted, output: str = "-") -> int:
    hint = "" if output == "-" else f"; --resume adds the other texts to {output}"
    print(f"fastgpt2 generate: stopped by {signal}{hint}", file=sys.stderr, flush=True)
    return signal.exit_code


def _engine(
    arguments: argparse.Namespace, opened: OpenedModel, rows: int, tokens: int
) -> Generator:
    """The generator, for at most this many rows and this many tokens in all."""
    draft = None
    if arguments.draft is not None:
        draft = _open(arguments, arguments.draft).load(*_machine(arguments), arguments.impl)
    model = _load(arguments, opened)
    rows = min(rows, arguments.batch_size or DEFAULT_BATCH_SIZE)
    compile = arguments.compile
    if compile is None:
        # nothing is said of what nobody has asked for
        weights = weights_of(model)
        fits = weights is not None and CompiledStep.fits(weights)
        compile = fits and pays(model, tokens // rows)
    return Generator(
        model,
        opened.tokenizer,
        batch_size=rows,
        window=arguments.window or DEFAULT_WINDOW,
        draft=draft,
        prompt_lookup=arguments.prompt_lookup or 0,
        compile=compile,
        notify=lambda line: print(line, file=sys.stderr, flush=True),
    )


def _rows(jobs: list[Job]) -> int:
    """How many texts may be generated side by side."""
    return sum(job.options.samples * job.options.best_of for job in jobs)


def _tokens(jobs: list[Job]) -> int:
    """How many tokens may be generated."""
    return sum(
        job.options.samples * job.options.best_of * job.options.max_new_tokens for job in jobs
    )


def _load(arguments: argparse.Namespace, opened: OpenedModel) -> GPT:
    device, dtype = _machine(arguments)
    # after all that may be wrong with the flags
    if (notice := dtype_notice(device, dtype)) is not None:
        print(f"fastgpt2 generate: {notice}", file=sys.stderr)
    model = opened.load(device, dtype, arguments.impl)
    return model if arguments.quantize is None else model.quantize(arguments.quantize)


def _machine(arguments: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    device = resolve_device(arguments.device)
    return device, resolve_dtype(arguments.dtype, device)


def _seed(arguments: argparse.Namespace) -> int:
    # headroom, so that seed + number of the sample stays valid
    return torch.seed() >> 2 if arguments.seed is None else arguments.seed


def _open(arguments: argparse.Namespace, name: str) -> OpenedModel:
    """The model of that name, with the flags' tokenizer or else its own."""
    given = None
    if arguments.tokenizer or arguments.vocab_dir:
        given = get_tokenizer(arguments.tokenizer or "gpt2", vocab_dir=arguments.vocab_dir)
    return open_model(name, tokenizer=given, override=True, checkpoint=arguments.checkpoint)


if __name__ == "__main__":
    raise SystemExit(main())
