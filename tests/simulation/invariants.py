"""What holds for every run, whatever happens to it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from tests.simulation.sums import as_text, merged

ROWS = "every row is in the sum once"
TREE = "sums are merged along the fixed tree"
WRITTEN = "every unit is written, and heard of once"
ENDS = "the run ends, or stops with the right error"
BOUNDED = "what a worker has in hands, and what is held, has a bound"
EXCLUDED = "the rows that are left out are those that are broken"
ALL = (ROWS, TREE, WRITTEN, ENDS, BOUNDED, EXCLUDED)


class BrokenError(AssertionError):
    """An invariant does not hold."""

    def __init__(self, invariant: str, what: str) -> None:
        super().__init__(f"{invariant}: {what}")
        self.invariant = invariant


def check(invariant: str, holds: bool, what: str) -> None:
    if not holds:
        raise BrokenError(invariant, what)


def check_sum(value: str, units: Sequence[Sequence[int]]) -> None:
    """The sum's expression holds the rows of the units, and is the fixed tree's."""
    found = Counter(int(number) for number in re.findall(r"\d+", value))
    wanted = Counter(row for rows in units for row in rows)
    check(ROWS, found == wanted, f"missing {wanted - found}, too often {found - wanted}")
    check(TREE, value == merged([str(list(rows)) for rows in units], as_text), value)


def check_written(written: Mapping[int, Sequence[int]], units: Sequence[Sequence[int]]) -> None:
    """What readers would see of every unit is its rows."""
    for index, rows in enumerate(units):
        found = written.get(index)
        check(WRITTEN, found is not None and list(found) == list(rows), f"unit {index} is {found}, not {list(rows)}")


def check_heard(heard: Counter[int], wanted: Iterable[int]) -> None:
    """Every finished unit was heard of once."""
    check(WRITTEN, heard == Counter(wanted), f"heard of units {dict(heard)}")


def check_excluded(excluded: Iterable[int], broken: Iterable[int], excused: Iterable[int], certain: bool) -> None:
    """Broken rows are left out, and no others, unless their worker was lost each time they were tried alone.

    Args:
        excluded: rows that were left out.
        broken: rows that fail.
        excused: rows that seemed to.
        certain: whether broken rows fail with every worker.
    """
    left_out, wrong = set(excluded), set(broken)
    if certain:
        check(EXCLUDED, wrong <= left_out, f"broken rows {sorted(wrong - left_out)} are not left out")
    good = left_out - wrong - set(excused)
    check(EXCLUDED, not good, f"rows {sorted(good)} are left out")
