"""What is asked of a finished run: which training samples something is like, and which labels look wrong."""

from __future__ import annotations

import os
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, PositiveInt, model_validator

from fisher_ray.config.section import Section
from fisher_ray.config.sections import SourceConfig

By: TypeAlias = Literal["kernel", "cosine", "class_gap", "influence", "ridge"]


class ScoreConfig(Section):
    """Queries, and by what every training sample is scored for each of them."""

    called = "question"

    queries: Literal["test", "shallow"] | SourceConfig = "test"
    """A split of the run, or samples from elsewhere, described as under ``data``."""
    rows: tuple[int, int] | None = None
    """Of the queries, ``[first, last)``; ``null``: all."""
    by: By = "kernel"
    """``kernel``: dot products of features, the Fisher kernel; ``cosine``: the same of features of length one;
    ``class_gap``: cosines in the coordinates in which samples of one class are more alike than others; ``influence``:
    on the network, by its Fisher; ``ridge``: on the linear model, exactly."""
    top: PositiveInt = 10
    """Training samples that are listed for each query, at either end."""
    target: Literal["label", "taken"] = "label"
    """Of ``influence`` and ``ridge``: on the query's own class, or on the one that the network takes it for."""
    full: bool = False
    """Whether the score of every training sample is kept, too."""
    index: str | None = None
    """Search approximately, in a FAISS index made by this factory string, such as ``IVF64,Flat``, which is kept with
    the run; of ``kernel`` and ``cosine``. ``null``: exactly."""
    index_parameters: str | None = None
    """Of FAISS, such as ``nprobe=16``: more finds more, and takes longer."""

    @model_validator(mode="after")
    def _check(self) -> ScoreConfig:
        if self.rows is not None and not 0 <= self.rows[0] < self.rows[1]:
            raise ValueError(f"rows {list(self.rows)} are none. Give [first, last), first < last")
        if self.target != "label" and self.by not in ("influence", "ridge"):
            raise ValueError(f"target {self.target} is of influence and ridge, not of {self.by}. Leave it out")
        if self.index is not None and (self.by not in ("kernel", "cosine") or self.full):
            raise ValueError(f"an index finds the highest scores by kernel or cosine, not {self.by}, nor all (full)")
        if self.index is None and self.index_parameters is not None:
            raise ValueError("index_parameters are of an index. Give index, too")
        return self

    def located(self) -> ScoreConfig:
        """Return this request with a relative path of its own joined to the working directory."""
        queries = self.queries
        if isinstance(queries, str) or queries.path is None or "://" in queries.path:
            return self
        return self.model_copy(update={"queries": queries.model_copy(update={"path": os.path.abspath(queries.path)})})

    @property
    def store(self) -> str | None:
        """The run's store that has the queries' features; None if they are still to be made."""
        if not isinstance(self.queries, str):
            return None
        return {"test": "features/test.zarr", "shallow": "features/train.zarr"}[self.queries]


class AuditConfig(Section):
    """How suspected labels are listed."""

    top: Annotated[int, Field(ge=1)] = 1000
    """Training samples that are listed, the most suspected first."""
