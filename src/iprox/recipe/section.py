"""What every section of a recipe is: keys it does not know are refused."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section; values are checked when it is made and whenever one is set."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)
