"""The rows of the kernel report: what follows from a binary, what is a fault, what is shown."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from fastgpt2.kernels.cases import CompileCase, Work
from fastgpt2.kernels.gpus import ARCHITECTURES, COPY_SHARE, GPU, occupancy, resident_blocks
from fastgpt2.kernels.machine_code import SPLIT

# a check fails where there are more than 5 % more instructions than expected
GROWTH = 1.05


def row_name(kernel: str, config: str, arch: str) -> str:
    """What a row is called in the expectation."""
    return f"{kernel} | {config} | {arch}"


def arch_of(name: str) -> str:
    """The architecture in a ``row_name``."""
    return name.rpartition(" | ")[2]


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
    # ``binary_key``
    binary: str = ""

    @classmethod
    def of(cls, case: CompileCase, arch: str, found: Mapping[str, Any], binary: str = "") -> "Row":
        """The row of a case, given the fields of its ``Resources`` or an ``error``, and its key."""
        names = ("num_warps", "wants_mma", "flops", "bytes", "work", "per_sm")
        stated = {name: getattr(case, name) for name in names}
        return cls(case.name, case.config, arch, **stated, **found, binary=binary)

    @property
    def key(self) -> str:
        """The row's name in the expectation."""
        return row_name(self.kernel, self.config, self.arch)

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


# recorded properties of a binary; its units follow, in the order of SPLIT
_RECORDED = ("registers", "spill_bytes", "shared_bytes", "mma", "serialized", "skipped")


def expectation(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """What a later check holds these rows against; those that do not compile are left out."""
    return {
        row.key: {name: getattr(row, name) for name in _RECORDED}
        | {
            "units": [row.units.get(unit, 0) for unit in SPLIT if row.units],
            "instructions": row.instructions,
            "binary": row.binary,
        }
        for row in rows
        if not row.error
    }


def resources(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``Resources`` that an entry of the expectation records."""
    found = {name: entry[name] for name in _RECORDED}
    return found | {"units": dict(zip(SPLIT, entry["units"], strict=False))}


def _is_recorded(row: Row, entry: dict[str, Any]) -> bool:
    """False for a row with the key of this entry and other numbers."""
    return row.binary != entry.get("binary") or resources(entry) == {
        name: getattr(row, name) for name in (*_RECORDED, "units")
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
        if row.binary and not _is_recorded(row, before):
            found.append(f"{row.key}: recompiled, it differs from the record; --update --all")
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
    stale = sorted(key for key in gone if arch_of(key) in archs)
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


def _most(rows: Sequence[Row]) -> str:
    """Registers and, if any, spill bytes of the rows that need most."""
    if not rows:
        return "-"
    if any(row.error for row in rows):
        return "does not compile"
    spilled = max(row.spill_bytes for row in rows)
    return f"{max(row.registers for row in rows)}{f' ({spilled})' if spilled else ''}"


def overview(rows: Sequence[Row]) -> list[str]:
    """A table with a line for each kernel and a column for each architecture."""
    archs = [arch for arch in ARCHITECTURES if any(row.arch == arch for row in rows)]
    cells: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        of_kernel = cells.setdefault(row.kernel, {arch: [] for arch in archs})
        of_kernel[row.arch].append(row)
    return [
        f"| kernel | {' | '.join(archs)} |",
        f"| --- |{' ---: |' * len(archs)}",
        *(f"| {name} | {' | '.join(map(_most, of.values()))} |" for name, of in cells.items()),
    ]


def render(rows: Sequence[Row], gpus: dict[str, GPU], detailed: Collection[str]) -> str:
    """The report as Markdown.

    Args:
        rows: of all architectures that the overview shows.
        gpus: the product whose rates stand for each architecture.
        detailed: the architectures whose every configuration has a line.
    """
    compiler = metadata.version("triton")
    shown = [row for row in rows if row.arch in detailed]
    used = [gpus[arch] for arch in ARCHITECTURES if any(row.arch == arch for row in shown)]
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
        "",
        "## Every kernel on every architecture",
        "",
        "Registers of a thread in the configuration that needs most, and in parentheses the bytes",
        "that a thread spills where any configuration does. `-`: refused there, PyTorch runs.",
        "",
        *overview(rows),
        "",
        f"## Every configuration on {', '.join(gpu.arch for gpu in used)}",
        "",
        "Registers and spill bytes are per thread, shared memory is bytes per block. Occupancy and",
        "the blocks resident on a multiprocessor are estimated from them; waves are the blocks",
        "launched at the stated shape over those resident on the whole GPU. `--arch` prints the",
        "same table for other architectures.",
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
        *(format_row(row, gpus[row.arch]) for row in shown),
        "",
    ]
    return "\n".join(lines)
