"""Throw strange requests at ``fastgpt2 generate`` and ``Generator``: a text or one clear error.

    python -m tools.fuzz_generate                      # 10,000 requests over tiny models
    python -m tools.fuzz_generate --first 4711 --count 1  # one of them again

Request number n depends only on n. Any result other than a text or a one-line error (a traceback,
an endless line, a wrong exit code, results that are not JSON) is printed, and the exit code is 1.
"""

import argparse
import io
import json
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from fastgpt2 import cli
from fastgpt2.config import GPTConfig
from fastgpt2.errors import UserError
from fastgpt2.generate import Generator, LogitBias, MinLength, NoRepeatNgram, TopK, TopP
from fastgpt2.generate import __main__ as command
from fastgpt2.generate.checks import WINDOWS
from fastgpt2.model import GPT
from fastgpt2.opener import OpenedModel, open_model
from fastgpt2.text import BytesTokenizer, CharTokenizer, save_tokenizer

BLOCK_SIZE = 8
# every way in which a number can be wrong
NUMBERS: list[Any] = [
    *(0, 1, 2, 3, 5, 0.5, 0.9, 1.0, 1.5, -1, -0.5, 1e-45, 1e-300, 1e38, 1e300, -1e300, 10**15),
    *(2**31, 2**62, 2**63, 2**64, -(2**63), 10**400, float("nan"), float("inf"), -float("inf")),
]
STRANGE: list[Any] = [
    None,
    "",
    "x",
    "3",
    True,
    False,
    [],
    [1],
    {},
    {"1": 2},
    [None],
    "\0",
    "\ud800",
]
TEXTS = [
    *("", " ", "\n", "\t\n ", "a", "abc", "the cat", "abcabcabcabc", "x" * 50, "é", "🙂", "ab🙂c"),
    *("\0", "\ud800", "a\udcffb", "\ufeff", "\u2028", "<|endoftext|>", "{", '{"prompt"', "\x1b[2J"),
    *("ÿ" * 9, "a\r\nb", "\u202eabc", "e\u0301", "---", "-", "--score"),
]
BYTES = [
    b"",
    b"\xff",
    b"a\0b",
    b"\xf0\x9f\x99",
    b"\xef\xbb\xbfa",
    b"\xff\xfea\0",
    b"a\n\n\nb",
    b"\r",
]
# texts that every model here can encode
PLAIN = ["a", "b", "abc", "cab a", "abcabcabcabc", "\n", " ", "c" * 20]
COUNTS = ("max_new_tokens", "min_new_tokens", "top_k", "no_repeat_ngram", "seed", "num_beams")
FRACTIONS = ("temperature", "top_p", "min_p", "typical", "length_penalty")
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
WINDOW_FLAGS = [*WINDOWS * 9, "wrap"]
# options that would be obeyed and never end
ENDLESS = ("max_new_tokens", "samples", "best_of")


