"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Address = Annotated[str | None, typer.Option("--address", help="Ray cluster; by default RAY_ADDRESS, else embedded.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start anew in the same folder instead of resuming.")]
Debug = Annotated[bool, typer.Option("--debug", help="Log more, and print the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Json = Annotated[bool, typer.Option("--json", help="Progress and results as JSON lines on standard output.")]
