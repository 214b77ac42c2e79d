"""The only room that imports Ray: connection, actors, merge tree, Ray Train; and the claim on a run folder."""

from fisher_ray.runtime.checkpoints import Checkpoints, remove_checkpoints
from fisher_ray.runtime.claim import Claim
from fisher_ray.runtime.crew import Crew
from fisher_ray.runtime.pool import Pool
from fisher_ray.runtime.session import Session
from fisher_ray.runtime.slices import num_slices

__all__ = ["Checkpoints", "Claim", "Crew", "Pool", "Session", "num_slices", "remove_checkpoints"]
