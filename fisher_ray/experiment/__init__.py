"""Many runs as one: snapshots of the base network, seeds and views, and what their results say together."""

from fisher_ray.experiment.collecting import collect
from fisher_ray.experiment.page import write_comparison
from fisher_ray.experiment.running import run_experiment
from fisher_ray.experiment.settings import Experiment, Planned

__all__ = ["Experiment", "Planned", "collect", "run_experiment", "write_comparison"]
