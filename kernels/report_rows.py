"""The rows of the kernel report: what follows from a binary, what is a fault, what is shown."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from fastgpt2.kernels.cases import CompileCase, Work
from fastgpt2.kernels.gpus import ARCHITECTURES, COPY_SHARE, GPU, occupancy, resident_blocks
from fastgpt2.kernels.machine_code import SPLIT

# a check fails where there are more than 5 % more instructions than expected
GROWTH = 1.05


@dataclass(frozen=True)
class Row:
    """What one kernel and configuration needs on one architecture, or why it did not build."""

    kernel: str
    config: str
    arch: str
    num_warps: int
    wants_mma: bool
    flops: float
    bytes: float
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    mma: str = ""
    serialized: bool = False
    units: Mapping[str, int] = field(default_factory=dict)
    skipped: int = 0
    error: str = ""
    work: Work = Work(1.0)  # noqa: RUF009
    per_sm: int = 0

    @classmethod
    def of(cls, case: CompileCase, arch: str, found: dict[str, Any]) -> "Row":
        """The row of a case, given the fields of its ``Resources`` or an ``error``."""
        names = ("num_warps", "wants_mma", "flops", "bytes", "work", "per_sm")
        stated = {name: getattr(case, name) for name in names}
        return cls(case.name, case.config, arch, **stated, **found)

    @property
    def key(self) -> str:
        """The row's name in the expectation."""
        return f"{self.kernel} | {self.config} | {self.arch}"

    def per_unit(self, instructions: float) -> float:
        """Instructions of the loops as those per tile and warp, or per element and thread."""
        if self.work.unit == "tile":
            return instructions
        return instructions * 32 * self.num_warps / self.work.turn

    @property
    def instructions(self) -> float:
        """Per unit of work, on the longest way; 0 where the machine code is not read."""
        return round(self.per_unit(sum(self.units.values())), 1)

    @property
    def warp_instructions(self) -> float:
        """All that the launch issues, prologues and epilogues of kernels with a loop aside."""
        turns = self.work.units / self.work.turn
        everything = turns * sum(self.units.values())
        return self.num_warps * (everything - (turns - self.work.crossing) * self.skipped)

    @property
    def resident(self) -> int:
        """Blocks that fit on a multiprocessor at a time."""
        return resident_blocks(self.arch, self.registers, self.shared_bytes, self.num_warps)


