"""``--interactive``: a text that a person and the model write in turn."""

import io
import sys
from contextlib import suppress
from dataclasses import replace
from signal import SIGINT

from fastgpt2.errors import Stopped, UserError
from fastgpt2.generate.generator import Generator
from fastgpt2.generate.inputs import Job
from fastgpt2.generate.jobs import submit
from fastgpt2.generate.outputs import Meter
from fastgpt2.generate.request import Stream
from fastgpt2.train.interrupt import Interrupt, Interrupted

with suppress(ImportError):
    # editing and a history for input(), where Python has it
    import readline  # noqa: F401

HINT = "An empty line goes on with the text, Ctrl-C stops it, Ctrl-D ends."


def converse(engine: Generator, job: Job, seed: int, meter: Meter) -> None:
    """Read a line and continue the text, until the input ends.

    The text is what the screen shows: the lines that were typed and what the model wrote, each
    further line after a line break. The cache is kept from turn to turn.

    Args:
        engine: a generator with one row.
        job: its prompt comes before the first line; its options hold for every turn.
        seed: seed of the first turn; each further turn has the next one.
        meter: counts the tokens.

    Raises:
        UserError: there is nothing to read from.
    """
    if sys.stdin is None:
        raise UserError("--interactive: stdin is closed")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # typing half a character must not end the conversation
        sys.stdin.reconfigure(errors="replace")
    print(HINT, file=sys.stderr, flush=True)
    opening, last = job.prompt, None
    while (line := _read()) is not None:
        if last is None:
            prompt = f"{opening}{line}"
        else:
            prompt = f"\n{line}" if line else ""
        try:
            stream = submit(engine, replace(job, prompt=prompt), seed, last)
        except UserError as error:
            print(f"fastgpt2 generate: {error}", file=sys.stderr, flush=True)
            continue
        _show(stream, meter)
        last, seed = stream, seed + 1


def _read() -> str | None:
    """The next line, or None at the end of the input and at Ctrl-C."""
    try:
        return input("> ")
    except Stopped:
        raise
    except (EOFError, KeyboardInterrupt):
        print(flush=True)
        return None


def _show(stream: Stream, meter: Meter) -> None:
    """Print a text as it comes; Ctrl-C ends the text, not the conversation."""
    shown = 0
    with Interrupt() as interrupt, meter:
        try:
            for piece in stream:
                print(piece, end="", flush=True)
                meter.add(len(stream.ids) - shown)
                shown = len(stream.ids)
                interrupt.poll()
            meter.add(len(stream.ids) - shown)
        except Interrupted as signal:
            if signal.exit_code != 128 + SIGINT:
                raise
            stream.cancel()
    print(flush=True)
