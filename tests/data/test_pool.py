import csv
import datetime
import json
import os
import resource
import socket
import tracemalloc
import uuid
from decimal import Decimal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.table import InMemoryTable
from hypothesis import given, settings
from hypothesis import strategies as st

import iprox.data.file_types
import iprox.data.pool
import iprox.data.readers
from iprox.data import Overlap, Pool
from iprox.errors import InputError


def row(index, **extra):
    turns = [{"role": "user", "content": f"Q{index} é"}, {"role": "assistant", "content": f"A{index}"}]
    return {"id": f"r{index}", "source": "even" if index % 2 == 0 else "odd", "messages": turns, **extra}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def compressed(path, compression):
    """A copy of a file next to it, with the extension of a compression."""
    copy = path.with_name(path.name + {"gzip": ".gz", "zstd": ".zst"}[compression])
    with pa.CompressedOutputStream(str(copy), compression) as stream:
        stream.write(path.read_bytes())
    path.unlink()
    return copy


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_every_format_gives_the_same_examples(tmp_path):
    rows = [row(i) for i in range(600)]  # more than one Parquet batch
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    write_jsonl(tmp_path / "lines.json", rows)
    write_parquet(tmp_path / "a.parquet", rows)
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    pools = [Pool(tmp_path / name) for name in ("a.jsonl", "a.json", "lines.json", "a.parquet", "saved")]
    pools += [Pool(rows), Pool(datasets.Dataset.from_list(rows))]
    for pool in pools:
        examples = list(pool)
        assert [e.id for e in examples] == [r["id"] for r in rows]
        assert [e.row for e in examples] == list(range(600))
        assert [e.messages for e in examples] == [tuple(r["messages"]) for r in rows]
        assert pool.scan().sources == {"even": 300, "odd": 300}
    assert list(pools[0])[4].origin == "a.jsonl:5"
    assert list(pools[-1])[4].origin == "row:5"


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "lines.json", "a.csv"])
def test_compressed_files_are_the_same_examples(tmp_path, name, compression):
    rows = [{"instruction": f"Q{i} é", "output": f"A{i}"} for i in range(300)]
    path = tmp_path / name
    if name == "a.csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["instruction", "output"])
            writer.writeheader()
            writer.writerows(rows)
    elif name == "a.json":
        path.write_text(json.dumps(rows), encoding="utf-8-sig")
    else:
        write_jsonl(path, rows)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    plain = Pool(path)
    before = [(example.id, example.messages) for example in plain]
    plain.write_rows([7, 0, 299], tmp_path / "plain-chosen.jsonl")
    copy = compressed(path, compression)
    pool = Pool(copy)
    assert [(example.id, example.messages) for example in pool] == before
    pool.write_rows([7, 0, 299], tmp_path / "chosen.jsonl")
    assert (tmp_path / "chosen.jsonl").read_bytes() == (tmp_path / "plain-chosen.jsonl").read_bytes()
    assert next(iter(pool)).origin == f"{copy.name}:1"


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_compressed_file_that_ends_too_early_is_refused(tmp_path, compression):
    path = compressed(write_jsonl(tmp_path / "a.jsonl", [row(i) for i in range(600)]), compression)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"a\.jsonl\.(gz|zst): cannot be read: Truncated .* stream; it is not whole"):
        Pool(path).scan()


def test_a_file_that_is_there_compressed_too_is_not_read_twice(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [row(0)])
    compressed(tmp_path / "a.jsonl", "gzip")
    write_jsonl(tmp_path / "a.jsonl", [row(0)])
    with pytest.raises(InputError, match=r"a\.jsonl and .*a\.jsonl\.gz would both be read"):
        Pool(tmp_path)
    assert Pool(tmp_path / "a.jsonl.gz").scan().rows == 1
    compressed(tmp_path / "a.jsonl", "zstd")
    with pytest.raises(InputError, match=r"a\.jsonl\.gz and .*a\.jsonl\.zst would both be read"):
        Pool(tmp_path)


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "instruction", "input", "output"])
        writer.writerow(["", 'say "a,b"\nplease', "", "é" * 200_000])  # longer than csv's own field limit
        writer.writerow(["x", "add", "1 2", "3"])
    first, second = Pool(path)
    assert first.id == "a-00000001"
    assert first.messages is not None
    assert first.messages[0]["content"] == 'say "a,b"\nplease'
    assert len(first.messages[1]["content"]) == 200_000
    assert second.messages is not None
    assert second.messages[0]["content"] == "add\n\n1 2"


