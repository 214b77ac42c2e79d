"""The command line: argv and YAML to a configuration and the pipeline.

The only place that configures logging, draws progress and turns errors into exit codes.
"""

from fisher_ray.cli.commands import job, main
from fisher_ray.cli.compare import compare

__all__ = ["compare", "job", "main"]
