"""Programs that tests start."""

import os
import signal
import subprocess
from collections.abc import Sequence


def limited(command: Sequence[object], seconds: float, **environment: str) -> str:
    """Run a program and return what it says; all that it has started ends with it, at the latest after some seconds."""
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen([*map(str, command)], env={**os.environ, **environment}, **how) as program:
        try:
            said, late = program.communicate(timeout=seconds)[0], False
        except subprocess.TimeoutExpired:
            os.killpg(program.pid, signal.SIGKILL)
            said, late = program.communicate()[0], True
    assert not late, f"it still ran after {seconds} s, and had said: {said[-3000:]}"
    assert program.returncode == 0, said[-3000:]
    return said
