"""``python -m tools.loss_match``: does training in FP8 reach the losses of training in bf16?

Trains one configuration both ways, from the same weights on the same batches, for each of a few
seeds, and writes the curves and their differences as JSON. It also reports how much the seed alone
changes the same loss: a smaller difference is not significant.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.machine import machine
from fastgpt2.cli import Parser, check_counts
from fastgpt2.cli import run as run_command
from fastgpt2.devices import resolve_device
from fastgpt2.files import write_text
from fastgpt2.train.config import TrainConfig
from fastgpt2.train.config_file import named_configs, read_config
from fastgpt2.train.metrics import read_metrics
from fastgpt2.train.trainer import Trainer

# the mean of the last LAST training losses is compared, one loss every LOG_EVERY steps
LAST, LOG_EVERY = 5, 10


def train(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """The training losses by step, and the validation loss at the end."""
    Trainer(config, folder, notify=lambda line: None).run()
    records = read_metrics(folder)
    losses = {record["step"]: record["train_loss"] for record in records if "train_loss" in record}
    return {"train_loss": losses, "val_loss": records[-1].get("val_loss")}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What FP8 changes, seed by seed, and what the seed changes."""

    def ends(form: str) -> list[float]:
        return [mean(list(run[form]["train_loss"].values())[-LAST:]) for run in runs]

    def validated(form: str) -> list[float]:
        return [run[form]["val_loss"] for run in runs]

    result: dict[str, Any] = {}
    for name, read in (("train_loss_at_the_end", ends), ("val_loss", validated)):
        bf16, fp8 = read("bf16"), read("fp8")
        differences = [b - a for a, b in zip(bf16, fp8, strict=True)]
        result[name] = {
            "bf16": bf16,
            "fp8": fp8,
            "fp8_minus_bf16": differences,
            "mean_difference": mean(differences),
            "spread_of_bf16_over_seeds": max(bf16) - min(bf16),
        }
    return result


def match(base: dict[str, Any], seeds: int) -> dict[str, Any]:
    """Train everything; returns the report."""
    runs = []
    for seed in range(1, seeds + 1):
        run: dict[str, Any] = {"seed": seed}
        for form in ("bf16", "fp8"):
            with tempfile.TemporaryDirectory() as folder:
                config = TrainConfig.from_layers(base, {"seed": seed, "fp8": form == "fp8"})
                run[form] = train(config, Path(folder))
            print(f"seed {seed}, {form}: validation loss {run[form]['val_loss']:.4f}", flush=True)
        runs.append(run)
    return {"summary": summary(runs), "runs": runs}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = Parser(prog="python -m tools.loss_match")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the JSON to write")
    configs = f"a TOML file or one of {', '.join(named_configs())} [%(default)s]"
    parser.add_argument("--config", default="shakespeare-char", metavar="NAME", help=configs)
    parser.add_argument(
        "--data", nargs="+", metavar="WHAT", help="data instead of the configuration's"
    )
    parser.add_argument(
        "--steps", type=int, default=200, metavar="N", help="optimizer steps per run [200]"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="pairs of runs [3]")
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu, cuda, ... [auto]"
    )
    options = parser.parse_args(arguments)
    return run_command("loss_match", lambda: _body(options), steady=True)


def _body(options: argparse.Namespace) -> int:
    check_counts(options, "steps", "seeds")
    base = read_config(options.config) | {
        "steps": options.steps,
        "eval_every": options.steps,
        "log_every": LOG_EVERY,
        "sample_tokens": 0,
        "dtype": "bf16",
        "device": options.device,
    }
    if options.data:
        base["data"] = tuple(options.data)
    report = {
        "config": base | {"data": [Path(name).name for name in base["data"]]},
        "machine": machine(resolve_device(options.device)),
        **match(base, options.seeds),
    }
    write_text(options.out, json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["summary"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
