"""Run the whole pipeline.

``ray job submit --working-dir . -- python jobs/run.py --config PATH``
"""

from fisher_ray.cli import job

if __name__ == "__main__":
    job("run")
