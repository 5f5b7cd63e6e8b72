"""One line for what the machine or a path caused, whatever raised it."""

import errno
import os

import pytest

from iprox.cli import entry
from iprox.cli.entry import main
from iprox.errors import InputError, cut, one_line, shown, system_refusal
from iprox.files import absolute, check_output, check_path, expanded
from iprox.session import Session


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.EROFS, "Read-only file system", "ro/out"),
            "ro/out: read-only file system; choose another place",
        ),
        (OSError(errno.ENAMETOOLONG, "File name too long", "long"), "long: the name is too long"),
        (OSError(errno.ELOOP, "Too many levels", "loop"), "loop: a loop of symbolic links"),
        (OSError(errno.ENOSPC, "No space left on device"), "out: no space left on the disk; free some"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: permission denied"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), "x: is a directory"),
        (ValueError("embedded null byte"), "out: a path cannot hold a NUL character"),
        (ValueError("open: embedded null character in path"), "NUL"),
        (RuntimeError("Symlink loop from 'a'"), "Symlink loop from 'a'"),
        (RuntimeError("I/O error: Read-only file system (os error 30)"), "read-only file system"),
        (RuntimeError("Failed to open: [errno 36] File name too long"), "the name is too long"),
    ],
)
def test_what_the_system_refuses_is_one_line(error, words):
    said = system_refusal(error, "out")
    assert said is not None
    assert words in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("error", [ValueError("no"), RuntimeError("shape [2] is invalid"), KeyError("x"), OSError("x")])
def test_other_errors_are_no_refusals(error):
    assert system_refusal(error) is None


def test_an_error_without_text_has_its_type():
    assert one_line(MemoryError()) == "MemoryError"
    assert one_line(ValueError("\n \n")) == "ValueError"
    assert one_line(ValueError("first\nsecond")) == "first"
    assert one_line(ValueError("of this field:\n  TypeError")) == "of this field: TypeError"
    assert len(one_line(ValueError("x" * 10**6))) == 200
    assert cut("abc", 2) == "a…"


def test_a_value_is_shown_on_a_line():
    nested = "x"
    for _ in range(40):
        nested = [nested] * 10  # 10^40 values, written out
    assert len(shown(nested)) <= 80
    assert len(shown("a\nb" * 1000).splitlines()) == 1
    assert shown("four") == "'four'"


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.EROFS, "Read-only file system", "ro/out"), ValueError("embedded null byte")]
)
def test_commands_refuse_what_is_no_fault_of_ours(monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(entry, "_quieten_libraries", fail)
    assert main(["report", "x"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "fault" not in said


def test_a_stage_that_python_has_no_memory_for_is_refused():
    session = Session.create("cpu", "float32")
    with pytest.raises(InputError, match=r"not enough memory on cpu \(MemoryError\)"), session.metered():
        raise MemoryError


def test_paths_that_cannot_be_are_refused(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in ("a\0b", "a" * 5000, tmp_path / ("b" * 300), loop):
        for check in (check_path, expanded, absolute, check_output):
            with pytest.raises(InputError):
                check(path)
    check_path(tmp_path / "nothing" / "here")
    assert check_output(tmp_path / "nothing" / "here") == tmp_path / "nothing" / "here"


def test_an_output_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="is a file"):
        check_output(file)
    with pytest.raises(InputError, match="is a file, so no folder can be in it"):
        check_output(file / "below")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match="permission denied"):
        check_output(tmp_path / "out")
    flags = type("Flags", (), {"f_flag": os.ST_RDONLY})
    monkeypatch.setattr(os, "statvfs", lambda _: flags)
    with pytest.raises(InputError, match="read-only file system; choose another place"):
        check_output(tmp_path / "out")
