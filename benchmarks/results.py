"""Results of a run of the suite, read from pytest-benchmark's JSON; comparison of two runs."""

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import hypot
from pathlib import Path
from typing import Any, Self

from fastgpt2.errors import UserError

# repeated runs on a quiet machine may differ by this much, however close their own samples are
LEAST_NOISE = 0.05


@dataclass(frozen=True)
class Entry:
    """One contender in one race: times in seconds, and the benchmark's facts."""

    group: str
    contender: str
    ours: bool
    median: float
    p20: float
    p80: float
    rounds: int
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def spread(self) -> float:
        """Width from the 20th to the 80th percentile, as a share of the median."""
        return (self.p80 - self.p20) / self.median

    @property
    def form(self) -> str:
        """``eager`` or ``compiled``: only equal forms are compared."""
        guess = "compiled" if self.contender.endswith(" compiled") else "eager"
        return str(self.facts.get("form", guess))

    @property
    def mode(self) -> str:
        """The pass of an op, or empty: only equal passes are compared."""
        return str(self.facts.get("mode", ""))


@dataclass(frozen=True)
class Run:
    """All results of a machine from one run, or from several files of one commit."""

    machine: dict[str, Any]
    ceilings: dict[str, Any]
    entries: tuple[Entry, ...]

    @property
    def slug(self) -> str:
        """The machine, as a file's name."""
        device, cpu = self.machine["device"], self.machine["cpu_model"]
        cores = f" {self.machine['cores']} cores" if device == cpu else ""
        return re.sub(r"[^a-z0-9]+", "-", f"{device}{cores}".lower()).strip("-")

    @property
    def date(self) -> str:
        """Year, month, day."""
        return str(self.machine["date"]).split()[0]

    def groups(self) -> dict[str, list[Entry]]:
        """Entries by race, in the order in which they were measured."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.group, []).append(entry)
        return found

    def dump(self) -> str:
        """As JSON, which ``parse`` reads."""
        record = {
            "machine": self.machine,
            "ceilings": self.ceilings,
            "entries": [asdict(entry) for entry in self.entries],
        }
        return json.dumps(record, indent=1) + "\n"

    @classmethod
    def parse(cls, text: str, name: str) -> Self:
        """What ``dump`` wrote.

        Raises:
            UserError: the text is something else; the message names ``name``.
        """
        record = _parse(text, name)
        try:
            entries = tuple(Entry(**entry) for entry in record["entries"])
            return cls(record["machine"], record["ceilings"], entries)
        except (KeyError, TypeError) as error:
            raise UserError(f"{name}: not a result of benchmarks.report: {error!r}") from None

    @classmethod
    def of(cls, paths: Sequence[Path]) -> Self:
        """From pytest-benchmark's files of one machine; a later file's times replace earlier ones.

        Raises:
            UserError: a file is not there, not of this suite, or of another machine than the first.
        """
        entries: dict[tuple[str, str], Entry] = {}
        runs = [_from_benchmarks(path) for path in paths]
        for machine, _, found in runs:
            if machine["device"] != runs[0][0]["device"]:
                raise UserError(
                    f"report: results of two machines: {runs[0][0]['device']}, {machine['device']}"
                )
            entries |= {(entry.group, entry.contender): entry for entry in found}
        machine, ceilings, _ = runs[-1]
        return cls(machine, ceilings, tuple(entries.values()))


def _parse(text: str | bytes, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{name}: no JSON: {error}") from None


def _read(path: Path) -> Any:
    try:
        return _parse(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _from_benchmarks(path: Path) -> tuple[dict[str, Any], dict[str, Any], list[Entry]]:
    record = _read(path)
    try:
        machine = {
            key: value
            for key, value in record["machine_info"].items()
            # leave out the hundreds of processor flags that pytest-benchmark adds
            if not isinstance(value, dict)
        }
        entries = []
        for benchmark in record["benchmarks"]:
            info = dict(benchmark["extra_info"])
            contender, ours = info.pop("contender"), info.pop("ours")
            p20, p80 = info.pop("p20"), info.pop("p80")
            stats = benchmark["stats"]
            entries.append(
                Entry(
                    benchmark["group"],
                    contender,
                    ours,
                    stats["median"],
                    p20,
                    p80,
                    stats["rounds"],
                    info,
                )
            )
        return machine, record["ceilings"], entries
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a result of `pytest benchmarks`: {error!r}") from None


def baseline(entry: Entry, group: Iterable[Entry]) -> Entry | None:
    """The entry of ours that others are compared with: same race, same pass.

    It is the first one with the same form, eager or compiled, or else the first.
    """
    ours = [other for other in group if other.ours and other.mode == entry.mode]
    return next((other for other in ours if other.form == entry.form), next(iter(ours), None))


@dataclass(frozen=True)
class Ratio:
    """A rival's time over ours, with the range that the percentiles allow.

    Attributes:
        value: the rival's median over ours.
        low: the rival's 20th percentile over our 80th.
        high: the rival's 80th percentile over our 20th.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, rival: Entry, ours: Entry) -> Self:
        """From two entries of one race."""
        return cls(rival.median / ours.median, rival.p20 / ours.p80, rival.p80 / ours.p20)

    @property
    def is_difference(self) -> bool:
        """False if the samples spread wider than the difference: both may be equally fast."""
        return not self.low <= 1.0 <= self.high


@dataclass(frozen=True)
class Change:
    """One of our benchmarks compared with the last result of the same machine.

    Attributes:
        ratio: time now over time before, corrected for the machine's drift.
        noise: the ratio may exceed 1 by this much without significance.
    """

    entry: Entry
    before: Entry
    drift: float
    ratio: float
    noise: float

    @property
    def is_slower(self) -> bool:
        """Whether it is slower by more than the noise."""
        return self.ratio > 1 + self.noise

    def line(self) -> str:
        """The change as one line."""
        return (
            f"SLOWER {self.entry.group}: {self.entry.contender} takes {self.ratio:.2f}x as long: "
            f"{self.before.median * 1e3:.3f} ms before, {self.entry.median * 1e3:.3f} ms now, "
            f"rivals' drift {self.drift:.2f}x, noise {self.noise:.0%}"
        )


def compare(now: Run, before: Run) -> list[Change]:
    """Compare each of our benchmarks that both runs have.

    The drift is the median ratio of the rivals in the same race, whose code has not changed: a
    busier machine slows them as well. Without rivals it is 1. The noise adds the two runs' spreads
    (20th to 80th percentile over median) and the drift's as independent errors; it is at least
    ``LEAST_NOISE``.
    """
    old: Mapping[tuple[str, str], Entry] = {(e.group, e.contender): e for e in before.entries}
    changes = []
    for group in now.groups().values():
        for entry in group:
            then = old.get((entry.group, entry.contender))
            if not entry.ours or then is None:
                continue
            rivals = [
                (rival, old[rival.group, rival.contender])
                for rival in group
                if not rival.ours
                and rival.mode == entry.mode
                and (rival.group, rival.contender) in old
            ]
            ratios = [new.median / previous.median for new, previous in rivals]
            drift = statistics.median(ratios) if ratios else 1.0
            drift_spreads = [hypot(new.spread, previous.spread) for new, previous in rivals]
            drift_spread = statistics.median(drift_spreads) if drift_spreads else 0.0
            noise = hypot(entry.spread, then.spread, drift_spread)
            ratio = entry.median / (then.median * drift)
            changes.append(Change(entry, then, drift, ratio, max(noise, LEAST_NOISE)))
    return changes
