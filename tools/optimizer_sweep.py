"""Sweep optimizers and rates for the fewest steps to a loss; writes JSON and a picture.

python -m tools.optimizer_sweep TINYSHAKESPEARE.txt docs/optimizers

The runs use ``fastgpt2 train --config shakespeare-char``, nanoGPT's setting for a CPU. Runs that
the JSON already has are skipped, so a stopped sweep continues. ``--picture`` only draws.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from fastgpt2 import picture
from fastgpt2.cli import Parser
from fastgpt2.cli import run as run_command
from fastgpt2.errors import UserError
from fastgpt2.files import write_text
from fastgpt2.model import GPT
from fastgpt2.train.__main__ import main as train
from fastgpt2.train.config import TrainConfig
from fastgpt2.train.config_file import read_config
from fastgpt2.train.metrics import read_metrics
from fastgpt2.train.optimizers import build_optimizer

# nanoGPT's validation loss in its README, after 2,000 steps
TARGET = 1.886
EVERY = 100


@dataclass(frozen=True)
class Setting:
    """One curve: flags of ``fastgpt2 train``, and how many seeds it is run with."""

    name: str
    flags: tuple[str, ...]
    steps: int
    seeds: int = 1


# a longer warm-up, and a constant rate before the decay
_FLAT = ("--warmup-steps=100", "--schedule=wsd", "--wsd-decay=0.6")


def muon(
    muon_lr: float, lr: float, steps: int, seeds: int = 1, *more: str, flat: bool = False
) -> Setting:
    """Muon with these two learning rates; the rest is what the configuration ships."""
    name = f"Muon {muon_lr:g}, AdamW {lr:g}{' '.join(['', *more])}{', flat first' if flat else ''}"
    rates = ("--optimizer=muon", f"--muon-lr={muon_lr:g}", f"--lr={lr:g}")
    return Setting(name, (*rates, *more, *(_FLAT if flat else ())), steps, seeds)


SWEEP = (
    muon(0.02, 4e-3, 500, flat=True),
    muon(0.04, 4e-3, 500, flat=True),
    muon(0.02, 8e-3, 500, flat=True),
    muon(0.03, 6e-3, 500, 1, "--muon-weight-decay=0.1", flat=True),
    muon(0.03, 6e-3, 500, 1, "--muon-warmup-steps=100", flat=True),
    muon(0.04, 4e-3, 600, 3, flat=True),
    muon(0.04, 4e-3, 500, 3),
)


def run_one(setting: Setting, seed: int, text: str) -> dict[str, Any]:
    """Train once; the validation losses by step."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        length = [f"--steps={setting.steps}", f"--eval-every={EVERY}", "--sample-tokens=0"]
        where = ["--config=shakespeare-char", f"--data={text}", f"--out={out}", "--device=cpu"]
        if train([*where, *setting.flags, *length, f"--seed={seed}"]):
            raise UserError(f"{setting.name}: the run failed")
        curve = [[r["step"], round(r["val_loss"], 4)] for r in read_metrics(out) if "val_loss" in r]
    return {"name": setting.name, "flags": setting.flags, "seed": seed, "curve": curve}


def step_seconds(rounds: int = 15) -> dict[str, float]:
    """Median seconds of one training step with each optimizer, alternating in one process."""
    idx = torch.randint(65, (12, 65), generator=torch.Generator().manual_seed(0))
    x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
    base = read_config("shakespeare-char")
    steps = {}
    for name in ("adamw", "muon"):
        config = TrainConfig.from_layers(base, {"optimizer": name})
        model = GPT(config.gpt_config(65))
        steps[name] = (model, build_optimizer(model, config))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, (model, optimizer) in steps.items():
            began = time.perf_counter()
            optimizer.zero_grad()
            loss = model(x, y)[1]
            assert loss is not None
            torch.autograd.backward(loss)
            optimizer.step()
            times[name].append(time.perf_counter() - began)
    return {name: round(statistics.median(values), 5) for name, values in times.items()}


def draw(record: dict[str, Any], path: Path) -> None:
    """Validation loss against steps, one line per setting: the mean over its seeds."""
    picture.draw(path, lambda: _paint(record))


def _paint(record: dict[str, Any]) -> Any:
    figure = picture.new_figure(8, 5)
    axes = figure.subplots()
    curves: dict[tuple[str, int], list[list[list[float]]]] = {}
    for run in record["runs"]:
        curves.setdefault((run["name"], run["curve"][-1][0]), []).append(run["curve"])
    for (name, _), runs in curves.items():
        steps = [step for step, _ in runs[0]]
        columns = [[loss for _, loss in run] for run in runs]
        losses = [statistics.mean(values) for values in zip(*columns, strict=True)]
        said = f"{name}: {losses[-1]:.3f} after {steps[-1]:,.0f}"
        said += f", {len(runs)} seeds" if len(runs) > 1 else ""
        axes.plot(steps, losses, label=said, linewidth=2.2 if len(runs) > 1 else 1.0)
    axes.axhline(TARGET, color="black", linestyle=":", label=f"nanoGPT: {TARGET} after 2,000")
    axes.set_ylim(1.6, 2.8)
    axes.set_xlabel("optimizer step, of 768 characters")
    axes.set_ylabel("validation loss (nats per character)")
    axes.set_title("Tiny Shakespeare, 0.8 M parameters")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> int:
    """Run the missing settings; write ``sweep.json`` and ``sweep.png``."""
    parser = Parser(prog="python -m tools.optimizer_sweep", description=__doc__)
    parser.add_argument("text", help="tinyshakespeare.txt, or the corpus's name")
    parser.add_argument("folder", type=Path, help="folder of sweep.json and sweep.png")
    parser.add_argument(
        "--picture", action="store_true", help="only draw sweep.png from sweep.json"
    )
    args = parser.parse_args(argv)
    return run_command("optimizer_sweep", lambda: _body(args), steady=True)


def _body(args: argparse.Namespace) -> int:
    path = args.folder / "sweep.json"
    record: dict[str, Any] = {"machine": machine(torch.device("cpu")), "runs": []}
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
    done = {(run["name"], run["curve"][-1][0], run["seed"]) for run in record["runs"]}
    for setting in () if args.picture else SWEEP:
        for seed in range(1, setting.seeds + 1):
            if (setting.name, setting.steps, seed) not in done:
                record["runs"].append(run_one(setting, seed, args.text))
                record["seconds_per_step"] = step_seconds()
                write_text(path, json.dumps(record, indent=1) + "\n")
    draw(record, args.folder / "sweep.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
