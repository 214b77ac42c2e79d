from __future__ import annotations

from tests.s3_server import s3_server, s3_url

__all__ = ["s3_server", "s3_url"]