def test_csv_faults_are_rows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'text\nok\n"caf\xe9"\na,b\n"x"y\nfine\n')
    pool = Pool(path, on_bad_row="skip")
    summary = pool.scan()
    assert [e.text for e in pool] == ["ok", "fine"]
    assert summary.bad_rows == 3
    assert "a.csv:2: text is not valid UTF-8" in summary.bad_row_messages[0]
    assert "a.csv:3: more fields than the header" in summary.bad_row_messages[1]
    assert "a.csv:4: not CSV" in summary.bad_row_messages[2]


def test_rows_of_csv_that_are_short_are_bad(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text, source\nbroken\nin two,web\n")
    with pytest.raises(InputError, match=r"a\.csv:1: fewer fields than the header has"):
        Pool(tmp_path / "a.csv").scan()
    assert Pool(tmp_path / "a.csv", on_bad_row="skip").scan().sources == {"web": 1}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "A", "text": "B"}\n', "a.jsonl:1: not JSON: the key 'text' is given twice"),
        ("a.jsonl", b'{"x": [{"y": 1, "y": 1}], "text": "B"}\n', "the key 'y' is given twice"),
        ("a.json", b'[{"text": "A"}, {"text": "A", "text": "B"}]', "a.json: element 2: the key 'text' is given twice"),
        ("a.csv", b"text,source,text\nA,s,B\n", "a.csv: two columns have the name 'text'"),
        ("a.jsonl", b'{"images": ' + b"[" * 600 + b"]" * 600 + b', "text": "B"}\n', "a.jsonl:1: nested too deep"),
    ],
)
def test_what_is_given_twice_or_nested_too_deep_is_refused(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        Pool(tmp_path / name).scan()


OUT_OF_RANGE = {
    "text": pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"], pa.binary()).buffers()),
    "time": pa.array([10**15], pa.timestamp("s")),
    "zone": pa.array([1], pa.timestamp("s", tz="Nowhere/City")),
    "date": pa.array([10**9], pa.int32()).cast(pa.date32()),
    "duration": pa.array([2**62], pa.duration("s")),
    "JSON": pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{"])),
    "deep": pa.ExtensionArray.from_storage(pa.json_(), pa.array(["[" * 9999])),
}


@pytest.mark.parametrize("kind", OUT_OF_RANGE)
def test_values_of_parquet_that_python_does_not_have_are_bad_rows(tmp_path, kind):
    column = pa.chunked_array([pa.nulls(1, OUT_OF_RANGE[kind].type), OUT_OF_RANGE[kind]])
    pq.write_table(pa.table({"text": ["A", "B"], "x": column}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet:2: the column 'x' cannot be read: "):
        Pool(tmp_path / "a.parquet").scan()
    assert [each.text for each in Pool(tmp_path / "a.parquet", on_bad_row="skip")] == ["A"]


def test_columns_of_one_name_in_parquet_are_refused(tmp_path):
    pq.write_table(pa.table([pa.array(["A"])] * 2, names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="two columns have the name 'text'"):
        Pool(tmp_path / "a.parquet").scan()


def test_values_of_a_saved_data_set_that_python_does_not_have_are_refused(tmp_path):
    datasets.Dataset(InMemoryTable(pa.table({"text": OUT_OF_RANGE["text"]}))).save_to_disk(tmp_path / "a")
    with pytest.raises(InputError, match="a:1: cannot be read: 'utf-8'"):
        Pool(tmp_path / "a").scan()


def test_ids_are_made_from_file_and_line(tmp_path):
    (tmp_path / "p.jsonl").write_text('\n{"text": "a"}\n\n  \n{"text": "b", "id": 12}\n{"text": "c"}')
    pool = Pool(tmp_path / "p.jsonl")
    assert [(e.id, e.origin) for e in pool] == [
        ("p-00000002", "p.jsonl:2"),
        ("12", "p.jsonl:5"),
        ("p-00000006", "p.jsonl:6"),
    ]
    assert pool.scan().rows == 3
    assert [e.id for e in Pool([{"text": "a"}, {"text": "b"}])] == ["row-00000001", "row-00000002"]


def test_files_of_one_name_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "train.jsonl", [{"text": folder}])
    write_jsonl(tmp_path / "a" / "train.json", [{"text": "third"}])
    pool = Pool([tmp_path / "a", tmp_path / "b"])
    assert pool.scan().rows == 3
    assert [e.origin for e in pool] == ["a/train.json:1", "a/train.jsonl:1", "b/train.jsonl:1"]
    assert len({e.id for e in pool}) == 3


def test_globs_folders_and_repeats(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "[x].jsonl"):
        write_jsonl(tmp_path / name, [{"text": name}])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "sub").mkdir()
    write_jsonl(tmp_path / "sub" / "c.jsonl", [{"text": "c"}])
    assert [e.text for e in Pool([tmp_path / "b.jsonl", str(tmp_path / "*.jsonl")])] == [
        "b.jsonl",
        "[x].jsonl",
        "a.jsonl",
    ]
    assert [e.text for e in Pool(tmp_path)] == ["[x].jsonl", "a.jsonl", "b.jsonl"]
    assert [e.text for e in Pool(tmp_path / "[x].jsonl")] == ["[x].jsonl"]
    assert [e.text for e in Pool(str(tmp_path / "**" / "c.jsonl"))] == ["c"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("pol.jsonl", r"pool: there is no file .*pol\.jsonl .*nearest names there: pool\.jsonl"),
        ("q/*.csv", r"pool: no file matches .*q/\*\.csv \(looked in "),
        ("notes.txt", r"extension '.txt'; known are \.jsonl"),
        ("table.parquet.gz", r"extension '.gz'; known are .*, and all but Parquet also with \.gz or \.zst"),
        ("empty", r"no file to read in the folder .*empty \(\.jsonl.*\.zst\); there are some in .*data"),
        ("splits", r"holds several splits; name one: .*splits/train"),
        ("hf://datasets/onlyname", r"is written hf://datasets/OWNER/NAME"),
        ([], "no file is given"),
        (7, "expected paths, a list of dicts or a Dataset, not int"),
        ([{"text": "a"}, 3], "expected paths or dicts in the list, not dict"),
    ],
)
def test_what_cannot_be_opened(tmp_path, pattern, message):
    write_jsonl(tmp_path / "pool.jsonl", [row(0)])
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "table.parquet.gz").write_text("x")
    (tmp_path / "empty" / "data").mkdir(parents=True)
    write_jsonl(tmp_path / "empty" / "data" / "x.jsonl", [row(0)])
    one = datasets.Dataset.from_list([row(0)])
    datasets.DatasetDict({"train": one}).save_to_disk(str(tmp_path / "splits"))
    if isinstance(pattern, str) and not pattern.startswith("hf:"):
        pattern = str(tmp_path / pattern)
    with pytest.raises(InputError, match=message):
        Pool(pattern)


def test_a_dataset_dict_asks_for_a_split():
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list([row(0)])})
    with pytest.raises(InputError, match="pass one split of it: train"):
        Pool(splits)  # pyright: ignore[reportArgumentType]