def expectation(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """What a later check holds these rows against."""
    return {
        row.key: {
            "mma": row.mma,
            "spill_bytes": row.spill_bytes,
            "serialized": row.serialized,
            "instructions": row.instructions,
        }
        for row in rows
    }


def violations(rows: Sequence[Row], expected: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each way in which a row is worse than expected or cannot run at all."""
    found = []
    for row in rows:
        limit = ARCHITECTURES[row.arch].block_shared
        before = expected.get(row.key)
        if row.error:
            found.append(f"{row.key}: does not compile: {row.error}")
            continue
        if row.shared_bytes > limit:
            found.append(f"{row.key}: {row.shared_bytes} bytes of shared memory, limit {limit}")
        if before is None:
            found.append(f"{row.key}: not in the expectation; record it with --update")
            continue
        if row.spill_bytes > before["spill_bytes"]:
            found.append(f"{row.key}: spills {row.spill_bytes} bytes, not {before['spill_bytes']}")
        if row.mma != before["mma"]:
            found.append(f"{row.key}: uses {row.mma or 'no mma'}, not {before['mma'] or 'none'}")
        # a count that has not been recorded yet is compared from the next --update on
        if row.instructions > GROWTH * before.get("instructions", math.inf):
            found.append(
                f"{row.key}: {row.instructions} instructions per {row.work.unit}, "
                f"not {before['instructions']}"
            )
        if row.per_sm > row.resident:
            found.append(
                f"{row.key}: launches {row.per_sm} blocks per multiprocessor, {row.resident} fit"
            )
        if row.serialized and not before["serialized"]:
            found.append(f"{row.key}: ptxas serialises its wgmma instructions")
    archs = {row.arch for row in rows}
    gone = set(expected) - {row.key for row in rows}
    stale = sorted(key for key in gone if key.rpartition(" | ")[2] in archs)
    return found + [f"{key}: expected, but no longer compiled; --update" for key in stale]


def _waves(row: Row, gpu: GPU) -> str:
    """How often the blocks launched fill the GPU; a launch that counts them fills it once."""
    if row.work.grid is None:
        return f"{row.per_sm / max(row.resident, 1):.2f}"
    return f"{row.work.grid / max(row.resident * gpu.multiprocessors, 1):.2f}"


def _counts(row: Row) -> str:
    """Instructions per unit (without what a branch may skip / with it), and their split."""
    if not row.units:
        return "- | -"
    total = f"{row.instructions:g}"
    if row.work.unit == "tile" and row.skipped:
        total = f"{row.instructions - row.skipped:g} / {total}"
    split = " ".join(f"{row.per_unit(row.units.get(unit, 0)):.3g}" for unit in SPLIT)
    return f"{total} per {row.work.unit} | {split}"


def format_row(row: Row, gpu: GPU) -> str:
    """The row as a line of the table."""
    if row.error:
        return f"| {row.kernel} | {row.config} | {row.arch} | does not compile: {row.error} |"
    filled = occupancy(row.arch, row.registers, row.shared_bytes, row.num_warps)
    time = gpu.roofline_us(row.flops if row.wants_mma else 0.0, row.bytes)
    issue = f"{gpu.issue_us(row.warp_instructions):.1f}" if row.units else "-"
    mma = f"{row.mma or '-'}{' (serialised)' if row.serialized else ''}"
    return (
        f"| {row.kernel} | {row.config} | {row.arch} | {row.registers} | {row.spill_bytes} "
        f"| {row.shared_bytes} | {mma} | {filled:.0%} | {row.resident} | {_waves(row, gpu)} "
        f"| {_counts(row)} | {issue} | {gpu.memory_us(row.bytes):.1f} | {time:.1f} |"
    )


HEAD = (
    "| kernel | config | arch | registers | spill | shared | mma | occupancy | blocks resident "
    f"| waves | instructions | {' '.join(SPLIT)} | issue us | memory us | roofline us |",
    "| --- | --- | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: "
    "| ---: |",
)


def render(rows: Sequence[Row], gpus: dict[str, GPU]) -> str:
    """The report as Markdown; ``gpus`` has the product whose rates stand for each architecture."""
    compiler = metadata.version("triton")
    used = [gpus[arch] for arch in ARCHITECTURES if any(row.arch == arch for row in rows)]
    products = "; ".join(
        f"{gpu.arch}: {gpu.name}, {gpu.tflops:g} TFLOP/s, {gpu.bandwidth:g} TB/s, "
        f"{gpu.multiprocessors} multiprocessors at {gpu.clock:g} GHz"
        for gpu in used
    )
    lines = [
        "# What the kernels need",
        "",
        "Written by `python -m fastgpt2.kernels.report`. Nothing here was executed: the numbers",
        f"are read from binaries that Triton {compiler} and its ptxas built without a GPU.",
        "Registers and spill bytes are per thread, shared memory is bytes per block. Occupancy and",
        "the blocks resident on a multiprocessor are estimated from them; waves are the blocks",
        "launched at the stated shape over those resident on the whole GPU.",
        "",
        "Instructions are those of the innermost loops: per warp and tile, or per thread and",
        "element; of a kernel without a loop, all. `284 / 362` is a tile that skips the loop's",
        "branches and one that takes them, as attention's below and on the diagonal. Then the same",
        f"split into {', '.join(SPLIT)} instructions.",
        "",
        "The model: every scheduler issues one instruction per clock (issue us), and memory moves",
        f"the stated bytes at {COPY_SHARE:.0%} of the data sheet's bandwidth (memory us). A kernel",
        "takes at least the longer of the two. The roofline is the data sheet's peak of products",
        f"and bandwidth. Microseconds, at the shape stated with each kernel ({products}).",
        "",
        *HEAD,
        *(format_row(row, gpus[row.arch]) for row in rows),
        "",
    ]
    return "\n".join(lines)
