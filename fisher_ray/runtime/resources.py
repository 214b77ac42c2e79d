"""What a worker needs, and what the cluster has."""

from __future__ import annotations

import math
from typing import Any

import ray

from fisher_ray.config import Config


def gpus_per_worker(config: Config) -> float:
    """Return the GPUs of one worker: as configured, or one where the cluster has any."""
    asked = config.runtime.gpus_per_worker
    if asked != "auto":
        return float(asked)
    return 1.0 if cluster_resources().get("GPU", 0) >= 1 else 0.0


def num_workers(config: Config, gpus: float) -> int:
    """Return how many workers there are to be: as configured, or as many as there is room for, at least one."""
    asked = config.runtime.num_workers
    if asked != "auto":
        return int(asked)
    return max(1, fitting(config, gpus, cluster_resources()))


def fitting(config: Config, gpus: float, resources: dict[str, float]) -> int:
    """Return how many workers with ``gpus`` each ``resources`` are enough for."""
    return math.floor(min(resources.get(name, 0.0) / amount for name, amount in needs(config, gpus).items()) + 1e-9)


def needs(config: Config, gpus: float) -> dict[str, float]:
    """Return what one worker takes, by the resource's name.

    One with a GPU takes no CPU: where GPUs hold every CPU, nothing else of Ray's can ever start.
    """
    own = {"GPU": gpus} if gpus else {"CPU": float(config.runtime.cpus_per_worker)}
    return {**own, **config.runtime.resources}


def actor_options(config: Config, gpus: float, environment: dict[str, str]) -> dict[str, Any]:
    """Return the options of one worker's actor.

    Args:
        config: the run's.
        gpus: of each worker.
        environment: variables of the worker's process; those of ``runtime.runtime_env`` come on top.
    """
    runtime_env = dict(config.runtime.runtime_env)
    runtime_env["env_vars"] = {**environment, **runtime_env.get("env_vars", {})}
    return {
        "num_gpus": gpus,
        "num_cpus": 0 if gpus else config.runtime.cpus_per_worker,
        "resources": dict(config.runtime.resources),
        "scheduling_strategy": "SPREAD" if config.runtime.placement == "spread" else "DEFAULT",
        "runtime_env": runtime_env,
        "max_restarts": 0,
        "max_task_retries": 0,
    }


def wanted(config: Config, gpus: float) -> str:
    """Say what each worker needs, and what the cluster has."""
    each = needs(config, gpus)
    has = cluster_resources()
    return (
        f"each needs {_listed(each)}, the cluster has "
        f"{_listed({name: has.get(name, 0.0) for name in dict.fromkeys(('CPU', 'GPU', *each))})}"
    )


def cluster_resources() -> dict[str, float]:
    """Return what all machines have together."""
    return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]


def free_resources() -> dict[str, float]:
    """Return what nobody holds just now."""
    return dict(ray.available_resources())  # type: ignore[no-untyped-call]


def _listed(amounts: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items())