def test_hub_address(monkeypatch):
    asked = []

    def load_dataset(path, name, *, split, streaming):
        asked.append((path, name, split, streaming))
        return datasets.Dataset.from_list([{"text": "a"}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    pool = Pool(["hf://datasets/own/set", "hf://datasets/own/set/main:test"])
    assert asked == [("own/set", None, "train", True), ("own/set", "main", "test", True)]
    assert [e.id for e in pool] == ["own-set-train-00000001", "own-set-main-test-00000001"]
    assert pool.scan().files == ("hf://datasets/own/set", "hf://datasets/own/set/main:test")

    def refuse(*args, **kwargs):
        raise ConnectionError("no route\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=r"own/set: cannot be opened: no route$"):
        Pool("hf://datasets/own/set")


def test_bad_rows_stop_lists_ten_and_the_count(tmp_path):
    path = tmp_path / "p.jsonl"
    lines = [json.dumps(row(0)).encode(), b"{nope", b'{"text": "\xff"}', b'["list"]', *[b'{"q": 1}'] * 9]
    path.write_bytes(b"\n".join(lines))
    pool = Pool(path)
    with pytest.raises(InputError) as caught:
        pool.scan()
    text = str(caught.value)
    assert "12 of 13 rows are bad" in text
    assert "--set data.on_bad_row=skip" in text
    assert "p.jsonl:2: not JSON: Expecting property name enclosed in double quotes at column 2" in text
    assert "p.jsonl:3: not UTF-8 (byte 11 of the line)" in text
    assert "p.jsonl:11:" in text
    assert "p.jsonl:12:" not in text
    assert "and 2 more" in text
    with pytest.raises(InputError, match=r"p\.jsonl:2: not JSON"):
        list(pool)


def test_bad_rows_skipped_are_left_out_everywhere(tmp_path):
    path = tmp_path / "p.jsonl"
    lines = [json.dumps(row(0)), "oops", json.dumps(row(1)), "[" * 100_000, json.dumps(row(2))]
    path.write_text("\n".join(lines))
    pool = Pool(path, on_bad_row="skip")
    summary = pool.scan()
    assert (summary.rows, summary.bad_rows, len(summary.bad_row_messages)) == (3, 2, 2)
    assert [e.id for e in pool] == ["r0", "r1", "r2"]
    assert [e.id for e in pool.take([2, 1])] == ["r2", "r1"]
    pool.write_rows([1], tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == lines[2] + "\n"


def test_empty_pools(tmp_path):
    for name, content in (("a.jsonl", ""), ("b.jsonl", "\n\n"), ("c.json", "[]"), ("d.csv", "text\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=f"pool: no examples in .*{name}"):
            Pool(tmp_path / name).scan()
    (tmp_path / "e.jsonl").write_text("x\n")
    with pytest.raises(InputError, match=r"all 1 rows are bad, the first: e\.jsonl:1: not JSON"):
        Pool(tmp_path / "e.jsonl", on_bad_row="skip").scan()


def test_duplicate_ids_name_both_rows(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [row(0), row(1), row(2)])
    write_jsonl(tmp_path / "b.jsonl", [row(3), row(1), row(2)])
    with pytest.raises(InputError, match=r"a\.jsonl:2 and b\.jsonl:2 have the same id 'r1' \(2 rows repeat"):
        Pool(tmp_path, on_bad_row="skip").scan()


def test_ids_whose_hashes_agree_by_chance_are_not_duplicates(monkeypatch):
    monkeypatch.setattr(iprox.data.pool, "_hash64", len)
    assert Pool([{"text": "a", "id": "x"}, {"text": "a", "id": "y"}]).scan().rows == 2
    with pytest.raises(InputError, match="row:1 and row:3 have the same id 'x'"):
        Pool([{"text": "a", "id": i} for i in "xyx"]).scan()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"}', "the file ends inside the array"),
        ('[{"text": "a"} {"text": "b"}]', "expected ',' before element 2"),
        ('[{"text": "a"},]', "not JSON at element 2"),
        ('[{"text": "a"}] x', "more after the end"),
        ("12", "expected an array"),
        ("[", "ends inside the array"),
        ("[,]", "not JSON at element 1"),
    ],
)
def test_broken_json_arrays(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=message):
        list(Pool(tmp_path / "a.json"))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.fixed_dictionaries({"text": st.text(st.characters(codec="utf-8"), min_size=1)}), min_size=1),
    indent=st.sampled_from([None, 2]),
    chunk=st.integers(1, 40),
)
def test_json_arrays_read_in_chunks(tmp_path_factory, rows, indent, chunk):
    path = tmp_path_factory.mktemp("j") / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iprox.data.file_types, "_ARRAY_CHUNK", chunk)
        read = [record.data for record in iprox.data.readers.open_file(path, "a", "a").records()]
    assert read == rows


def test_rows_that_are_not_objects_in_json(tmp_path):
    (tmp_path / "a.json").write_text('[1, {"text": "ok"}, null]')
    pool = Pool(tmp_path / "a.json", on_bad_row="skip")
    assert pool.scan().bad_row_messages == (
        "a.json:1: not an object but a number",
        "a.json:3: not an object but null",
    )


def test_broken_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match=r"a\.parquet: not a readable Parquet file"):
        list(Pool(tmp_path / "a.parquet"))


