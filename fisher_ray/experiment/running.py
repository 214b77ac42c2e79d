"""An experiment's runs, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection

from fisher_ray import pipeline
from fisher_ray.errors import FisherRayError, StoppedError
from fisher_ray.experiment.settings import Experiment, Planned
from fisher_ray.records import Progress


def run_experiment(
    experiment: Experiment,
    planned: Collection[Planned],
    overrides: list[str],
    address: str | None = None,
    *,
    progress: Progress | None = None,
    told: Callable[[str], None] = lambda text: None,
) -> dict[Planned, str]:
    """Make the runs that are not finished yet; all snapshots of a seed are trained first, in one training.

    Args:
        experiment: what they belong to.
        planned: those of its runs that are to be made.
        overrides: for the run's configuration, as in ``a.b=value``.
        address: as of :func:`fisher_ray.run`.
        progress: likewise.
        told: hears of each run before it begins.

    Returns:
        What stopped the runs that failed; the others went on.

    Raises:
        ConfigError: if a configuration is wrong, before any work.
        StoppedError: if the experiment ended early; run it again to resume.
    """
    configs = {item: experiment.config(item, overrides) for item in planned}
    bases = {seed: experiment.base_config(seed, overrides) for seed in dict.fromkeys(item.seed for item in planned)}
    failed: dict[Planned, str] = {}
    for seed in bases:
        told(f"base networks of seed {seed}")
        try:
            pipeline.run(bases[seed], address, until="base", progress=progress)
        except StoppedError:
            raise
        except FisherRayError as error:
            failed |= {item: f"its base network: {error}" for item in planned if item.seed == seed}
            told(f"base networks of seed {seed} failed: {error}")
            continue
        for number, (item, config) in enumerate(configs.items(), start=1):
            if item.seed != seed:
                continue
            told(f"{item.folder} ({number} of {len(configs)})")
            try:
                pipeline.run(config, address, progress=progress)
            except StoppedError:
                raise
            except FisherRayError as error:
                failed[item] = str(error)
                told(f"{item.folder} failed: {error}")
    return failed
