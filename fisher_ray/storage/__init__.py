"""Files under one URL, on a local disk or in S3: whole reads, atomic writes, bounded retries, typed errors."""

from fisher_ray.storage.local import Bytes
from fisher_ray.storage.place import RETRY_S, Storage

__all__ = ["RETRY_S", "Bytes", "Storage"]
