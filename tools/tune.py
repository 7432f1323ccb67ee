"""``python -m tools.tune --out FOLDER``: try the tuning table's candidates on this GPU.

Each kernel that an op launches is timed with each of its candidates, all else unchanged. Before
that, outputs and gradients with the candidate must pass the tests' error budget. A candidate that
is wrong, does not fit or does not compile is reported and skipped. Prints the times; writes
``tune.json`` and ``tuning.json``, a copy of the table with this architecture's winners.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from tqdm import tqdm

from benchmarks.harness import Scale, compute_dtype
from benchmarks.machine import machine
from benchmarks.op_case import OpCase
from benchmarks.op_race import Judge, works
from benchmarks.ops import op_cases
from benchmarks.timing import DRY_FLUSH_BYTES, FLUSH_BYTES, ROUNDS, Clock, Work
from fastgpt2.cli import Parser
from fastgpt2.cli import run as run_command
from fastgpt2.files import write_text
from fastgpt2.kernels import tuning

# a candidate replaces the table's only if it is faster by more than timer noise
GAIN = 0.02


@dataclass(frozen=True)
class Launch:
    """A kernel and the shape class it was launched with."""

    kernel: str
    shape_class: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Trial:
    """One candidate's time, or why it has none."""

    kernel: str
    rule: int
    case: str
    mode: str
    config: str
    meta: dict[str, int]
    current: bool
    median_us: float | None
    fault: str = ""


@contextmanager
def recording() -> Iterator[set[Launch]]:
    """The launches made within the block."""
    seen: set[Launch] = set()
    pick = tuning.pick

    def spy(kernel: str, arch: str, **shape_class: int) -> tuning.Config:
        seen.add(Launch(kernel, tuple(sorted(shape_class.items()))))
        return pick(kernel, arch, **shape_class)

    with patch.object(tuning, "pick", spy):
        yield seen


def rewrite(source: str, kernel: str, rule: int, arch: str, config: dict[str, int]) -> str:
    """``source`` of the tuning table with ``config`` for one kernel, rule and architecture."""
    table = json.loads(source)
    table[kernel][rule]["configs"][arch] = config
    return tuning.as_json(table)


