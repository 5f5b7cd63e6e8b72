"""iprox writes and reads safetensors only: nothing that it loads can run code."""

import re
from pathlib import Path

import iprox

PICKLES = re.compile(r"torch\.(load|save)\(|^\s*(import|from) (pickle|dill|joblib)\b|allow_pickle=True", re.MULTILINE)


def test_no_file_is_read_or_written_as_a_pickle():
    sources = {path: path.read_text(encoding="utf-8") for path in Path(iprox.__file__).parent.rglob("*.py")}
    assert len(sources) > 100
    assert [str(path) for path, text in sources.items() if PICKLES.search(text)] == []
    assert PICKLES.search("    return torch.load(path, weights_only=False)")
