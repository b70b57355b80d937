"""The base of every settings object: frozen, strict, closed to unknown keys.

Each part declares its own settings beside itself; the recipe schema only composes them. Settings never import torch,
so that `deltakd check` answers at once on a login node.
"""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen group of settings; unknown keys and silent type conversions are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