def test_take():
    pool = Pool([{"text": str(i)} for i in range(5)])
    assert [e.text for e in pool.take([3, 0, 3])] == ["3", "0", "3"]
    assert pool.take([]) == []
    with pytest.raises(InputError, match="row 9 was asked for, but there are only 5 good rows"):
        pool.take([1, 9])
    with pytest.raises(InputError, match="counted from 0"):
        pool.take([-1])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_write_rows_copies_byte_for_byte(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("w")
    text = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda s: not s.isspace())
    texts = data.draw(st.lists(text, min_size=1, max_size=8))
    spacing = st.sampled_from(["", " ", "\r", "\t "])
    lines = []
    for index, content in enumerate(texts):
        body = json.dumps({"id": index, "text": content, "x": 1.50}, ensure_ascii=data.draw(st.booleans()))
        lines.append((data.draw(st.sampled_from(["", " "])) + body + data.draw(spacing)).encode())
    cut = data.draw(st.integers(0, len(lines)))
    ends = data.draw(st.booleans())
    parts = [lines[:cut], lines[cut:]]
    for name, part in zip("ab", parts, strict=True):
        content = b"\n".join(part) + (b"\n" if ends and part else b"")
        (folder / f"{name}.jsonl").write_bytes(content)
    rows = data.draw(st.lists(st.integers(0, len(lines) - 1), max_size=10))
    Pool([folder / "a.jsonl", folder / "b.jsonl"]).write_rows(rows, folder / "out" / "s.jsonl")
    assert (folder / "out" / "s.jsonl").read_bytes() == b"".join(lines[r] + b"\n" for r in rows)
    assert [p.name for p in (folder / "out").iterdir()] == ["s.jsonl"]