class Tuner:
    """Tries candidates until the time is used up."""

    def __init__(self, scale: Scale, seconds: float) -> None:
        self.scale = scale
        device = self.device = torch.device("cuda" if scale is Scale.CUDA else "cpu")
        dry = scale is Scale.DRY
        self.clock = Clock(
            device,
            rounds=1 if dry else ROUNDS,
            flush_bytes=DRY_FLUSH_BYTES if dry else FLUSH_BYTES,
        )
        self.end = time.perf_counter() + seconds
        self.trials: list[Trial] = []
        self.notes: list[str] = []
        self.done: set[tuple[str, int]] = set()

    @property
    def is_over(self) -> bool:
        """Whether the time is used up."""
        return time.perf_counter() > self.end

    def tune(self, case: OpCase) -> None:
        """Tune every kernel that the case launches and that is not tuned yet."""
        if self.is_over:
            self.notes.append(f"{case.label}: not tuned, the time was used up")
            return
        try:
            inputs = case.inputs(self.device, compute_dtype(self.scale))
            judge = Judge(case, inputs)
        except torch.OutOfMemoryError:
            self.notes.append(f"{case.label}: not tuned, too little memory")
            return
        run = partial(case.run, "triton")
        for mode, work in works(case, run, inputs):
            with recording() as launches:
                work()
            for launch in sorted(launches, key=lambda launch: launch.kernel):
                self._tune_kernel(launch, case, mode, work, partial(judge.check, run))

    def _tune_kernel(
        self, launch: Launch, case: OpCase, mode: str, work: Work, check: Work
    ) -> None:
        shape_class = dict(launch.shape_class)
        rules = tuning.TABLE[launch.kernel]
        rule = next(i for i, r in enumerate(rules) if r.applies(shape_class))
        if (launch.kernel, rule) in self.done or self.is_over:
            return
        self.done.add((launch.kernel, rule))
        arch = tuning.arch_of(self.device)
        current = tuning.pick(launch.kernel, arch, **shape_class)
        tried = dict.fromkeys([current, *tuning.candidates(launch.kernel, **shape_class)])
        # the interpreter's times mean nothing: one more candidate only proves that this works
        for config in list(tried)[: None if self.device.type == "cuda" else 2]:
            median, fault = None, ""
            with tuning.overriding(launch.kernel, config):
                try:
                    check()
                    work()
                    seconds = 0.1 if self.device.type == "cuda" else 0.0
                    median = self.clock.compare({"": work}, seconds=seconds)[""].median * 1e6
                except Exception as error:
                    # the candidate is wrong, too large for a block, or does not compile
                    fault = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            self.trials.append(
                Trial(
                    launch.kernel,
                    rule,
                    case.label,
                    mode,
                    config.label,
                    config.meta(),
                    config == current,
                    median,
                    fault,
                )
            )

    def winners(self) -> dict[tuple[str, int], Trial]:
        """The fastest candidate of each kernel and rule that clearly beats the table's."""
        found = {}
        for key in self.done:
            timed = [t for t in self.trials if (t.kernel, t.rule) == key and t.median_us]
            best = min(timed, key=lambda t: t.median_us or 0.0, default=None)
            current = next((t for t in timed if t.current), None)
            if best is None or best.current:
                continue
            if current is None or (best.median_us or 0.0) < (1 - GAIN) * (current.median_us or 0.0):
                found[key] = best
        return found

    def write(self, folder: Path) -> None:
        """Write ``tune.json`` and the new ``tuning.json`` with everything tuned so far."""
        source = tuning.TABLE_FILE.read_text(encoding="utf-8")
        for (kernel, rule), trial in self.winners().items():
            source = rewrite(source, kernel, rule, tuning.arch_of(self.device), trial.meta)
        write_text(folder / "tuning.json", source)
        trials = [asdict(trial) for trial in self.trials]
        report = {"machine": machine(self.device), "trials": trials, "notes": self.notes}
        write_text(folder / "tune.json", json.dumps(report, indent=1) + "\n")


def _row(trial: Trial, won: bool) -> str:
    mark = "table" if trial.current else ""
    result = trial.fault if trial.median_us is None else f"{trial.median_us:9.1f} us"
    return (
        f"{trial.kernel:24} rule {trial.rule} {trial.case:36} {trial.mode:8} {trial.config:22} "
        f"{mark:5} {'WINS' if won else '':4} {result}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit code 1 if a config of the table itself fails."""
    parser = Parser(prog="python -m tools.tune")
    parser.add_argument("--out", type=Path, required=True, help="folder for tune.json, tuning.json")
    parser.add_argument("--op", action="append", help="only this op; repeatable")
    parser.add_argument(
        "--seconds", type=float, default=150.0, help="start no kernel after so many seconds [150]"
    )
    parser.add_argument(
        "--dry", action="store_true", help="tiny sizes, any machine; times mean nothing"
    )
    options = parser.parse_args(arguments)
    return run_command("tune", lambda: _body(options), steady=True)


def _body(options: argparse.Namespace) -> int:
    torch.manual_seed(0)
    scale = Scale.DRY if options.dry else Scale.CUDA
    tuner = Tuner(scale, options.seconds)
    cases = op_cases(scale, *(options.op or ()))
    for case in (bar := tqdm(cases, unit="op", file=sys.stderr)):
        bar.set_postfix_str(case.label)
        first = len(tuner.trials)
        tuner.tune(case)
        # write now: a run that is cut short keeps its results
        tuner.write(options.out)
        winners = tuner.winners().values()
        tqdm.write("\n".join(_row(t, t in winners) for t in tuner.trials[first:]), sys.stdout)
    print("\n".join(tuner.notes))
    return 1 if any(t.current and t.fault for t in tuner.trials) else 0


if __name__ == "__main__":
    sys.exit(main())
