from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fisher_ray
from tests.integration.runs import digits


@pytest.fixture(scope="session")
def undisturbed(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One run of every stage on two workers: its folder and its results."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    return output, fisher_ray.run(digits(output, "runtime.num_workers=2"))
