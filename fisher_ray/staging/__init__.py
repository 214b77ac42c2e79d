"""What a run's stages are made with, and the stages of GradNet; the order of all stages is the pipeline's."""

from fisher_ray.staging.gradnet import GradNetStages
from fisher_ray.staging.gram import CHOSEN, PARTS, GramStages
from fisher_ray.staging.stage import FEATURE_STORES, Staging
from fisher_ray.staging.work import crewed

__all__ = ["CHOSEN", "FEATURE_STORES", "PARTS", "GradNetStages", "GramStages", "Staging", "crewed"]
