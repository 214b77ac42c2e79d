"""Taking a damaged store apart so far that its writers can make it whole again."""

from __future__ import annotations

from dataclasses import dataclass

from fisher_ray.storage import Storage
from fisher_ray.store.check import FOREIGN, find_problems
from fisher_ray.store.documents import read_layouts, read_root
from fisher_ray.store.layout import ROOT, SEAL, manifest_name
from fisher_ray.store.seal import manifest_units


@dataclass(frozen=True)
class Repair:
    """What was found, and what is to be done again.

    Attributes:
        problems: as :func:`~fisher_ray.store.verify` tells them.
        units: of a feature store, which have to be written again; None if everything has.
        foreign: files that are not the store's, which were left alone.
    """

    problems: list[str]
    units: list[int] | None
    foreign: list[str]

    @property
    def needed(self) -> bool:
        """Whether the store has to be written to again."""
        return len(self.problems) > len(self.foreign)


def repair(url: str) -> Repair:
    """Remove what is damaged of a store, its seal, and the manifests of the units that are concerned.

    Those units then count as not written: whoever writes them, and seals, makes the store whole again. A group of
    arrays, or a store whose own description is damaged, is removed as a whole. Foreign files stay.

    Raises:
        StoreError: if there is no store of this program at ``url``.
        StorageError: if storage does not answer.
    """
    storage = Storage(url)
    found = find_problems(storage)
    if [name for name, _ in found] == [SEAL] and storage.exists(SEAL):  # it tells nothing: look without it
        storage.remove(SEAL)
        found = [*found, *find_problems(storage)[1:]]
    foreign = [name for name, what in found if what.startswith(FOREIGN)]
    damaged = {name for name, what in found if not what.startswith(FOREIGN)}
    problems = [f"{name}: {what}" for name, what in found]
    if not damaged:
        return Repair(problems, [], foreign)
    units = None if ROOT in damaged else _units(storage, damaged)
    storage.remove(SEAL)  # first, so that nothing that is taken apart is ever believed
    if units is None:
        for name in storage.list():
            if name not in foreign:
                storage.remove(name)
        storage.remove_partials()
    else:
        for name in [*map(manifest_name, units), *sorted(damaged)]:
            storage.remove(name)
    return Repair(problems, units, foreign)


def _units(storage: Storage, damaged: set[str]) -> list[int] | None:
    """Return the units that damaged files belong to; None where there are no units."""
    own, _, _ = read_root(storage)
    if own["kind"] != "features":
        return None
    found = manifest_units(damaged)
    for layout in read_layouts(own).values():
        files = [file for file in range(layout.num_files) if layout.key(file) in damaged]
        found |= {layout.rows(layout.chunks(file).start).start // own["unit_rows"] for file in files}
    return sorted(found)
