"""Hostile and damaged inputs for `reliability.py`, by kind: data, rows, paths, recipes, templates, models, machines."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import resource
import shutil
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file, save_file

BUNDLED = Path(str(files("iprox.quickstart")))
CHAT = {"messages": [{"role": "user", "content": "Add 2 and 3."}, {"role": "assistant", "content": "It is 5."}]}
DONE, REFUSED, INTERRUPTED = 0, 2, 130


@dataclass
class Case:
    """A command to try.

    Attributes:
        kind: kind of input.
        name: name within the kind.
        command: arguments of `iprox`.
        code: exit code that is right.
        said: what the message must name, if that is not obvious.
        before: what is done first in the process of the command, such as lowering a limit.
        stdout: file that standard output is sent to, if not a temporary one.
    """

    kind: str
    name: str
    command: list[str]
    code: int = REFUSED
    said: str = ""
    before: Callable[[], Any] = field(default=lambda: None)
    stdout: str = ""


def lines(*rows: object) -> bytes:
    """Return rows as JSON lines."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def zstd(content: bytes) -> bytes:
    """Return content compressed."""
    return pa.compress(content, "zstd", asbytes=True)


class Lab:
    """A folder for inputs, and the commands that read them.

    Args:
        folder: new folder.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.model = folder, BUNDLED / "model"
        self._numbers = itertools.count()
        pool = (BUNDLED / "data/pool.jsonl").read_bytes().splitlines(keepends=True)
        self.pool = self.file("good.jsonl", b"".join(pool[:40]))
        self.validation = self.file("val.jsonl", b"".join(pool[40:44]))

    def place(self, name: str) -> Path:
        """Return a path in a new folder."""
        folder = self.folder / f"{next(self._numbers):03}"
        folder.mkdir()
        return folder / name

    def file(self, name: str, content: bytes) -> Path:
        """Return a new file."""
        path = self.place(name)
        path.write_bytes(content)
        return path

    def copy(self, source: Path, **changed: bytes | None) -> Path:
        """Return a copy of a model folder, of links to its files, with some replaced, added or (None) left out.

        Dots in names are written as `__`.
        """
        folder = self.place("model")
        folder.mkdir()
        replaced = {name.replace("__", "."): content for name, content in changed.items()}
        for file in source.iterdir():
            if file.name not in replaced:
                os.link(file, folder / file.name)
        for name, content in replaced.items():
            if content is not None:
                (folder / name).write_bytes(content)
        return folder

    def changed(self, file: str, changes: Mapping[str, Any], source: Path | None = None) -> Path:
        """Return a copy of a model folder with keys of a JSON file changed, or removed if None is `...`."""
        source = source or self.model
        config = {**json.loads((source / file).read_text()), **changes}
        return self.copy(source, **{file.replace(".", "__"): json.dumps(config).encode()})

    def score(self, *more: str, **inputs: Path | str) -> list[str]:
        """Return an `iprox score` command with some inputs replaced."""
        given = {"model": self.model, "pool": self.pool, "output": self.place("out")} | inputs
        validation = given.pop("validation", f"v={self.validation}")
        options = [part for key, value in given.items() for part in (f"--{key}", str(value))]
        return ["score", *options, "--validation", str(validation), *more]

    def read(self, pool: Path, *more: str) -> list[str]:
        """Return a command that reads a pool, without gradients."""
        return self.score("--estimator=length", *more, pool=pool)

    def recipe(self, text: str | None = None, **sections: Any) -> Path:
        """Return a recipe file: a good one with some sections replaced, or with text appended."""
        whole = {
            "model": str(self.model),
            "data": {"pool": [str(self.pool)], "validation": {"v": str(self.validation)}, "max_length": 64},
            "select": {"count": 4},
            "output": str(self.place("run")),
        }
        start = {key: value for key, value in {**whole, **sections}.items() if value is not ...}
        return self.file("recipe.yaml", json.dumps(start)[:-1].encode() + (text or "").encode() + b"}")


def data(lab: Lab) -> Iterator[Case]:
    """Yield commands that read pools that are no data, or damaged."""
    good = lab.pool.read_bytes()
    contents: dict[str, bytes] = {
        "empty.jsonl": b"",
        "blank.jsonl": b"\n \n\n",
        "utf16.jsonl": good.decode().encode("utf-16"),
        "latin1.jsonl": '{"text": "caf\xe9"}\n'.encode("latin-1"),
        "bytes.jsonl": os.urandom(4096),
        "nul.jsonl": bytes(4096),
        "cut.jsonl": good[: len(good) - 20],
        "array.jsonl": json.dumps([CHAT, CHAT]).encode(),
        "pretty-array.jsonl": json.dumps([CHAT, CHAT], indent=2).encode(),
        "pretty.jsonl": (json.dumps(CHAT, indent=2) + "\n").encode() * 2,
        "lists.jsonl": lines([1, 2], [3]),
        "numbers.jsonl": lines(1, 2.5, None, True),
        "deep.jsonl": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        "keys.jsonl": lines({"question": "2 + 3", "answer": "5"}),
        "huge-number.jsonl": b'{"id": ' + b"9" * 5000 + b', "text": "a b c"}\n',
        "nan.jsonl": b'{"id": NaN, "source": [NaN], "text": "a b c"}\n',
        "surrogate.jsonl": b'{"text": "a \\ud800 b"}\n',
        "lfs.jsonl": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n",
        "page.jsonl": b"<!DOCTYPE html><html><body>404</body></html>\n",
        "same-ids.jsonl": lines({**CHAT, "id": "a"}, {**CHAT, "id": "a"}),
        "odd.txt": good,
        "no-extension": good,
        "one.json": b"{}",
        "numbers.json": b"[1, 2]",
        "cut.json": b'[{"text": "a"}, {"te',
        "text.json": b"hello",
        "empty.csv": b"",
        "header.csv": b"text\n",
        "other.csv": b"question,answer\n1,2\n",
        "ragged.csv": b"text,source\na,b\na,b,c,d\n",
        "quote.csv": b'text\n"never closed\n' + b"a\n" * 10,
        "zero.parquet": b"",
        "garbage.parquet": os.urandom(500),
        "lfs.parquet": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n",
        "garbage.jsonl.gz": os.urandom(500),
        "cut.jsonl.gz": gzip.compress(good)[:300],
        "damaged.jsonl.gz": gzip.compress(good)[:300] + b"xxxx" + gzip.compress(good)[304:],
        "plain.jsonl.gz": good,
        "garbage.jsonl.zst": os.urandom(500),
        "cut.jsonl.zst": zstd(good)[:300],
        "bomb-line.jsonl.zst": zstd(b'{"text": "' + b"a" * (1 << 30) + b'"}'),
        "bomb-spaces.jsonl.gz": gzip.compress(b" " * (1 << 28), 1),
        "bomb-lines.jsonl.zst": zstd(b"\n" * (1 << 26)),
        "bomb-array.json.zst": zstd(b'["' + b"a" * (1 << 28)),
        "bomb-field.csv.zst": zstd(b'text\n"' + b"a" * (1 << 28)),
    }
    for name, content in contents.items():
        yield Case("data files", name, lab.read(lab.file(name, content)))
    whole = lab.place("whole.parquet")
    pq.write_table(pa.table({"text": ["some text"] * 200}), whole)
    middle = bytearray(whole.read_bytes())
    middle[20:40] = b"x" * 20
    for name, content in {"cut.parquet": whole.read_bytes()[:-20], "damaged.parquet": bytes(middle)}.items():
        yield Case("data files", name, lab.read(lab.file(name, content)))
    tables: dict[str, Any] = {
        "bytes": {"text": [b"\xff\xfe"]},
        "unknown": {"x": [1.0]},
        "nulls": {"text": pa.array([None], pa.string())},
        "no rows": {"text": pa.array([], pa.string())},
    }
    for name, columns in tables.items():
        path = lab.place("t.parquet")
        pq.write_table(pa.table(columns), path)
        yield Case("data files", f"Parquet: {name}", lab.read(path))


def rows(lab: Lab) -> Iterator[Case]:
    """Yield commands that read rows that must not be scored as they are."""
    user, answer = CHAT["messages"]

    def chat(*messages: object, **more: object) -> dict[str, object]:
        return {"messages": list(messages), **more}

    detail = [{"begin_offset": 0, "end_offset": 1, "train": False}]
    alpaca = {"instruction": "Add 2 and 3.", "output": ""}
    wrong: dict[str, object] = {
        "messages of text": {"messages": "hello"},
        "no messages": chat(),
        "messages that are texts": chat("hello"),
        "no role": chat({"content": "x"}, answer),
        "content missing": chat(user, {"role": "assistant"}),
        "content a number": chat(user, {"role": "assistant", "content": 5}),
        "content null": chat(user, {"role": "assistant", "content": None}),
        "no answer": chat(user),
        "empty answer": chat(user, {"role": "assistant", "content": ""}),
        "Alpaca, empty output": alpaca,
        "Alpaca, empty output and text": {**alpaca, "text": "Below is an instruction"},
        "completion missing": {"prompt": "Add 2 and 3.", "completion": None},
        "completion empty": {"prompt": "Add 2 and 3.", "completion": ""},
        "ShareGPT, function turn": {"conversations": [{"from": "function_response", "value": "x"}]},
        "ShareGPT, value missing": {"conversations": [{"from": "human"}, {"from": "gpt"}]},
        "images": {**CHAT, "images": ["a.png"]},
        "image of one": {**CHAT, "image": "a.png"},
        "videos": {**CHAT, "videos": ["a.mp4"]},
        "audio": {**CHAT, "audio": "a.wav"},
        "image part": chat({"role": "user", "content": [{"type": "image"}]}, answer),
        "KTO, bad answer": {"prompt": "Add 2 and 3.", "completion": "6", "label": False},
        "all turns masked": chat(user, {**answer, "train": False}),
        "weight 0.5": chat(user, {**answer, "weight": 0.5}),
        "part of a turn masked": chat(user, {**answer, "train_detail": detail}),
        "user turn trained": chat({**user, "train": True}, answer),
        "system turns differ": chat({"role": "system", "content": "a"}, user, answer, system="b"),
        "tools not rendered": {**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]},
        "tools not JSON": {**CHAT, "tools": "{"},
        "functions": {**CHAT, "functions": [{"name": "f"}]},
        "reasoning not rendered": chat(user, {**answer, "reasoning_content": "2 + 3 = 5"}),
        "source a list": {**CHAT, "source": ["a"]},
        "id an object": {**CHAT, "id": {"a": 1}},
        "empty text": {"text": ""},
        "text a list": {"text": ["a"]},
    }
    for name, row in wrong.items():
        yield Case("rows", name, lab.read(lab.file("pool.jsonl", lines(CHAT, row))), said="pool.jsonl:2")
    yield Case("rows", "escapes", lab.read(lab.file("a\x1b[31m.jsonl", lines({"\x1b]0;x\x07": 1}))))
    yield Case("rows", "row without a column", lab.read(lab.pool, "--columns", "output=nothing", "--columns=x"))


def paths(lab: Lab) -> Iterator[Case]:
    """Yield commands with paths that are no files, or cannot be."""
    fifo, pipe = lab.place("fifo.jsonl"), lab.place("socket.jsonl")
    os.mkfifo(fifo)
    with socket.socket(socket.AF_UNIX) as listening:
        os.chdir(pipe.parent)
        listening.bind(pipe.name)
    links = {"zero": "/dev/zero", "null": "/dev/null", "loop": "loop.jsonl", "gone": "nothing.jsonl"}
    linked = {}
    for name, goal in links.items():
        linked[name] = lab.place(f"{name}.jsonl")
        linked[name].symlink_to(goal)
    folder = lab.place("folder.jsonl")
    folder.mkdir()
    given = {
        "missing": lab.folder / "nothing.jsonl",
        "no match": lab.folder / "nothing*.jsonl",
        "pipe": fifo,
        "socket": pipe,
        "device": "/dev/zero",
        "folder": folder,
        "long name": lab.folder / ("a" * 300 + ".jsonl"),
        "long path": "a/" * 2500 + "a.jsonl",
        "NUL": "a\0b.jsonl",
        "no such user": "~nobody-of-this-name/a.jsonl",
        **{f"link: {name}": path for name, path in linked.items()},
    }
    for name, path in given.items():
        yield Case("paths", f"pool: {name}", lab.read(Path(path) if name != "NUL" else path))  # pyright: ignore
        if name not in ("no match", "folder"):
            yield Case("paths", f"validation: {name}", lab.score("--estimator=length", validation=f"v={path}"))
    outputs = {
        "file": lab.pool,
        "below a file": lab.pool / "out",
        "root": "/",
        "folder with files": lab.pool.parent,
        "long name": lab.folder / ("a" * 256),
        "long path": "a/" * 2500,
        "NUL": "a\0b",
        "loop of links": linked["loop"] / "out",
        "kernel's files": "/proc/x",
        "empty": "",
    }
    for name, path in outputs.items():
        yield Case("paths", f"output: {name}", lab.score("--estimator=length", output=path))
        run = ["run", str(lab.recipe()), "--fresh", "--set", f"output={json.dumps(str(path))}"]
        yield Case("paths", f"run's output: {name}", run)
    for name in ("missing", "long name", "long path", "NUL", "pipe", "device", "link: loop"):
        yield Case("paths", f"model: {name}", lab.score(model=given[name]))
        yield Case("paths", f"recipe: {name}", ["run", str(given[name])])
    for name in ("o/aligned", "./o", "a/b/c", "..", ""):
        yield Case("paths", f"model: {name!r}", lab.score(model=name))


def recipes(lab: Lab) -> Iterator[Case]:
    """Yield runs of recipes that are none, or ask for what cannot be."""
    bomb = "".join(f", a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10))
    bomb = ', a0: &a0 ["x", "x", "x", "x", "x", "x", "x", "x", "x", "x"]' + bomb
    texts = {
        "empty": b"",
        "a list": b"- a\n",
        "text": b"hello\n",
        "not YAML": b"model: [\n",
        "tabs": b"model:\n\tx: 1\n",
        "NUL": b"model: a\0b\n",
        "Latin-1": "model: caf\xe9\n".encode("latin-1"),
        "20,000 deep": b"seed: " + b"[" * 20_000 + b"]" * 20_000,
        "900 deep": b"seed: " + b"[" * 900 + b"]" * 900,
        "a Python object": b"seed: !!python/object/apply:os.system ['touch /tmp/pwned']\n",
        "a key twice": b"seed: 1\nseed: 2\n",
        "a list as key": b"? [a]\n: 1\n",
        "two documents": b"seed: 1\n---\nseed: 2\n",
        "a megabyte of text": b"model: " + b"a" * (1 << 20),
    }
    for name, text in texts.items():
        yield Case("recipes", name, ["run", str(lab.file("recipe.yaml", text))])
    endings = {
        "bomb at the pool": f"{bomb}, data: {{pool: *a9, validation: {{v: x}}}}",
        "bomb at the seed": f"{bomb}, seed: *a9",
        "bomb at a section": f"{bomb}, influence: *a9",
        "bomb at an unknown key": bomb,
        "alias to itself": ", seed: &s [*s]",
        "merge key": ", audit: {<<: {sample: 3}}",
        "task no": f', data: {{pool: "{lab.pool}", validation: {{no: "{lab.validation}"}}}}',
        "task 1": f', data: {{pool: "{lab.pool}", validation: {{1: "{lab.validation}"}}}}',
    }
    for name, text in endings.items():
        left_out = {key: ... for key in ("data", "seed") if f"{key}:" in text}
        yield Case("recipes", name, ["run", str(lab.recipe(text, **left_out))])
    text = '["x"]' + "".join(f" #{n}" for n in range(3))
    yield Case("recipes", "--set not YAML", ["run", str(lab.recipe()), "--set", "seed=[" + text])
    yield Case("recipes", "--set of nothing", ["run", str(lab.recipe()), "--set", "seed"])
    settings = [
        "nothing=1",
        "proxy.sparsty=0.5",
        "seed=-1",
        "seed=1e400",
        "seed=x",
        "device=tpu",
        "device=cuda:7",
        "dtype=int4",
        "batch_tokens=0",
        "data.max_length=0",
        "data.max_length=1",
        "data.num_proc=-1",
        "data.pool=[]",
        "data.pool=5",
        "data.validation={}",
        "data.validation=[a]",
        "data.on_bad_row=guess",
        "data.chat_template=nothing.jinja",
        "data.columns=5",
        "proxy.sparsity=0",
        "proxy.sparsity=1",
        "proxy.sparsity=-1",
        "proxy.sparsity=.nan",
        "proxy.sparsity=0.9999",
        "proxy={parameters: 1}",
        "proxy={flops: 1e-9}",
        "proxy={sparsity: 0.5, fidelity: 0.9}",
        "proxy={sparsity: 0.5, align: {learning_rate: .inf}}",
        "proxy={method: off-the-shelf}",
        "proxy={method: off-the-shelf, model: o/nothing}",
        "warmup.epochs=0",
        "warmup.learning_rate=.inf",
        "warmup.learning_rate=x",
        "warmup.lora=100000000",
        "influence.estimator=magic",
        "influence.damping=-1",
        "influence.checkpoints=some",
        "select={count: 1000}",
        "select={count: 0}",
        "select={fraction: 2}",
        "select={count: 4, fraction: 0.5}",
        "select={count: 4, task: nothing}",
        "select={count: 4, source_floor: {nothing: 0.5}}",
        "select={count: 20, source_cap: 0.001}",
        "select={count: 4, strategy: magic}",
        "refine={candidates: 0.01}",
        "audit.sample=-1",
        "finetune={test: {v: nothing.jsonl}}",
        "ray_workers=1000",
        "ray_workers=-1",
        "tracking=magic",
        "tracking=wandb",
        f"data.validation={{v: {lab.pool}}}",
    ]
    for each in settings:
        name = each.replace(str(lab.pool), "the pool")
        yield Case("settings", name, ["run", str(lab.recipe()), "--set", each])
    for each in ("proxy.sparsity=0.9999", "select={count: 1000}", "ray_workers=1000", "refine={candidates: 0.01}"):
        yield Case("settings", f"plan: {each}", ["plan", str(lab.recipe()), "--set", each])
    yield Case(
        "settings",
        "plan: pool judged by itself",
        ["plan", str(lab.recipe(data={"pool": [str(lab.pool)], "validation": {"v": str(lab.pool)}}))],
    )
    yield Case("settings", "plan: output a file", ["plan", str(lab.recipe(output=str(lab.pool)))])
    for argv in (["run"], ["nothing"], ["score"], ["run", str(lab.recipe()), "--stop-after", "lunch"], ["--nothing"]):
        yield Case("settings", f"iprox {argv[0]} ({len(argv)} arguments)", argv)


def templates(lab: Lab) -> Iterator[Case]:
    """Yield commands with chat templates that loop, grow, fail or escape."""
    sources = {
        "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "grows": "{% for a in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
        "a long text": "{{ 'a' * 10 ** 11 }}",
        "a long range": "{% for a in range(10 ** 9) %}{% endfor %}",
        "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "divides by zero": "{{ 1 / 0 }}",
        "is not a template": "{% for %}",
        "is empty": " ",
        "raises": "{{ raise_exception('\x1b[31mno\x1b]0;x\x07') }}",
        "unknown attribute": "{{ messages.nothing.more }}",
        "unknown filter": "{{ messages | nothing }}",
        "reads the class": "{{ ''.__class__.__mro__ }}",
        "includes": "{% include '/etc/passwd' %}",
        "pads": "{{ 'a' | center(10 ** 10) }}",
        "a large number": "{{ 9 ** 9 ** 9 }}",
        "formats": "{{ '%99999999999d' % 5 }}",
        "leaves answers out": "{% for m in messages %}{{ m.role }}{% endfor %}",
    }
    for name, source in sources.items():
        template = lab.file("t.jinja", source.encode())
        yield Case("templates", name, lab.read(lab.pool, "--set", f"data.chat_template={template}"))
    for name, path in {"device": "/dev/zero", "folder": str(lab.folder)}.items():
        yield Case("templates", name, lab.read(lab.pool, "--set", f"data.chat_template={path}"))
    stripped = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    pool = lab.file(
        "think.jsonl",
        lines({"messages": [CHAT["messages"][0], {"role": "assistant", "content": "<think>a b</think>5"}]}),
    )
    yield Case(
        "templates",
        "strips reasoning",
        lab.score(
            "--estimator=length",
            "--set",
            f"data.chat_template={lab.file('t.jinja', stripped.encode())}",
            pool=pool,
            validation=f"v={pool}",
        ),
    )


def weights(lab: Lab) -> dict[str, bytes]:
    """Return damaged safetensors files by what is wrong with them."""
    whole = (lab.model / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    first, second = [name for name in header if name != "__metadata__"][:2]

    def with_header(changed: dict[str, Any]) -> bytes:
        text = json.dumps({**header, **changed}).encode()
        return struct.pack("<Q", len(text)) + text + body

    return {
        "empty": b"",
        "header of 2^62 bytes": struct.pack("<Q", 1 << 62) + whole[8:],
        "header of 99 MB": struct.pack("<Q", 99_000_000) + whole[8:],
        "header not JSON": whole[:8] + b"x" * length + body,
        "cut": whole[: len(whole) // 2],
        "overlapping": with_header({first: {**header[first], "data_offsets": header[second]["data_offsets"]}}),
        "beyond the file": with_header({first: {**header[first], "data_offsets": [len(body), 2 * len(body)]}}),
        "a pickle": b"\x80\x04cos\nsystem\n(S'touch /tmp/pwned'\ntR." + b"x" * 500,
        "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n",
    }


def models(lab: Lab) -> Iterator[Case]:
    """Yield commands that load damaged, hostile or unsuitable models."""
    import torch

    for name, content in weights(lab).items():
        yield Case("models", f"weights: {name}", lab.score(model=lab.copy(lab.model, model__safetensors=content)))
    tensors = load_file(lab.model / "model.safetensors")
    some, norm = "model.layers.0.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight"
    for what, (key, value) in {
        "NaN": (some, float("nan")),
        "infinite": (some, float("inf")),
        "NaN in a norm": (norm, float("nan")),
        "1e30": (some, 1e30),
        "all zero": ("", 0.0),
    }.items():
        folder = lab.copy(lab.model, model__safetensors=None)
        filled = {k: torch.full_like(v, value) if key in ("", k) else v for k, v in tensors.items()}
        save_file(filled, folder / "model.safetensors", {"format": "pt"})
        yield Case("models", f"weights: {what}", lab.score("--estimator=tracin", model=folder))
    fewer = {key: value for key, value in tensors.items() if key != some}
    for what, kept in {
        "tensor missing": fewer,
        "tensor of another shape": {**fewer, some: tensors[some][:5].clone()},
    }.items():
        folder = lab.copy(lab.model, model__safetensors=None)
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        yield Case("models", f"weights: {what}", lab.score(model=folder))
    folder = lab.copy(lab.model, model__safetensors=None)
    torch.save(tensors, folder / "pytorch_model.bin")
    yield Case("models", "weights: pickled only", lab.score(model=folder))
    for what, name in {
        "a pickle": "pytorch_model.bin",
        "a file outside": "../outside.safetensors",
        "an absolute path": str(lab.model / "model.safetensors"),
        "a missing file": "more.safetensors",
    }.items():
        index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}).encode()
        folder = lab.copy(lab.model, model__safetensors__index__json=index)
        torch.save(tensors, folder / "pytorch_model.bin")
        shutil.copy(lab.model / "model.safetensors", folder.parent / "outside.safetensors")
        yield Case("models", f"index names {what}", lab.score(model=folder))
    for what, content in {"not JSON": b"{", "a list": b"[]", "empty": b"", "deep": b"[" * 99_999}.items():
        folder = lab.copy(lab.model, model__safetensors__index__json=content)
        yield Case("models", f"index {what}", lab.score(model=folder))
        yield Case("models", f"config {what}", lab.score(model=lab.copy(lab.model, config__json=content)))
        yield Case("models", f"tokenizer {what}", lab.score(model=lab.copy(lab.model, tokenizer__json=content)))
    yield Case("models", "tokenizer of bytes", lab.score(model=lab.copy(lab.model, tokenizer__json=os.urandom(99))))
    yield Case("models", "no config", lab.score(model=lab.copy(lab.model, config__json=None)))
    yield Case(
        "models",
        "no tokenizer",
        lab.score(model=lab.copy(lab.model, tokenizer__json=None, tokenizer_config__json=None)),
    )
    yield Case("models", "no chat template", lab.score(model=lab.copy(lab.model, chat_template__jinja=None)))
    yield Case("models", "empty folder", lab.score(model=lab.place("")))
    configs: dict[str, dict[str, Any]] = {
        "hidden_size -5": {"hidden_size": -5},
        "hidden_size 0": {"hidden_size": 0},
        "hidden_size text": {"hidden_size": "big"},
        "hidden_size 3.5": {"hidden_size": 3.5},
        "hidden_size null": {"hidden_size": None},
        "hidden_size 1e18": {"hidden_size": 10**18},
        "hidden_size 64": {"hidden_size": 64},
        "layers 1e9": {"num_hidden_layers": 10**9},
        "layers -1": {"num_hidden_layers": -1},
        "heads 0": {"num_attention_heads": 0},
        "heads 7": {"num_attention_heads": 7, "num_key_value_heads": 3},
        "vocabulary 1e12": {"vocab_size": 10**12},
        "vocabulary 5": {"vocab_size": 5},
        "layer types": {"layer_types": ["nothing"] * 6},
        "activation": {"hidden_act": "nothing"},
        "eps text": {"rms_norm_eps": "small"},
        "rope": {"rope_parameters": {"rope_type": "nothing"}},
        "dtype": {"dtype": "float999"},
        "model type": {"model_type": "nothing"},
        "model type a number": {"model_type": 5},
        "architecture": {"architectures": ["BertForMaskedLM"]},
        "classifier": {"architectures": ["Qwen3ForSequenceClassification"]},
        "own code": {"auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}, "model_type": "mine"},
        "BERT": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        "T5": {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "GPTQ": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "AWQ": {"quantization_config": {"quant_method": "awq", "bits": 4}},
        "unknown quantization": {"quantization_config": {"quant_method": "nothing"}},
        "quantization a list": {"quantization_config": [1]},
    }
    for name, changes in configs.items():
        yield Case("models", f"config: {name}", lab.score(model=lab.changed("config.json", changes)))


def adapter(lab: Lab, config: object, tensors: bytes | None = b"") -> Path:
    """Return a folder of a PEFT adapter."""
    folder = lab.place("adapter")
    folder.mkdir()
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if tensors is not None:
        (folder / "adapter_model.safetensors").write_bytes(tensors)
    return folder


def adapters(lab: Lab) -> Iterator[Case]:
    """Yield commands that load damaged adapters."""
    import torch

    lora = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(lab.model),
        "r": 4,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    file = lab.place("a.safetensors")
    save_file({name.format("A"): torch.zeros(4, 128), name.format("B"): torch.zeros(128, 4)}, file)
    whole = file.read_bytes()
    other = lab.place("b.safetensors")
    save_file({name.format("A"): torch.zeros(4, 99), name.format("B"): torch.zeros(128, 4)}, other)
    one, two = lab.place("one"), lab.place("two")
    for folder, base in ((one, two), (two, one)):
        shutil.copytree(adapter(lab, {**lora, "base_model_name_or_path": str(base)}, whole), folder)
    made = {
        "prompt tuning": adapter(lab, {**lora, "peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5}, whole),
        "unknown type": adapter(lab, {**lora, "peft_type": "NOTHING"}, whole),
        "type a list": adapter(lab, {**lora, "peft_type": [1]}, whole),
        "no base": adapter(lab, {**lora, "base_model_name_or_path": None}, whole),
        "base missing": adapter(lab, {**lora, "base_model_name_or_path": "/nothing"}, whole),
        "base a number": adapter(lab, {**lora, "base_model_name_or_path": 5}, whole),
        "base of each other": one,
        "not JSON": adapter(lab, "{", whole),
        "a list": adapter(lab, [], whole),
        "no weights": adapter(lab, lora, None),
        "weights cut": adapter(lab, lora, whole[:-9]),
        "weights of another shape": adapter(lab, lora, other.read_bytes()),
        "rank 9": adapter(lab, {**lora, "r": 9}, whole),
        "rank -1": adapter(lab, {**lora, "r": -1}, whole),
        "rank text": adapter(lab, {**lora, "r": "x"}, whole),
        "other layers": adapter(lab, {**lora, "target_modules": ["nothing"]}, whole),
    }
    for what, folder in made.items():
        yield Case("adapters", what, lab.score(model=folder))


def proxies(lab: Lab, proxy: Path) -> Iterator[Case]:
    """Yield commands that load damaged proxies.

    Args:
        proxy: a sound low-rank proxy of the bundled model.
    """
    quantization = json.loads((proxy / "config.json").read_text())["quantization_config"]
    ranks = quantization["ranks"]
    first = next(iter(ranks))

    def changed(**changes: Any) -> Path:
        whole = {key: value for key, value in {**quantization, **changes}.items() if value is not ...}
        return lab.changed("config.json", {"quantization_config": whole}, proxy)

    for value in (-5, 0, 10**9, 10**12, 10**30, 3.5, None, "x", [1], ranks[first] + 1, True):
        yield Case("proxies", f"rank {value}", lab.score(model=changed(ranks={**ranks, first: value})))
    wrong: dict[str, Any] = {
        "ranks a list": {"ranks": [1]},
        "no ranks": {"ranks": ...},
        "ranks of an unknown layer": {"ranks": {**ranks, "../../x": 4}},
        "ranks of a norm": {"ranks": {**ranks, "model.norm": 4}},
        "depth text": {"depth": "x"},
    }
    for name, changes in wrong.items():
        yield Case("proxies", name, lab.score(model=changed(**changes)))
    whole = (proxy / "model.safetensors").read_bytes()
    yield Case("proxies", "weights cut", lab.score(model=lab.copy(proxy, model__safetensors=whole[:-999])))
    options = ["--pool", str(lab.pool), "--output"]
    for command in ("align", "audit"):
        more = ["--validation", f"v={lab.validation}"] if command == "audit" else []
        given = ["--model", str(lab.changed("config.json", {"rms_norm_eps": 1e-5})), "--proxy", str(proxy), *more]
        yield Case("proxies", f"{command}: of another target", [command, *given, *options, str(lab.place("o"))])
        given = ["--model", str(lab.model), "--proxy", str(lab.model), *more]
        yield Case("proxies", f"{command}: of no proxy", [command, *given, *options, str(lab.place("o"))])
    yield Case(
        "proxies",
        "proxy of a proxy",
        ["compress", "--model", str(proxy), "--sparsity=0.5", *options, str(lab.place("o"))],
    )
    tuned = ["finetune", "--model", str(proxy), "--selection", str(lab.pool), "--output", str(lab.place("o"))]
    yield Case("proxies", "fine-tuning a proxy", tuned)
    yield Case("proxies", "export of no proxy", ["export", str(lab.model), "--output", str(lab.place("o"))])


def results(lab: Lab, run: Path, pool: Path) -> Iterator[Case]:
    """Yield commands that read results that are none, damaged, or of other data.

    Args:
        run: folder of a finished run.
        pool: its pool.
    """
    scores = (run / "scores.parquet").read_bytes()
    folders = {"no results": lab.folder / "nothing", "a file": lab.pool, "a folder of others": lab.pool.parent}
    for name, content in {"cut scores": scores[: len(scores) // 2], "empty scores": b"", "no scores": None}.items():
        folders[name] = lab.place("r")
        shutil.copytree(run, folders[name])
        (folders[name] / "scores.parquet").unlink() if content is None else (
            folders[name] / "scores.parquet"
        ).write_bytes(content)
    data = ["--pool", str(pool), "--output"]
    validation = ["--validation", f"v={lab.validation}"]
    for name, folder in folders.items():
        commands = {
            "select": ["select", "--scores", str(folder), "--count=4", *data, str(lab.place("s.jsonl"))],
            "refine": [
                "refine",
                "--scores",
                str(folder),
                "--model",
                str(lab.model),
                *validation,
                *data,
                str(lab.place("o")),
            ],
            "compare": ["compare", str(folder), str(run)],
            "query": ["query", "--index", str(folder), *validation, "--output", str(lab.place("o"))],
            "report": ["report", str(folder)],
        }
        for command, argv in commands.items():
            yield Case("results", f"{command}: {name}", argv)
    other = ["--pool", str(lab.validation), "--output", str(lab.place("s.jsonl"))]
    yield Case("results", "select: scores of another pool", ["select", "--scores", str(run), "--count=4", *other])
    yield Case("results", "select: over the pool", ["select", "--scores", str(run), "--count=4", *data, str(pool)])
    tuned = ["finetune", "--model", str(lab.model), "--selection", str(run / "scores.parquet"), "--output"]
    yield Case("results", "finetune: scores", [*tuned, str(lab.place("o"))])


def machine(lab: Lab, small: Path, read_only: Path) -> Iterator[Case]:
    """Yield commands on machines that lack something.

    Args:
        small: file system with little space.
        read_only: file system that cannot be written to.
    """

    def limit(name: int, size: int) -> Callable[[], None]:
        return lambda: resource.setrlimit(name, (size, size))

    def variables(**values: str) -> Callable[[], None]:
        return lambda: os.environ.update(values)

    closed = lab.place("closed")
    closed.mkdir(mode=0o700)

    def nobody() -> None:
        for folder in (lab.folder, *lab.folder.parents):
            folder.chmod(folder.stat().st_mode | 0o11)
        os.environ["HOME"] = "/nonexistent"
        os.setgid(65534)
        os.setuid(65534)

    yield Case("machine", "full disk, score", lab.score("--estimator=length", output=small / "a"))
    yield Case("machine", "full disk, run", ["run", str(lab.recipe(output=str(small / "b")))])
    compress = ["compress", "--model", str(lab.model), "--pool", str(lab.pool), "--sparsity=0.5", "--output"]
    yield Case("machine", "full disk, compress", [*compress, str(small / "c")])
    yield Case("machine", "read-only, score", lab.score(output=read_only / "a"))
    yield Case("machine", "read-only, run", ["run", str(lab.recipe(output=str(read_only / "b")))])
    yield Case("machine", "read-only, compress", [*compress, str(read_only / "c")])
    yield Case("machine", "no permission, output", lab.score(output=closed / "a"), before=nobody)
    secret = lab.file("secret.jsonl", b"x")
    secret.chmod(0o600)
    yield Case("machine", "no permission, pool", lab.score(pool=secret, output=lab.folder / "x"), before=nobody)
    yield Case(
        "machine",
        "files of 1 MB at most",
        [*compress, str(lab.place("o"))],
        before=limit(resource.RLIMIT_FSIZE, 1 << 20),
    )
    huge = lab.score("--set", f"batch_tokens={1 << 17}")
    yield Case("machine", "batches of memory that is not there", huge, DONE, before=limit(resource.RLIMIT_AS, 6 << 30))
    yield Case("machine", "several processes", lab.score(), before=variables(WORLD_SIZE="2"))
    unreachable = ["run", str(lab.recipe(warmup=False, proxy=False, audit=False)), "--set", "ray_workers=1"]
    for address in ("127.0.0.1:1", "10.255.255.1:6379", "garbage", "ray://127.0.0.1:1"):
        yield Case(
            "machine", f"RAY_ADDRESS={address}", unreachable, said=address, before=variables(RAY_ADDRESS=address)
        )
    good = lab.score("--estimator=length", "--json")
    yield Case("machine", "output of --json to a full device", good, stdout="/dev/full")
    for name, values in {"home": {"HOME": "/nonexistent"}, "temporary folder": {"TMPDIR": "/nonexistent"}}.items():
        yield Case("machine", f"no {name}", lab.score(), DONE, before=variables(**values))
