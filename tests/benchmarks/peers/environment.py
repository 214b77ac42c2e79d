"""A virtual environment with the other libraries, made once by pip and kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LIBRARIES = ("traker", "dattri", "logix-ai", "bergson")
DEPENDENCIES = (
    "torch>=2.6,<2.14",
    *("numpy", "scipy", "scikit-learn", "pandas", "pyyaml", "safetensors", "pillow", "tqdm", "tabulate"),
    *("accelerate", "datasets", "einops", "jaxtyping", "ml_dtypes", "natsort", "opt_einsum", "peft", "petname"),
    *("psutil", "simple-parsing", "transformers"),
)
"""What the libraries import for this work. They are installed without their own requirements, since some would change
torch for a vision library that is not needed, and LogIX names no Python above 3.10 but works with 3.11."""


def make_environment(folder: Path) -> Path:
    """Return the Python of an environment in ``folder`` that has the libraries; what is installed already is kept."""
    python, done = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join((*DEPENDENCIES, *LIBRARIES, sys.version.split()[0]))
    if python.exists() and done.exists() and done.read_text() == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *DEPENDENCIES], check=True)
    subprocess.run([*pip, "--no-deps", "--ignore-requires-python", *LIBRARIES], check=True)
    done.write_text(wanted)
    return python
