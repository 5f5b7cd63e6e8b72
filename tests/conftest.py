"""Fixtures of all tests."""

import gc

import pytest

from tiny_models import autograd_gradient, make_batch, make_model, rows_of


@pytest.fixture(scope="module", autouse=True)
def _what_is_imported_stays():
    """Each stage of a run collects garbage; what was imported by now is left out of that, which saves time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny():
    """The makers, for tests that need several models or batches."""

    class Tiny:
        model = staticmethod(make_model)
        batch = staticmethod(make_batch)
        rows = staticmethod(rows_of)
        autograd_gradient = staticmethod(autograd_gradient)

    return Tiny
