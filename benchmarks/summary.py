"""``python -m benchmarks.summary FOLDER``: the short table of what ``on_gpu.sh`` has left there."""

import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def correct_lines(path: Path) -> Iterator[str]:
    """Counts, then the names of the tests that failed."""
    if not path.exists():
        return
    suite = ET.parse(path).getroot().find("testsuite")
    assert suite is not None
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    yield "correct: " + ", ".join(f"{count} {key}" for key, count in counts.items())
    for case in suite.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            yield f"  FAILED {case.get('classname')}::{case.get('name')}"


def kernel_lines(report: Any) -> Iterator[str]:
    """One line an op, shape and mode: our time, share of the roofline, and each rival's time."""
    ceilings = report["ceilings"]
    yield (
        f"kernels on {report['machine']['device']}: copy {ceilings['GB_per_s']:.0f} GB/s, "
        f"matmul {ceilings['TFLOP_per_s']:.0f} TFLOP/s; a rival's time in ours"
    )
    results = report["results"]
    for ours in (r for r in results if r["provider"] == "triton"):
        key = [ours[name] for name in ("op", "shape", "mode")]
        rivals = "  ".join(
            f"{r['provider']} {r['versus_triton']:.2f}x"
            for r in results
            if r["provider"] != "triton" and [r["op"], r["shape"], r["mode"]] == key
        )
        yield (
            f"  {key[0]:21} {key[1]:26} {key[2]:8} {ours['median_us']:9.1f} us "
            f"{ours['roofline']:5.0%}  {rivals}"
        )
    yield from (f"  {note}" for note in report["notes"])
    yield from (f"  WRONG {label}: {error}" for label, error in report["wrong"].items())


def step_lines(report: Any) -> Iterator[str]:
    """One line a contender: tokens per second, against ours, and memory."""
    yield f"training step, batch {report['batch']}"
    for r in report["results"]:
        rate = r["tokens"] / r["median_us"] * 1e6
        mfu = "-" if r["mfu"] is None else f"{r['mfu']:.1%}"
        memory = r["peak_bytes"] / 2**30
        yield f"  {r['name']:26} {rate:10,.0f} tok/s {mfu:>6} MFU {memory:6.1f} GiB"
    yield from (f"  {note}" for note in report["notes"])


def decode_lines(report: Any) -> Iterator[str]:
    """One line a contender and batch size."""
    yield f"decoding {report['new']} tokens after {report['prompt']}"
    for r in report["results"]:
        yield f"  {r['name']:26} batch {r['batch']:3} {r['tokens_per_s']:10,.0f} tok/s"


def tune_lines(report: Any) -> Iterator[str]:
    """The fastest candidate of each kernel and rule, against the table's."""
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
    """All stages that have left something."""
    lines = list(correct_lines(folder / "correct.xml"))
    makers = {
        "kernels": kernel_lines,
        "step": step_lines,
        "decode": decode_lines,
        "tune": tune_lines,
    }
    for stage, make in makers.items():
        report = _load(folder / f"{stage}.json")
        if report is not None:
            lines += make(report)
    return "\n".join(lines)


if __name__ == "__main__":
    print(summary(Path(sys.argv[1])))
