"""The only room that imports Ray: connection, actors, merge tree, Ray Train."""

from fisher_ray.runtime.pool import Pool
from fisher_ray.runtime.session import Session

__all__ = ["Pool", "Session"]
