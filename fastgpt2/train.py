"""``python -m fastgpt2.train``: train a GPT-2 on text, into a run folder."""

import argparse
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from fastgpt2.cli import run as run_command
from fastgpt2.errors import UserError
from fastgpt2.training import summary
from fastgpt2.training.config import TrainConfig, field_types, named_configs, read_config
from fastgpt2.training.trainer import Outcome, Trainer


def build_parser() -> argparse.ArgumentParser:
    """One flag for each field of ``TrainConfig``, and the few that are about the run folder."""
    parser = argparse.ArgumentParser(
        prog="fastgpt2 train",
        description="Train a GPT-2. Without arguments: GPT-2 124M on a GPU, a small model on a "
        "CPU, on the prose of Python's own documentation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--config",
        help=f"a TOML file or one of {', '.join(named_configs())} (default: cuda or cpu)",
    )
    run.add_argument("--out", help="run folder (default: a new one under runs/)")
    run.add_argument("--resume", action="store_true", help="continue the run in --out")
    run.add_argument("--overwrite", action="store_true", help="delete what is in --out first")
    options = parser.add_argument_group("training (each overrides the configuration)")
    types = field_types()
    for name, item in TrainConfig.__dataclass_fields__.items():
        flag = "--" + name.replace("_", "-")
        plain, _ = types[name]
        extra: dict[str, Any] = {"help": item.metadata["help"], "dest": name}
        if plain is bool:
            extra["action"] = argparse.BooleanOptionalAction
        else:
            extra["type"] = str if plain is tuple else plain
            extra["choices"] = item.metadata["choices"]
            extra["metavar"] = None if extra["choices"] else name.upper()
        if plain is tuple:
            extra["nargs"] = "+"
        options.add_argument(flag, **extra)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = vars(build_parser().parse_args(argv))
    return run_command("train", lambda: _train(arguments))


def _train(arguments: dict[str, Any]) -> int:
    arguments = dict(arguments)
    name, out = arguments.pop("config", None), arguments.pop("out", None)
    resume, overwrite = arguments.pop("resume", False), arguments.pop("overwrite", False)
    if "data" in arguments:
        arguments["data"] = tuple(arguments["data"])
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if resume and (out is None or name is not None):
        raise UserError("--resume continues the run given by --out, with its own configuration")
    folder = _run_folder(out, resume, overwrite, name)
    if resume:
        base = read_config(str(folder / "config.toml"))
    else:
        base = read_config(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = TrainConfig.from_layers(base, _length(arguments), arguments)
    print(f"run: {folder}")
    print("".join(f"  {line}\n" for line in config.to_toml().splitlines()), end="")
    trainer = Trainer(config, folder, resume=resume)
    if overwrite and folder.exists():
        # everything has been checked: only now is the old run given up
        shutil.rmtree(folder)
    outcome = trainer.run()
    _report(outcome, folder)
    return outcome.exit_code


def _length(arguments: dict[str, Any]) -> dict[str, Any]:
    """A length on the command line takes the place of the configuration's, it does not add one."""
    names = ("steps", "epochs", "minutes")
    return dict.fromkeys(names) if any(name in arguments for name in names) else {}


def _run_folder(out: str | None, resume: bool, overwrite: bool, name: str | None) -> Path:
    if out is None:
        stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        folder = Path("runs") / f"{stamp}_{Path(name or 'default').stem}"
        return folder if not folder.exists() else folder.with_name(f"{folder.name}_2")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {out}: is a file")
    if resume:
        if not (folder / "config.toml").is_file():
            raise UserError(f"--resume: {out} is no run folder (it has no config.toml)")
    elif folder.exists() and any(folder.iterdir()):
        is_run = (folder / "config.toml").is_file()
        if not overwrite:
            raise UserError(f"--out {out}: not empty; give --resume or --overwrite")
        if not is_run:
            raise UserError(f"--out {out}: no run folder, so --overwrite does not delete it")
    return folder


def _report(outcome: Outcome, folder: Path) -> None:
    print(
        f"\ntrained {outcome.step:,} steps, {outcome.tokens:,} tokens, in "
        f"{summary.duration(outcome.elapsed)}; training loss {outcome.train_loss:.4f}"
    )
    if outcome.validation is not None:
        result = outcome.validation
        print(
            f"validation: {result.loss:.4f} nats/token, perplexity {result.perplexity:.2f}, "
            f"{result.nats_per_byte:.4f} nats/byte, {result.bits_per_byte:.4f} bits/byte"
        )
    print(f"best checkpoint: step {outcome.best_step}; curves: {folder / 'loss.png'}")
    if outcome.exit_code:
        print(f"continue with: python -m fastgpt2.train --out {folder} --resume")
    print(f'generate with: python -m fastgpt2.generate --run {folder} --prompt "The "')


if __name__ == "__main__":
    raise SystemExit(main())