def test_write_rows_of_other_formats_keeps_the_columns(tmp_path):
    rows = [row(i, score=i / 3, note=None) for i in range(4)]
    write_parquet(tmp_path / "p.parquet", rows)
    write_jsonl(tmp_path / "q.jsonl", [row(9)])
    pool = Pool([tmp_path / "p.parquet", tmp_path / "q.jsonl"])
    pool.write_rows([4, 3, 0], tmp_path / "out.jsonl")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert written == [row(9), rows[3], rows[0]]
    assert [e.id for e in Pool(tmp_path / "out.jsonl")] == ["r9", "r3", "r0"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    with pytest.raises(InputError, match="row 5"):
        Pool([{"text": "a"}]).write_rows([0, 5], out)
    with pytest.raises(InputError, match="row:1: the column 'blob' holds bytes"):
        Pool([{"text": "a", "blob": b"x"}]).write_rows([0], out)
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_an_output_that_is_the_pool_itself_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "pool.jsonl", [row(i) for i in range(5)])
    before = path.read_bytes()
    with pytest.raises(InputError, match="is a file of the pool itself"):
        Pool(path).write_rows([0, 1], tmp_path / "." / "pool.jsonl")
    assert path.read_bytes() == before


def test_rows_of_more_files_than_may_be_open_are_written(tmp_path):
    for number in range(60):
        write_jsonl(tmp_path / f"{number:02d}.jsonl", [row(number)])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (held + 20, hard))
    try:
        Pool(str(tmp_path / "*.jsonl")).write_rows(range(59, -1, -1), tmp_path / "out" / "o.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    written = [json.loads(line)["id"] for line in (tmp_path / "out/o.jsonl").read_text().splitlines()]
    assert written == [f"r{number}" for number in range(59, -1, -1)]


def test_what_could_not_be_written_is_refused_when_it_is_scanned(tmp_path):
    write_parquet(tmp_path / "b.parquet", [{"text": "a", "blob": b"x"}, {"text": "b", "blob": b"y"}])
    with pytest.raises(
        InputError, match=r"b.parquet:1: the column 'blob' holds bytes, which JSON cannot; remove the column"
    ):
        Pool(tmp_path / "b.parquet").scan()


def test_a_column_that_json_cannot_hold_is_found_wherever_it_is_filled_first(tmp_path):
    rows = [{"text": "a", "blob": None}, {"text": "b", "blob": None}, {"text": "c", "blob": b"x"}]
    write_parquet(tmp_path / "b.parquet", rows)
    with pytest.raises(InputError, match=r"b\.parquet:3: the column 'blob' holds bytes"):
        Pool(tmp_path / "b.parquet").scan()
    circle: list[object] = []
    circle.append(circle)
    for value, reason in (
        ({1, 2}, "'odd' holds set"),
        ({(1, 2): 3}, "'odd' holds keys must be"),
        (circle, "'odd' holds obj"),
    ):
        with pytest.raises(InputError, match=f"row:1: the column {reason}"):
            Pool([{"text": "a", "odd": value}]).scan()


def test_decimals_uuids_times_and_durations_are_written_as_text(tmp_path):
    number = uuid.UUID(int=7)
    columns = {
        "text": ["a"],
        "price": pa.array([Decimal("12.50")], pa.decimal128(9, 2)),
        "key": pa.array([number.bytes], pa.binary(16)).cast(pa.binary(16)),
        "at": pa.array([datetime.datetime(2020, 2, 3, 4, 5, 6)], pa.timestamp("us")),
        "took": pa.array([datetime.timedelta(seconds=90)], pa.duration("us")),
        "nested": [{"price": Decimal("0.1")}],
    }
    columns["key"] = pa.ExtensionArray.from_storage(pa.uuid(), columns["key"])
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    pool = Pool(tmp_path / "a.parquet")
    assert pool.scan().rows == 1
    pool.write_rows([0], tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {
        "text": "a",
        "price": "12.50",
        "key": str(number),
        "at": "2020-02-03T04:05:06",
        "took": "0:01:30",
        "nested": {"price": "0.1"},
    }
    Pool([{"text": "a", "n": np.int64(3), "v": np.arange(2)}]).write_rows([0], tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"text": "a", "n": 3, "v": [0, 1]}


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 12\n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.csv.zst"])
@pytest.mark.parametrize("skip", ["stop", "skip"])
def test_a_pointer_of_git_lfs_is_refused_as_one(tmp_path, name, skip):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(InputError, match=rf"{name}: is a Git LFS pointer, not the file .*; run git lfs pull"):
        Pool(tmp_path / name, on_bad_row=skip).scan()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_other_encodings_than_utf_8_are_named(tmp_path, name, encoding):
    text = (
        "text\nhello\n" if name == "a.csv" else json.dumps([row(0)]) if name == "a.json" else json.dumps(row(0)) + "\n"
    )
    (tmp_path / name).write_bytes(text.encode(encoding))
    said = encoding[:6].upper()
    with pytest.raises(
        InputError, match=rf"{name}: is {said}, and iprox reads UTF-8; convert it: iconv -f {said} -t UTF-8"
    ):
        Pool(tmp_path / name).scan()
    copy = compressed(tmp_path / name, "gzip")
    with pytest.raises(InputError, match=f"is {said}, and iprox reads UTF-8"):
        Pool(copy).scan()


@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (json.dumps([row(0), row(1)]), r"is a JSON array, not one object per line; name it a\.json"),
        (json.dumps([row(0), row(1)], indent=2), r"is a JSON array, not one object per line; name it a\.json"),
        ("\ufeff \n" + json.dumps([row(0)], indent=2), "is a JSON array"),
        ("[\n" + ",\n".join(json.dumps(row(i)) for i in range(3)) + "\n]\n", "is a JSON array"),
        (
            "\n".join(json.dumps(row(i), indent=2) for i in range(3)),
            "has a JSON object over several lines; write each on",
        ),
        ("{\n" + json.dumps(row(0))[1:], "has a JSON object over several lines"),
        (json.dumps(row(0, more=["x" * 99] * 30_000), indent=1), "has a JSON object over several lines"),
    ],
)
def test_json_that_is_not_by_line_is_refused_as_what_it_is(tmp_path, text, reason, compression):
    path = tmp_path / "a.jsonl"
    path.write_text(text, encoding="utf-8")
    path = compressed(path, compression) if compression else path
    for skip in ("stop", "skip"):
        with pytest.raises(InputError, match=rf"a\.jsonl.*: {reason}"):
            Pool(path, on_bad_row=skip).scan()