class Request:
    """Request number n: flags and stdin, or a call in Python."""

    def __init__(self, n: int) -> None:
        self.random = random.Random(n)
        self.flags = ["--output=-"] if self.random.random() < 0.5 else []
        self.stdin = b""
        kind = self.random.random()
        if kind < 0.45:
            self.stdin = self._lines()
            self.flags += ["--input=-", *self._flags(0.1)]
        elif kind < 0.8:
            self.flags += self._flags(0.25)
            if self.random.random() < 0.8:
                self.flags.append(f"--prompt={self._argument()}")
        elif kind < 0.9:
            self.flags = ["--interactive", *self._flags(0.1)]
            self.stdin = self._lines()
        else:
            others = self._flags(0.1) if self.random.random() < 0.2 else []
            self.flags += ["--score", f"--prompt={self._argument()}", *others]

    def __str__(self) -> str:
        return f"{self.flags} with {self.stdin[:300]!r}"

    def _number(self, name: str) -> Any:
        if self.random.random() < 0.9:
            return self.random.choice([1, 2, 3] if name in (*COUNTS, *ENDLESS) else [0.3, 0.7, 1.0])
        numbers = NUMBERS
        if name in ENDLESS:
            numbers = [x for x in NUMBERS if not (isinstance(x, int) and x > 5)]
        return self.random.choice(numbers)

    def _flags(self, chance: float) -> list[str]:
        flags = []
        if self.random.random() < 0.9:
            flags.append(f"--max-new-tokens={self._number('max_new_tokens')}")
            flags.append(f"--window={self.random.choice(WINDOW_FLAGS)}")
        else:
            # with another window it would not end
            flags += ["--window=stop", f"--max-new-tokens={2**62}"]
        for name in (*COUNTS[1:], *FRACTIONS, *PENALTIES, "samples", "best_of", "prompt_lookup"):
            if self.random.random() < chance / 4:
                flags.append(f"--{name.replace('_', '-')}={self._number(name)}")
        for flag in ("--greedy", "--early-stopping", "--interactive", "--score", "--resume"):
            if self.random.random() < chance / 8:
                flags.append(flag)
        for flag, values in (
            ("--batch-size", [2, 1, 3, 0, "many", 10**15]),
            ("--draft", ["tiny"]),
            ("--seed", [1, 2**62, 2**63, -1]),
        ):
            if self.random.random() < chance:
                good = 1 if self.random.random() < 0.8 else len(values)
                flags.append(f"{flag}={self.random.choice(values[:good])}")
        for _ in range(
            self.random.choice([0, 0, 1, 3]) if self.random.random() < chance * 2 else 0
        ):
            flags.append(f"--stop={self._argument()}")
        return flags

    def _text(self) -> str:
        return self.random.choice(PLAIN if self.random.random() < 0.6 else TEXTS)

    def _argument(self) -> str:
        """A text that a command line can hold."""
        text = self._text().replace("\0", "")
        # Python decodes invalid UTF-8 arguments this way
        return text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")

    def _lines(self) -> bytes:
        lines = [self._line() for _ in range(self.random.choice([1, 1, 1, 2, 3]))]
        return self.random.choice([b"\n", b"\n", b"\r\n", b"\n\n"]).join(lines)

    def _line(self) -> bytes:
        kind = self.random.random()
        if kind < 0.05:
            return self.random.choice(BYTES)
        if kind < 0.25:
            return self._text().encode("utf-8", "surrogatepass")
        line = json.dumps(self._record(), ensure_ascii=self.random.random() < 0.5).encode(
            "utf-8", "surrogatepass"
        )
        if self.random.random() < 0.05:
            return line[: self.random.randrange(len(line))]
        return line

    def _record(self) -> dict[str, Any]:
        chance = self.random.random
        record: dict[str, Any] = {"max_new_tokens": self._number("max_new_tokens")}
        if chance() < 0.8:
            record["prompt"] = self._text()
        if chance() < 0.2:
            record.pop("prompt", None)
            ids = [0, 1, 4, 5, 65, 97, 255, 256, 257, 300, -1, 2**70]
            count = self.random.choice([0, 1, 3, 20])
            record["ids"] = self.random.choices(ids[: self.random.choice([3, 3, 3, 12])], k=count)
        for name in (*COUNTS, *FRACTIONS, *PENALTIES, "samples", "best_of"):
            if chance() < 0.06:
                record[name] = self._number(name)
        if chance() < 0.2:
            stops = [*TEXTS, 0, 4, 97, 256, 257, -1, True, None, 1.5]
            record["stop"] = self.random.choices(stops, k=self.random.choice([0, 1, 1, 2]))
            # each of them twice
            record["stop"] *= self.random.choice([1, 2])
        if chance() < 0.1:
            keys = ["0", "3", "4", "97", "256", "257", "-1", "x", "1.5", "1" * 5000]
            record["logit_bias"] = {self.random.choice(keys): self._number("") for _ in range(2)}
        if chance() < 0.1:
            name = self.random.choice([*record, "id", "ids", "prompt", "early_stopping", "Prompt"])
            record[name] = self.random.choice(STRANGE)
        return record


