"""Small wrong edits of the kernels, each of which some test must reject.

One module per op lists its ``MUTANTS``; ``python -m tests.kernels.mutants.run`` tries them all.
"""

from dataclasses import dataclass

# asks every op for a gradient of its gradient
SECOND_DERIVATIVES = (
    "tests/kernels/test_arguments.py::test_a_gradient_of_the_gradient_is_right_or_refused"
)


@dataclass(frozen=True)
class Mutant:
    """One wrong edit and the tests that should notice it.

    Attributes:
        name: unique within its op, such as ``diagonal_off_by_one``.
        path: of the file, from the repository root.
        old: text that occurs exactly once in it.
        new: what replaces it.
        tests: pytest node ids, from the repository root.
        why: what the edit breaks.
    """

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str = ""


class StaleMutant(ValueError):
    """The text that a mutant replaces does not occur exactly once: the list needs an update."""


def mutate(mutant: Mutant, source: str) -> str:
    """``source`` with the wrong edit in it.

    Raises:
        StaleMutant: the old text does not occur exactly once, or the edit changes nothing.
    """
    count = source.count(mutant.old)
    if count != 1 or mutant.old == mutant.new:
        raise StaleMutant(f"{mutant.name}: {mutant.old!r} occurs {count} times in {mutant.path}")
    return source.replace(mutant.old, mutant.new)
