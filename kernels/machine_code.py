"""What a kernel's machine code spends its instructions on, read from the disassembler's text.

The loops of a program are found in its control flow, and the instructions of each innermost loop
are counted by the unit that executes them. A kernel without a loop is counted as a whole. What a
branch inside a loop may skip is counted separately: attention's tiles below the diagonal skip the
mask.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

# the report splits counts by executing unit, from the beginning of the opcode (SASS, sm_80 on)
UNITS: dict[str, tuple[str, ...]] = {
    unit: tuple(heads.split())
    for unit, heads in (
        ("tensor", "HGMMA HMMA IGMMA QGMMA IMMA QMMA UTC"),
        ("mufu", "MUFU"),
        ("memory", "LD ST ATOM RED UTMA UBLKCP CCTL"),
        ("barrier", "BAR MEMBAR DEPBAR WARPGROUP WARPSYNC SYNCS FENCE ERRBAR"),
        (
            "fp32",
            "FADD FMUL FFMA FMNMX FSEL FSET FCHK F2F HADD HMUL HFMA HMNMX HSET DADD DMUL DFMA",
        ),
        ("control", "BRA EXIT BSSY BSYNC CALL RET NOP BREAK JMP BRX YIELD"),
    )
}
# integers, addresses, moves, predicates, conversions and shuffles are all that is left
OTHER = "integer"
SPLIT = ("tensor", "fp32", "mufu", OTHER, "memory", "barrier", "control")

_LABEL = re.compile(r"^(\.L_x_\d+|\.L_\d+):")
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P[0-9T]+\s+)?([A-Z0-9_.]+)([^;]*);?"
)
_TARGET = re.compile(r"`\((\.L_x_\d+|\.L_\d+)\)")
_ENDS = ("EXIT", "RET", "BRX", "JMX")


@dataclass(frozen=True)
class Count:
    """Instructions per warp by unit, and how many of them a branch may skip."""

    units: Mapping[str, int]
    skipped: int

    @property
    def instructions(self) -> int:
        """All of them, on the longest path."""
        return sum(self.units.values())


@dataclass(frozen=True)
class _Instruction:
    opcode: str
    predicate: str
    target: str | None


def unit_of(opcode: str) -> str:
    """Which unit executes an opcode such as ``FFMA.FTZ``."""
    return next((unit for unit, heads in UNITS.items() if opcode.startswith(heads)), OTHER)


def _parse(sass: str) -> tuple[list[_Instruction], dict[str, int]]:
    instructions: list[_Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            predicate, opcode, operands = found.groups()
            branch = _TARGET.search(operands) if opcode.startswith("BRA") else None
            instructions.append(
                _Instruction(opcode, (predicate or "").strip(), branch[1] if branch else None)
            )
    return instructions, labels


class _Graph:
    """Basic blocks as ranges of instructions, and who follows whom."""

    def __init__(self, instructions: Sequence[_Instruction], labels: Mapping[str, int]) -> None:
        self.instructions = instructions
        ends = {i + 1 for i, x in enumerate(instructions) if x.target or x.opcode.startswith(_ENDS)}
        targets = {labels[x.target] for x in instructions if x.target}
        starts = sorted({0, *ends, *targets} - {len(instructions)})
        self.blocks = list(pairwise([*starts, len(instructions)]))
        number = {start: i for i, (start, _) in enumerate(self.blocks)}
        self.follow: list[list[int]] = []
        for i, (_, end) in enumerate(self.blocks):
            last = instructions[end - 1]
            goes_on = bool(last.predicate) or not (last.target or last.opcode.startswith(_ENDS))
            after = [i + 1] if goes_on and i + 1 < len(self.blocks) else []
            if last.target:
                after.append(number[labels[last.target]])
            self.follow.append(after)

    def reachable(self, start: int, without: int | None = None) -> set[int]:
        """The blocks that ``start`` can reach, itself included, without passing ``without``."""
        seen: set[int] = set()
        todo = [start]
        while todo:
            block = todo.pop()
            if block not in seen and block != without:
                seen.add(block)
                todo += self.follow[block]
        return seen

    def loops(self) -> list[set[int]]:
        """The innermost loops, in the program's order: each a set of blocks."""
        alive = self.reachable(0)
        loops: dict[int, set[int]] = {}
        for latch in sorted(alive):
            for head in self.follow[latch]:
                # a back edge: every path to its source passes its target
                if head == latch or (head in alive and latch not in self.reachable(0, head)):
                    body = {b for b in alive if latch in self.reachable(b, head)} | {head, latch}
                    inside = {b for b in body if b == head or b not in self.reachable(0, head)}
                    loops[head] = loops.get(head, set()) | inside
        return [
            body
            for head, body in sorted(loops.items())
            if not any(other in body for other in loops if other != head)
        ]

    def count(self, blocks: set[int]) -> Counter[str]:
        """Instructions of these blocks by unit."""
        return Counter(
            unit_of(self.instructions[i].opcode)
            for start, end in (self.blocks[b] for b in blocks)
            for i in range(start, end)
        )

    def skippable(self, loop: set[int]) -> int:
        """Instructions of a loop that lie on some paths around it and not on others."""
        head = min(loop)
        back = {b for b in loop if head in self.follow[b]}
        needed = set()
        for block in loop:
            # without it, is there still a path from the head to a branch back?
            if block == head or not any(b in self._within(loop, head, block) for b in back):
                needed.add(block)
        return sum(self.count(loop - needed).values())

    def _within(self, loop: set[int], start: int, without: int) -> set[int]:
        seen: set[int] = set()
        todo = [start]
        while todo:
            block = todo.pop()
            if block in loop and block not in seen and block != without:
                seen.add(block)
                todo += [b for b in self.follow[block] if b != start]
        return seen


def count_loops(sass: str) -> list[Count]:
    """The innermost loops of a program, or the whole program as one where it has no loop."""
    graph = _Graph(*_parse(sass))
    loops = graph.loops()
    if not loops:
        return [Count(graph.count(graph.reachable(0)), 0)]
    return [Count(graph.count(loop), graph.skippable(loop)) for loop in loops]
