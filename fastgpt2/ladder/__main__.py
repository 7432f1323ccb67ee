"""``python -m fastgpt2.ladder``: the table that times every attention of the ladder."""

import argparse

import torch

from fastgpt2.cli import Parser, check_counts
from fastgpt2.cli import run as run_command
from fastgpt2.devices import resolve_device
from fastgpt2.ladder.same_weights import attention_rungs, format_timings, time_rungs
from fastgpt2.ladder.self_attention import simple_attention


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = Parser(
        prog="fastgpt2.ladder",
        description="Time the attentions of the ladder, all with the same weights.",
    )
    parser.add_argument("--batch", type=int, default=4, metavar="B", help="sequences [%(default)s]")
    parser.add_argument(
        "--context", type=int, default=256, metavar="T", help="tokens of each [%(default)s]"
    )
    parser.add_argument("--width", type=int, default=256, metavar="C", help="[%(default)s]")
    parser.add_argument("--heads", type=int, default=4, metavar="H", help="[%(default)s]")
    parser.add_argument(
        "--repeats", type=int, default=10, metavar="N", help="timings of each [%(default)s]"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... [%(default)s]")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command("ladder", lambda: _run(argv))


def _run(argv: list[str] | None) -> None:
    args = build_parser().parse_args(argv)
    check_counts(args, "batch", "context", "width", "heads", "repeats")
    device = resolve_device(args.device)
    torch.manual_seed(0)
    modules = [r.to(device) for r in attention_rungs(args.width, args.context, args.heads)]
    x = torch.randn(args.batch, args.context, args.width, device=device)
    print(f"fp32 on {device}: B={args.batch} T={args.context} C={args.width} H={args.heads}\n")
    print(format_timings(time_rungs([simple_attention, *modules], x, args.repeats)))


if __name__ == "__main__":
    raise SystemExit(main())
