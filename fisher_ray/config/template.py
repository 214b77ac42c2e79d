"""A commented configuration to begin with, and the schema that editors check it by."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fisher_ray.config.run import Config
from fisher_ray.config.sections import SourceConfig

WIDTH = 110
"""Of comments."""

_FILLED: dict[str, Any] = {
    "output": "runs/first",
    "data": {
        "train": {"format": "parquet", "path": "train-*.parquet", "rows": [0, 25000]},
        "shallow": {"format": "parquet", "path": "train-*.parquet", "rows": [25000, 50000]},
        "test": {"format": "parquet", "path": "test-*.parquet"},
        "transform": "fisher_ray.models:paper_transform",
    },
    "model": {"factory": "fisher_ray.models:paper_cnn"},
    "base": {"steps": 1800},
}
"""What has no default: the paper's network on CIFAR-10 in Parquet files."""
_TITLE = """Configuration of fisher-ray. What is not commented out has no default: change it. All else stands with its \
default: to change it, remove the `#` in front of it, and of its section's name."""


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a configuration, with the meaning of every key."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def template(schema_name: str) -> str:
    """Return a configuration as YAML: every key, with what it means and its default.

    Args:
        schema_name: the schema's file beside it, for editors with a YAML language server.
    """
    lines = [f"# yaml-language-server: $schema={schema_name}", *_comment(_TITLE, ""), ""]
    return "\n".join([*lines, *_keys(Config, _FILLED, "")]).rstrip() + "\n"


def _keys(model: type[BaseModel], filled: dict[str, Any] | None, indent: str) -> Iterator[str]:
    """Yield the lines of a section; ``filled`` has the values that are not commented out, and None comments all."""
    for name, field in model.model_fields.items():
        section, given = _section_of(field), filled is not None and name in filled
        sign = "" if given else "#"
        yield from _comment(_meaning(name, section, field), indent)
        if section is None or section is SourceConfig:
            value = filled[name] if filled and given else field.get_default(call_default_factory=True)
            yield f"{indent}{sign}{name}: {_flow(value)}"
        else:
            yield f"{indent}{sign}{name}:"
            yield from _keys(section, filled[name] if filled and given else None, indent + "  ")
        if not indent:
            yield ""


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the section that a key holds, if it may hold nothing else, but null."""
    options = [one for one in get_args(field.annotation) or (field.annotation,) if one is not type(None)]
    one = options[0] if len(options) == 1 else None
    return one if isinstance(one, type) and issubclass(one, BaseModel) else None


def _meaning(name: str, section: type[BaseModel] | None, field: FieldInfo) -> str:
    """Return what is known of a key: of its section, and of itself; of the first split, what its own keys mean too."""
    told = [] if section is None or section is SourceConfig else [inspect.cleandoc(section.__doc__ or "")]
    told += [field.description or ""]
    if name == "train":
        told += [f"`{key}`: {inner.description}" for key, inner in SourceConfig.model_fields.items()]
    return "\n\n".join(filter(None, told))


def _comment(text: str, indent: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text.replace("``", "`")):
        for line in textwrap.wrap(" ".join(paragraph.split()), WIDTH - len(indent)):
            yield f"{indent}# {line}"


def _flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    plain = json.loads(json.dumps(value))
    return yaml.safe_dump(plain, default_flow_style=True, width=10_000, sort_keys=False).removesuffix("...\n").strip()
