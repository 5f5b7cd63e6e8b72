"""Pools at addresses of fsspec's file systems, here the one in memory, are those of the same files on a disk."""

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iprox.data import Pool
from iprox.errors import InputError

ROWS = [{"id": f"row-{number}", "text": f"text {number}"} for number in range(5)]
LINES = "".join(f'{{"id": "{row["id"]}", "text": "{row["text"]}"}}\n' for row in ROWS)


@pytest.fixture
def memory(tmp_path):
    """The same files in memory and in a folder."""
    system = fsspec.filesystem("memory")
    (tmp_path / "a.jsonl").write_text(LINES)
    with pa.output_stream(str(tmp_path / "b.jsonl.gz"), compression="gzip") as file:
        file.write(LINES.replace("row-", "zipped-").encode())
    pq.write_table(pa.Table.from_pylist([{**row, "id": f"table-{row['id']}"} for row in ROWS]), tmp_path / "c.parquet")
    for file in tmp_path.iterdir():
        system.pipe(f"/pool/{file.name}", file.read_bytes())
    yield "memory://pool"
    system.rm("/pool", recursive=True)


@pytest.mark.parametrize("pattern", ["", "/*"])
def test_rows_are_those_of_the_files_on_a_disk(memory, tmp_path, pattern):
    pool, same = Pool(memory + pattern), Pool(tmp_path)
    assert [(example.id, example.text) for example in pool] == [(example.id, example.text) for example in same]
    assert pool.scan().rows == 15
    assert [file.rpartition("/")[2] for file in pool.scan().files] == ["a.jsonl", "b.jsonl.gz", "c.parquet"]
    pool.write_rows([1, 12], tmp_path / "chosen.jsonl")
    assert (tmp_path / "chosen.jsonl").read_text().startswith(LINES.splitlines()[1])


def test_what_is_not_there_is_refused(memory):
    for wrong, said in {
        f"{memory}/none.jsonl": "no file to read at memory://pool/none.jsonl",
        f"{memory}/*.csv": "no file to read",
        "nosuch://a.jsonl": "nosuch://a.jsonl cannot be read",
    }.items():
        with pytest.raises(InputError, match="pool: ") as refused:
            Pool(wrong)
        assert said in str(refused.value)