def test_lines_of_json_that_are_merely_bad_are_bad_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    for bad in ('{"a": ', "[1, 2]", "oops", '{"a": 1,}'):
        path.write_text(bad + "\n" + json.dumps(row(1)) + "\n")
        assert Pool(path, on_bad_row="skip").scan().bad_rows == 1


def test_a_folder_cloned_from_the_hub(tmp_path):
    for name in ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "._a.jsonl", ".a.jsonl.swp.json"):
        (tmp_path / name).write_text('{"default": {}}')
    for hidden in (".git", ".cache/huggingface"):
        (tmp_path / hidden).mkdir(parents=True)
        (tmp_path / hidden / "x.json").write_text("{}")
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", [row(0)])
    (tmp_path / "dataset_dict.json").unlink()  # of `datasets`, which is read otherwise
    with pytest.raises(InputError, match=rf"no file to read in the folder .*; there are some in {tmp_path}/data$"):
        Pool(tmp_path)
    assert Pool(tmp_path / "data").scan().rows == 1
    write_jsonl(tmp_path / "a.jsonl", [row(1)])
    for pattern in (tmp_path, tmp_path / "*.json*", tmp_path / "**/a.json*"):
        assert Pool(pattern).scan().files == (str(tmp_path / "a.jsonl"),)
    write_jsonl(tmp_path / "dataset_info.json", [row(2)])
    assert Pool(tmp_path / "dataset_info.json").scan().rows == 1  # as named


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_what_is_no_regular_file_is_refused_rather_than_waited_for(tmp_path, monkeypatch, name):
    os.mkfifo(tmp_path / name)
    for pattern in (tmp_path / name, tmp_path, tmp_path / "a*"):
        with pytest.raises(InputError, match=rf"{name}: is a pipe, not a regular file; write it to one first"):
            Pool(pattern)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(InputError, match=rf"{name}: is a device, not a regular file"):
        Pool([str(tmp_path / name)])
    (tmp_path / name).unlink()
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the name of a socket must be short
        server.bind(name)
        with pytest.raises(InputError, match=rf"{name}: is a socket, not a regular file"):
            Pool(name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=rf"{name}: cannot be read"):
        Pool(tmp_path).scan()


