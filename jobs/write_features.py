"""Run the pipeline up to the feature stores.

``ray job submit --working-dir . -- python jobs/write_features.py --config PATH``
"""

from fisher_ray.cli import job

if __name__ == "__main__":
    job("write-features")
