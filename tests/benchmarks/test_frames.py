"""`iprox score` reaches the dot product in a dozen frames, so that a reader can follow it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import frames


def test_the_path_to_the_dot_product_is_short(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["frames.py"])
    frames.main()
    last = capfd.readouterr().out.splitlines()[-1]
    assert int(last.split()[0]) <= 12, last