@pytest.mark.parametrize("skip", ["stop", "skip"])
@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "lines.json", "a.csv"])
def test_a_line_longer_than_the_limit_is_refused(tmp_path, monkeypatch, name, compression, skip):
    monkeypatch.setattr(iprox.data.file_types, "LONGEST", 1 << 20)
    rows = [{"text": "a"}, {"text": "x" * (1 << 20)}]
    texts = {"a.json": json.dumps(rows), "a.csv": "text\na\n" + "x" * (1 << 21)}
    path = tmp_path / name
    path.write_text(texts.get(name, "\n".join(map(json.dumps, rows))))
    path = compressed(path, compression) if compression else path
    what = "element 2" if name == "a.json" else "a line"
    with pytest.raises(InputError, match=rf"{name}.*: {what} is longer than 1 MB, the most that iprox reads; split it"):
        Pool(path, on_bad_row=skip).scan()
    shorter = tmp_path / "shorter.jsonl"
    write_jsonl(shorter, [{"text": "x" * ((1 << 20) - 20)}])
    assert Pool(shorter).scan().rows == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_small_file_that_is_large_once_decompressed_takes_no_more_memory_than_the_limit(tmp_path, monkeypatch, name):
    monkeypatch.setattr(iprox.data.file_types, "LONGEST", 4 << 20)
    path = tmp_path / f"{name}.gz"
    with pa.CompressedOutputStream(str(path), "gzip") as stream:
        stream.write(b'[{"text": "' if name == "a.json" else b'{"text": "' if name == "a.jsonl" else b"text\n")
        for _ in range(300):
            stream.write(b"x" * (1 << 20))
    tracemalloc.start()
    with pytest.raises(InputError, match="is longer than 4 MB"):
        Pool(path).scan()
    top = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert top < 64 << 20


def test_numbers_that_json_has_no_word_for_are_null(tmp_path):
    rows = [{"text": "a", "score": float("nan"), "more": [{"x": float("inf")}, 1.5]}]
    Pool(rows).write_rows([0], tmp_path / "o.jsonl")

    def refuse(word):
        raise AssertionError(word)

    line = json.loads((tmp_path / "o.jsonl").read_text(), parse_constant=refuse)
    assert line == {"text": "a", "score": None, "more": [{"x": None}, 1.5]}


