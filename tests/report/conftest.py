"""Gives the tests a function that writes a small synthetic run folder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from synthetic_run import write_run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Returns `synthetic_run.write_run` bound to a fresh folder."""
    return partial(write_run, tmp_path)
