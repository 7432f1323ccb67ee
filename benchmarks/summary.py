"""``python -m benchmarks.summary FOLDER``: a short table of the results of ``on_gpu.sh``."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.results import Run
from benchmarks.tables import machine_lines, summary_lines

STAGES = ("kernels", "step", "decode")


def correct_lines(path: Path) -> Iterator[str]:
    """Counts, then the names of failed tests; after a stopped stage, the results so far."""
    # the last line may be incomplete if the process was killed
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(True) if line[-1] == "\n"]
    results = [json.loads(line) for line in whole]
    counts = Counter(result["outcome"] for result in results)
    yield f"correct: {len(results)} tests" + "".join(f", {n} {name}" for name, n in counts.items())
    yield from (f"  FAILED {r['test']}" for r in results if r["outcome"] == "failed")


def tune_lines(report: Any) -> Iterator[str]:
    """The fastest candidate of each kernel and rule, and the table's."""
    yield "tuning, fastest candidate (the table's)"
    trials = report["trials"]
    for kernel, rule in dict.fromkeys((t["kernel"], t["rule"]) for t in trials):
        mine = [t for t in trials if (t["kernel"], t["rule"]) == (kernel, rule)]
        timed = [t for t in mine if t["median_us"] is not None]
        best = min(timed, key=lambda t: t["median_us"], default=None)
        table = next((t for t in timed if t["current"]), None)
        times = [f"{t['config']} {t['median_us']:.1f} us" if t else "-" for t in (best, table)]
        yield f"  {kernel:24} rule {rule} {times[0]} ({times[1]})"
    yield from (f"  FAULT {t['kernel']} {t['config']}: {t['fault']}" for t in trials if t["fault"])


def summary(folder: Path) -> str:
    """Lines for all stages that left results."""
    lines: list[str] = []
    if (folder / "correct.jsonl").exists():
        lines += correct_lines(folder / "correct.jsonl")
    files = [folder / f"{stage}.json" for stage in STAGES]
    # a stage that could not time anything leaves no file
    measured = [path for path in files if path.exists()]
    if measured:
        run = Run.of(measured)
        lines += [*machine_lines(run), *summary_lines(run)]
    if (folder / "tune.json").exists():
        lines += tune_lines(json.loads((folder / "tune.json").read_text(encoding="utf-8")))
    return "\n".join(lines)


if __name__ == "__main__":
    print(summary(Path(sys.argv[1])))
