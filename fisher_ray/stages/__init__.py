"""One unit's work as plain functions: what an actor runs, and what runs in-process."""

from fisher_ray.stages.facts import Facts
from fisher_ray.stages.workbench import Workbench, inspect_request

__all__ = ["Facts", "Workbench", "inspect_request"]
