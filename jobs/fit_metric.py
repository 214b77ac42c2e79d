"""Run the pipeline up to the Fisher metric.

``ray job submit --working-dir . -- python jobs/fit_metric.py --config PATH``
"""

from fisher_ray.cli import job

if __name__ == "__main__":
    job("fit-metric")
