"""The session that every command shares."""

import warnings
from pathlib import Path

import pytest

import iprox
from iprox.data.sampling import draw_rows
from iprox.progress import Reporter
from iprox.session import Session


def warn_from(own: str, other: str) -> None:
    warnings.warn_explicit("of ours", UserWarning, own, 1)
    warnings.warn_explicit("of another package", UserWarning, other, 1)


def test_what_the_library_warns_of_is_reported_and_the_rest_left_alone():
    session = Session.create("cpu", reporter=Reporter(quiet=True))
    own = str(Path(iprox.__file__).parent / "influence/job.py")
    with pytest.warns(UserWarning, match="of another package") as others, session.metered():
        warn_from(own, "/elsewhere/module.py")
    assert session.reporter.take_warnings() == ["of ours"]
    assert len(others) == 1


def test_no_rows_are_drawn_where_none_are_asked_for():
    assert draw_rows("audit", 0, 100, -1, range(40)) == draw_rows("audit", 0, 100, 0, range(40)) == []
