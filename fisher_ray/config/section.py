"""What every section of the configuration is: frozen, checked once, its errors told by the full path of a key."""

from __future__ import annotations

import difflib
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from fisher_ray.errors import ConfigError


class Section(BaseModel):
    """A part of the configuration; unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )

    called: ClassVar[str] = "configuration"
    """What a section is called where no key of it is at fault."""

    @classmethod
    def checked(cls, values: Any) -> Self:
        """Check ``values``.

        Raises:
            ConfigError: naming every wrong key, its value, and the nearest right key.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            messages = (_explain(cls, item) for item in error.errors())
            raise ConfigError("; ".join(dict.fromkeys(messages))) from None


def _fields(model: Any, path: tuple[int | str, ...]) -> list[str]:
    for before, part in zip(("", *path), path, strict=False):
        if before in _BY_NAME:  # the part is a name of the user's own
            continue
        annotation = model.model_fields[part].annotation if str(part) in model.model_fields else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)


_BY_NAME = ("layers",)
"""Keys that hold sections by names of the user's own."""
_UNION_MEMBERS = ("literal[", "constrained-", "AbsoluteDamping", "function-")
"""How pydantic marks, inside a location, which alternative of a field it tried."""


def _explain(model: type[Section], item: Any) -> str:
    path = tuple(part for part in item["loc"] if not str(part).startswith(_UNION_MEMBERS))
    key = ".".join(str(part) for part in path) or model.called
    if item["type"] == "extra_forbidden":
        known = _fields(model, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}"
    if item["type"] == "missing":
        return f"missing key {key!r}"
    given = "" if isinstance(item["input"], dict) else f" (given {item['input']!r})"
    return f"{key}: {item['msg'].removeprefix('Value error, ')}{given}"