def call_python(model: OpenedModel, weights: GPT, request: Request) -> None:
    """``Generator.submit`` with arguments of any kind; returns, or raises a ``UserError``."""
    choose, strange = request.random.choice, [*NUMBERS[:12], *STRANGE]
    processors: list[Callable[[], Any]] = [
        *(lambda: TopK(choose(strange)), lambda: TopP(choose(strange)), lambda: 5),
        *(lambda: NoRepeatNgram(choose(strange)), lambda: LogitBias({choose([0, 4, 300]): 1})),
        lambda: MinLength(choose(strange), choose([0, 4, 256, 300])),
    ]
    engine = Generator(weights, model.tokenizer, batch_size=2, window=choose(WINDOWS))
    streams = []
    for _ in range(2):
        options: dict[str, Any] = {"max_new_tokens": choose([0, 1, 2, 3])}
        for name in ("temperature", "top_k", "stop", "seed", "max_new_tokens"):
            if request.random.random() < 0.2:
                options[name] = choose([x for x in strange if x != 10**15])
        if request.random.random() < 0.3:
            options["processors"] = [choose(processors)()]
        prompt = choose([*TEXTS, [1, 2], [4] * 20, [300], [-1], [1.5], ["a"], *STRANGE])
        streams.append(engine.submit(prompt, **options))
    engine.run()
    assert all(stream.finish_reason for stream in streams)


def run_command(request: Request) -> str:
    """Run the command in this process; returns how it ended, or raises ``AssertionError``."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    stdin = io.TextIOWrapper(io.BytesIO(request.stdin), encoding="utf-8")
    with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "stdin", stdin):
        try:
            code: Any = command.main(["--model=tiny", *request.flags])
        except SystemExit as exit:
            code = exit.code
    said = err.buffer.getvalue().decode("utf-8")
    shown = out.buffer.getvalue().decode("utf-8")
    assert "Traceback" not in said, said
    if code == 0:
        if "--output=-" in request.flags or "--score" in request.flags:
            for line in shown.split("\n")[:-1]:
                json.loads(line, parse_constant=_refuse)
        return "text"
    assert code == 2, f"exit code {code}: {said}"
    lines = said.split("\n")
    # a conversation first says how to leave it
    errors = [line for line in lines if "error: " in line]
    assert len(errors) == 1 and lines[-1] == "", f"not one line: {said!r}"
    assert len(errors[0]) < 700, f"{len(errors[0])} characters: {errors[0][:200]}"
    return "error"


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@contextmanager
def tiny_models() -> Iterator[list[tuple[OpenedModel, GPT]]]:
    """A model of bytes and one of five characters, opened once; the command gets the first."""
    models = []
    with tempfile.TemporaryDirectory() as folder:
        for tokenizer in (BytesTokenizer(), CharTokenizer("abc \n")):
            torch.manual_seed(0)
            path = Path(folder) / tokenizer.name
            config = GPTConfig(BLOCK_SIZE, tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=8)
            GPT(config).save_pretrained(path)
            save_tokenizer(tokenizer, path)
            opened = open_model(path)
            models.append((opened, opened.load(torch.device("cpu"), torch.float32)))
        with (
            patch.object(command, "_open", lambda *_: models[0][0]),
            patch.object(command, "_load", lambda *_: models[0][1]),
            patch.object(OpenedModel, "load", lambda *_: models[0][1]),
        ):
            yield models


def fuzz(first: int, count: int, say: Callable[[str], None] = print) -> Counter[str]:
    """Send ``count`` requests from number ``first``, report failures; returns how they ended."""
    ends: Counter[str] = Counter()
    with tiny_models() as models:
        for n in range(first, first + count):
            request = Request(n)
            # alternate with the model that has no end-of-text token
            models.sort(key=lambda pair: (pair[0].tokenizer.eot is None) != bool(n % 2))
            try:
                if n % 5 == 0:
                    call_python(*models[0], request)
                    ends["text"] += 1
                else:
                    ends[run_command(request)] += 1
            except UserError:
                ends["error"] += 1
            except Exception:
                ends["failure"] += 1
                say(f"request {n}: {request}\n{traceback.format_exc()}")
    return ends


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = cli.Parser(prog="python -m tools.fuzz_generate", description=__doc__)
    parser.add_argument(
        "--first", type=int, default=0, metavar="N", help="number of the first request [0]"
    )
    parser.add_argument(
        "--count", type=int, default=10_000, metavar="N", help="number of requests [10000]"
    )
    arguments = parser.parse_args(argv)
    return cli.run("fuzz_generate", lambda: _body(arguments))


def _body(arguments: argparse.Namespace) -> int:
    begin = time.perf_counter()
    ends = fuzz(arguments.first, arguments.count, partial(print, flush=True))
    seconds = time.perf_counter() - begin
    print(", ".join(f"{ends[name]} {name}" for name in sorted(ends)) + f" in {seconds:.0f} s")
    return 1 if ends["failure"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
