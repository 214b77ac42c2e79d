"""Make the runs of an experiment, and compare what they find.

``ray job submit --working-dir . -- python jobs/compare.py --config jobs/configs/compare.yaml``
"""

from fisher_ray.cli import compare

if __name__ == "__main__":
    compare()