def test_fingerprint_is_of_names_and_bytes(tmp_path):
    def scan(folder, name, rows):
        (tmp_path / folder).mkdir(exist_ok=True)
        return Pool(write_jsonl(tmp_path / folder / name, rows)).scan().fingerprint

    base = scan("a", "p.jsonl", [row(0)])
    assert scan("b", "p.jsonl", [row(0)]) == base
    assert scan("b", "q.jsonl", [row(0)]) != base
    assert scan("b", "p.jsonl", [row(1)]) != base
    memory = Pool([row(0)]).scan().fingerprint
    assert memory == Pool(datasets.Dataset.from_list([row(0)])).scan().fingerprint
    assert memory != Pool([row(1)]).scan().fingerprint


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_memory_does_not_grow_with_the_pool(tmp_path, kind, monkeypatch):
    for module in (iprox.data.file_types, iprox.data.readers):
        monkeypatch.setattr(module, "_CHUNK", 1 << 14)

    def peak(count):
        rows = [{"id": f"row number {i}", "text": "word " * 40} for i in range(count)]
        path = tmp_path / f"p{count}.{kind}"
        if kind == "parquet":
            write_parquet(path, rows)
        elif kind == "json":
            path.write_text(json.dumps(rows))
        else:
            write_jsonl(path, rows)
        pool = Pool(path)
        tracemalloc.start()
        pool.scan()
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(500)  # imports and caches
    # 8 bytes a row and the array's slack; one row held would be 200 bytes of text alone.
    assert peak(6500) - peak(1500) < 5000 * 40


def test_a_parquet_row_group_is_not_held_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(iprox.data.file_types, "_CHUNK", 1 << 14)
    rng = np.random.default_rng(0)
    table = pa.table({"text": [rng.bytes(1000).hex() for _ in range(8000)]})  # 16 MB, not compressible to nothing
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=8000)
    del table
    before = pa.total_allocated_bytes()
    peak = max(pa.total_allocated_bytes() for _ in Pool(tmp_path / "p.parquet"))
    assert peak - before < 6e6


def test_rows_with_other_ids_than_expected_are_not_written(tmp_path):
    pool = Pool([{"id": f"r{i}", "text": "a"} for i in range(5)])
    pool.write_rows([3, 1], tmp_path / "out.jsonl", ids=["r3", "r1"])
    written = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(InputError, match="'r2' was expected"):
        pool.write_rows([3, 1], tmp_path / "out.jsonl", ids=["r3", "r2"])
    assert (tmp_path / "out.jsonl").read_bytes() == written


def test_rows_that_are_validation_examples_are_counted():
    """Whatever their format, id and white space; another answer to the same question is another example."""
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    pool = Pool(
        [
            {"id": "1", "messages": turns},
            {"id": "2", "instruction": "Q", "output": "A\n"},
            {"id": "3", "instruction": "Q", "output": "B"},
            {"id": "4", "text": "T"},
        ]
    )
    overlap = Overlap(
        {"validation set of a": Pool([{"messages": turns}, {"text": "U"}]), "test set of b": Pool([{"text": "T"}])}
    )
    pool.scan(look=overlap.look)
    first, second = sorted(overlap.warnings(), reverse=True)
    assert first.startswith("2 rows of the pool are word for word in the validation set of a (first: row:1);")
    assert second.startswith("1 row of the pool is word for word in the test set of b (first: row:4);")
    Pool([{"text": "V"}]).scan(look=(other := Overlap({"test set of b": Pool([{"text": "T"}])})).look)
    assert other.warnings() == []


def test_scanning_says_how_far_it_is():
    seen = []
    Pool([{"text": "a"} for _ in range(2500)]).scan(seen.append)
    assert seen == [1000, 1000, 500]


def test_columns_of_json_in_parquet_are_objects_again(tmp_path):
    """As `datasets` writes objects of mixed types."""
    tools = [[{"name": "f", "default": default}] for default in ("s", 2, None)]
    turns = [[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]] * 3
    item = pa.struct([("name", pa.string()), ("default", pa.json_())])
    written = [[{"name": "f", "default": json.dumps(each[0]["default"])}] for each in tools]
    column = pa.array(written, pa.list_(pa.struct([("name", pa.string()), ("default", pa.string())]))).cast(
        pa.list_(item)
    )
    meta = pa.array([json.dumps({"a": None}), None, "[1]"]).cast(pa.json_())
    pq.write_table(pa.table({"messages": turns, "tools": column, "meta": meta}), tmp_path / "rows.parquet")
    pool = Pool(tmp_path / "rows.parquet")
    assert [each.rendering["tools"] for each in pool] == tools
    pool.write_rows([0], tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text())["meta"] == {"a": None}
