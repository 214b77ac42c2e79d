"""What an experiment is made of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fisher_ray.config import BaseConfig, Config, TrainedOnConfig, read_yaml
from fisher_ray.config.section import Section
from fisher_ray.errors import ConfigError

PositiveInt = Annotated[int, Field(gt=0, strict=True)]
Seed = Annotated[int, Field(ge=0, strict=True)]


@dataclass(frozen=True)
class Planned:
    """One run of an experiment.

    Attributes:
        steps: of the base network's training.
        seed: the run's.
        views: 1 or 2.
        workers: how many a run has that is made for its seconds alone; None for the others.
    """

    steps: int
    seed: int
    views: int
    workers: int | None = None

    @property
    def folder(self) -> str:
        """The run folder, below the experiment's."""
        timed = "" if self.workers is None else f"-workers-{self.workers}"
        return f"steps-{self.steps}/seed-{self.seed}/views-{self.views}{timed}"


class Experiment(Section):
    """Runs of one configuration from several snapshots of its base network, with several seeds and views."""

    output: str
    """Folder of the run folders and of what they say together: a local path or ``s3://bucket/prefix``."""
    run: str
    """A run's configuration, a YAML file; ``output``, ``seed``, ``base.steps`` and ``linear.views`` are replaced."""
    snapshots: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    """Steps of the base network's training."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    views: Annotated[tuple[Literal[1, 2], ...], Field(min_length=1)] = (1, 2)
    overrides: tuple[str, ...] = ()
    """For the run's configuration, as ``--set`` takes them, which come after these: ``trained_on.convergence={}``."""
    workers: tuple[PositiveInt, ...] = ()
    """Numbers of workers that the first seed's runs with the most views are made again with, for their seconds."""

    @classmethod
    def from_yaml(cls, path: str | Path) -> Experiment:
        """Read a YAML file.

        Raises:
            ConfigError: if it is missing, or breaks a rule.
        """
        return cls.checked(read_yaml(path))

    def planned(self) -> list[Planned]:
        """Return the runs, in order: all of one seed and snapshot follow each other."""
        every = [Planned(steps, seed, views) for seed in self.seeds for steps in self.snapshots for views in self.views]
        first, views = self.seeds[0], max(self.views)
        return every + [Planned(steps, first, views, number) for number in self.workers for steps in self.snapshots]

    def chosen(self, only: Sequence[str]) -> list[Planned]:
        """Return the runs that have all the values asked for; of several values of one key, any.

        Args:
            only: of the form ``steps=1800``, ``seed=0``, ``views=2`` or ``workers=1``.

        Raises:
            ConfigError: if one is not of that form, or no run is left.
        """
        asked: dict[str, set[str]] = {}
        for text in only:
            key, equals, value = text.partition("=")
            if not equals or key not in ("steps", "seed", "views", "workers"):
                raise ConfigError(f"--only {text!r} is not of the form steps=N, seed=N, views=N or workers=N")
            asked.setdefault(key, set()).add(value)
        every = self.planned()
        found = [run for run in every if all(str(getattr(run, key)) in values for key, values in asked.items())]
        if not found:
            raise ConfigError(f"no run is left of {len(every)}: --only {', '.join(only)}")
        return found

    def located(self) -> Experiment:
        """Return the experiment with a relative folder joined to the working directory."""
        place = self.output if "://" in self.output else os.path.abspath(self.output)
        return self.model_copy(update={"output": place})

    def base_folder(self, seed: int) -> str:
        """Return the run folder, below the experiment's, that one seed's base networks are trained in."""
        return f"base/seed-{seed}"

    def base_config(self, seed: int, overrides: list[str]) -> Config:
        """Return the configuration under which all snapshots of one seed are trained, in one training.

        Raises:
            ConfigError: if the run's configuration is wrong, or trains no base network.
        """
        values = self._values(overrides)
        base = {**self._base(values), "steps": max(self.snapshots), "snapshots": sorted(set(self.snapshots))}
        return Config.from_dict({**values, "seed": seed, "base": base, "output": self._url(self.base_folder(seed))})

    def config(self, planned: Planned, overrides: list[str]) -> Config:
        """Return the configuration of one run, which takes its base network from the training of all snapshots.

        Raises:
            ConfigError: as :meth:`base_config`.
        """
        values = self._values(overrides)
        base = BaseConfig.checked({**self._base(values), "steps": 1})
        checkpoint = f"{self._url(self.base_folder(planned.seed))}/base/step-{planned.steps}.safetensors"
        changed: dict[str, Any] = {
            "output": self._url(planned.folder),
            "seed": planned.seed,
            "base": None,
            "model": {**values["model"], "checkpoint": checkpoint},
            "linear": {**values.get("linear", {}), "views": planned.views},
            "trained_on": self._trained_on(values, base),
        }
        if planned.workers is not None:
            changed["trained_on"] = None
            changed["runtime"] = {**values.get("runtime", {}), "num_workers": planned.workers}
        return Config.from_dict({**values, **changed})

    def _values(self, overrides: list[str]) -> dict[str, Any]:
        return read_yaml(self.run, [f"output={self.output}", *self.overrides, *overrides])

    @staticmethod
    def _base(values: dict[str, Any]) -> dict[str, Any]:
        base = values.get("base")
        if not isinstance(base, dict):
            raise ConfigError("the run's configuration has no section 'base', whose snapshots are compared")
        return base

    @staticmethod
    def _trained_on(values: dict[str, Any], base: BaseConfig) -> dict[str, Any] | None:
        """Return the section with what it would take from ``base``, which these runs have not."""
        asked = values.get("trained_on", {})
        if asked is None:
            return None
        taken = {name: getattr(base, name) for name in TrainedOnConfig.model_fields if hasattr(base, name)}
        return {**taken, **{name: value for name, value in asked.items() if value is not None}}

    def _url(self, folder: str) -> str:
        return f"{self.output.rstrip('/')}/{folder}"
