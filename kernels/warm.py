"""``python -m fastgpt2.kernels.warm``: compile what training and decoding launch, all at once.

Traces a training step and a few tokens of decoding at the given sizes, on random weights, without
running their kernels. The binaries stay in Triton's cache on disk (``TRITON_CACHE_DIR``), where
later processes find them. ``fastgpt2 train`` does this itself before its first step.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

import torch

from fastgpt2 import cli
from fastgpt2.config import PRESETS, GPTConfig
from fastgpt2.devices import DTYPES, resolve_device, resolve_dtype
from fastgpt2.errors import UserError
from fastgpt2.kernels.ahead import compile_ahead
from fastgpt2.kernels.backend import Impl, explain, resolve
from fastgpt2.model import GPT
from fastgpt2.train.compiled import compile_kernels

# a prompt, and tokens after it that are decoded one by one
_PROMPT, _NEW = 16, 2


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m fastgpt2.kernels.warm",
        description="Compile the kernels of training and decoding in parallel, and keep them.",
    )
    parser.add_argument(
        "--model", choices=PRESETS, default="gpt2", help="shape of the model [%(default)s]"
    )
    for flag, kind, default, text in (
        ("--batch-size", int, 16, "sequences per micro-batch"),
        ("--block-size", int, 1024, "context length T in tokens"),
        ("--dropout", float, 0.0, "rate of all three dropouts"),
        ("--device", str, "auto", "auto, cuda, cuda:1, ..."),
        ("--jobs", int, os.cpu_count() or 1, "threads"),
    ):
        parser.add_argument(flag, type=kind, default=default, help=f"{text} [%(default)s]")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="compute dtype [%(default)s]"
    )
    return parser.parse_args(arguments)


def _body(options: argparse.Namespace) -> int:
    cli.check_counts(options, "batch_size", "block_size", "jobs")
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    if resolve("warm", Impl.AUTO, torch.empty(0, device=device, dtype=dtype)) is not Impl.TRITON:
        raise UserError(f"nothing to compile: the ops run on {explain(device, dtype)}")
    # every layer launches the same kernels
    shape = dict(n_layer=1, block_size=options.block_size, dropout=options.dropout)
    model = GPT(GPTConfig.preset(options.model, **shape)).to(device)
    began = time.perf_counter()
    trained = compile_kernels(model, options.batch_size, dtype, jobs=options.jobs)
    model.to(dtype).eval()
    prompt = torch.zeros(1, _PROMPT, dtype=torch.int64, device=device)
    decoded = compile_ahead(lambda: model.generate(prompt, _NEW, temperature=0.0), options.jobs)
    seconds = time.perf_counter() - began
    print(f"{trained} binaries for a training step, {decoded} for decoding: {seconds:.1f} s")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parse(arguments)
    return cli.run("kernels.warm", lambda: _body(options))


if __name__ == "__main__":
    sys.exit(main())
