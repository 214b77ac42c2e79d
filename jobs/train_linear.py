"""Run the pipeline up to the linear model.

``ray job submit --working-dir . -- python jobs/train_linear.py --config PATH``
"""

from fisher_ray.cli import job

if __name__ == "__main__":
    job("train")
