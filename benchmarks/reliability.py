"""What does iprox do with bad input, damaged run folders and kills? Four tables, on the bundled model.

    python benchmarks/reliability.py                      # about 20 minutes
    python benchmarks/reliability.py --only bad --kind models

`cases` does what each folder of `../shared/cases` says; `bad` gives more than 300 hostile and damaged inputs
(`hostile.py`); `damage` takes a run, damages its folder and starts it again; `kills` kills runs at random moments and
starts them again. A command runs in a process forked from this one, which has imported all packages, with a limit on
its time and memory. A refusal is right if it has exit code 2 and one line that begins with `iprox:` (bad rows are
listed below it), names no fault of iprox, and leaves the inputs as they were. Needs root, to mount small disks.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

import hostile
from common import RESULTS, SHARED, revision
from hostile import BUNDLED, DONE, INTERRUPTED, REFUSED, Lab
from iprox.cli import main as run_iprox
from iprox.files import remove, write_text
from iprox.records import key_of, read_json, write_json

# Seconds and bytes that a command may take.
SECONDS, MEMORY = 600, 16 << 30
KILLS, DAMAGES = 30, 14
# Seconds after which a command handles signals. Before that Python ends without a word, and nothing is there yet.
SETTLED = 0.3
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)


class Tried(NamedTuple):
    """What a command did: its exit code (minus the signal that ended it; None: it did not end), and what it said."""

    code: int | None
    out: str
    said: str
    seconds: float


def attempt(argv: list[str], folder: Path, *, kill: tuple[int, float] | None = None, **how: Any) -> Tried:
    """Run `iprox` in a forked process.

    Args:
        argv: arguments.
        folder: working directory.
        kill: signal to send, and after how many seconds.
        how: `before` and `stdout` of a `Case`.
    """
    files = [Path(how.get("stdout") or folder / "stdout.txt"), folder / "stderr.txt"]
    started, child = time.monotonic(), os.fork()
    if child == 0:
        _run(argv, folder, files, how.get("before"))
    code, sent = None, False
    while time.monotonic() - started < SECONDS:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            break
        if kill and not sent and time.monotonic() - started >= kill[1]:
            os.kill(child, kill[0])
            sent = True
        time.sleep(0.01)
    else:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    seconds = time.monotonic() - started
    out, said = ("" if str(file).startswith("/dev") else file.read_text(errors="replace") for file in files)
    return Tried(code, out, said, seconds)


def _run(argv: list[str], folder: Path, files: list[Path], before: Callable[[], Any] | None) -> None:
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        for number, file in enumerate(files, start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if before is not None:
            before()
        code = run_iprox(argv)
        if sys.stdout is not None:  # closed after it failed
            sys.stdout.flush()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def problem(tried: Tried, code: int, said: str) -> str:
    """Return what is wrong with how a command ended; "" if nothing is."""
    refusals = [line for line in tried.said.splitlines() if line.startswith("iprox:")]
    if tried.code is None:
        return f"did not end in {SECONDS} s"
    if "Traceback" in tried.said or "fault of iprox" in tried.said:
        return "a traceback"
    if "\x1b" in tried.said + tried.out:
        return "an escape sequence reached the terminal"
    if tried.code != code:
        return f"exit code {tried.code}, not {code}"
    if code == REFUSED and (len(refusals) != 1 or tried.out):
        return f"{len(refusals)} lines of refusal"
    if said not in tried.said:
        return f"does not name {said!r}"
    return ""


def told(tried: Tried) -> str:
    """Return the last line that says something, without paths of this machine."""
    spoken = tried.said.strip().splitlines() or [""]
    last = next((line for line in reversed(spoken) if line.startswith("iprox:")), spoken[-1])
    return re.sub(r"/tmp/[^:;,'\" ]*/", "", last)[:300]


def state(folder: Path) -> dict[str, str]:
    """Return the files of a folder with the time of their last change, to see whether anything was lost."""
    return {
        str(file): f"{file.lstat().st_size} {file.lstat().st_mtime_ns}"
        for file in folder.rglob("*")
        if not file.is_dir()
    }


def refused(work: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Try all bad inputs of a kind, or all."""
    lab, run = Lab(work / "lab"), Place(work / "results", rows=60)
    made = run.start()
    assert made.code == DONE, made.said
    proxy = next((run.output / "proxy").glob("checkpoint-*"))
    with mounted(work / "small", "size=16k") as small, mounted(work / "read-only", "ro") as read_only:
        kinds = (
            *(hostile.data(lab), hostile.rows(lab), hostile.paths(lab), hostile.recipes(lab), hostile.templates(lab)),
            *(hostile.models(lab), hostile.adapters(lab), hostile.proxies(lab, proxy)),
            *(hostile.results(lab, run.output, run.pool), hostile.machine(lab, small, read_only)),
        )
        for case in (case for cases in kinds for case in cases):
            if kind and case.kind != kind:
                continue
            given = state(work)
            tried = attempt(case.command, work, before=case.before, stdout=case.stdout)
            wrong = problem(tried, case.code, case.said)
            after = state(work)
            lost = [name for name, was in given.items() if after.get(name) != was and Path(name).parent != work]
            yield row(case.kind, case.name, tried, wrong or (f"changed {lost[0]}" if lost else ""))


def row(kind: str, name: str, tried: Tried, wrong: str) -> dict[str, Any]:
    """Return a line of a table."""
    print(
        f"{'ok' if not wrong else 'WRONG'}  {kind}: {name}: {wrong}  [{tried.seconds:.1f} s] {told(tried)}", flush=True
    )
    if wrong:
        print("    | " + "\n    | ".join(tried.said.splitlines()[-4:]), flush=True)
    seconds = round(tried.seconds, 1)
    return {"kind": kind, "name": name, "wrong": wrong, "code": tried.code, "said": told(tried), "seconds": seconds}


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Mount an empty file system in memory; needs root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class Place:
    """A recipe with two checkpoints and all stages, on the start of the bundled pool, with a model of two thin layers.

    Args:
        folder: new folder.
        rows: rows of the pool.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        shutil.copytree(BUNDLED / "model", folder / "model")
        set_seed(0)
        kinds = ["full_attention"] * 2
        size = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "head_dim": 16,
            "num_hidden_layers": 2,
            "layer_types": kinds,
        }
        config = AutoConfig.from_pretrained(folder / "model", **size)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
        self.folder, self.pool, self.output = folder, folder / "pool.jsonl", folder / "run"
        pool = (BUNDLED / "data/pool.jsonl").read_bytes().splitlines(keepends=True)
        self.pool.write_bytes(b"".join(pool[:rows]))
        validation = BUNDLED / "data/arithmetic.val.jsonl"
        (folder / "val.jsonl").write_bytes(b"".join(validation.read_bytes().splitlines(keepends=True)[:8]))
        recipe = {
            "model": str(folder / "model"),
            "data": {"pool": [str(self.pool)], "validation": {"v": str(folder / "val.jsonl")}, "max_length": 64},
            "warmup": {"fraction": 0.2, "epochs": 2, "batch_size": 8},
            "proxy": {"sparsity": 0.5, "align": {"epochs": 1, "held_out": 16}},
            "influence": {"checkpoints": "all", "curvature_examples": 24},
            "audit": {"sample": 24},
            "select": {"fraction": 0.1},
            "output": str(self.output),
        }
        (folder / "recipe.yaml").write_text(json.dumps(recipe))

    def start(self, *options: str, **how: Any) -> Tried:
        """Start the run, or start it again."""

        def before() -> None:
            from iprox.engine import windows
            from iprox.stages import scoring

            windows.WINDOW = scoring.WINDOW = 50

        last = [] if "--stop-after" in options else ["--stop-after", "select"]
        return attempt(["run", str(self.folder / "recipe.yaml"), *last, *options], self.folder, before=before, **how)

    def result(self) -> str:
        """Return a key of the bytes of the scores and the selection."""
        files = ("scores.parquet", "refined/scores.parquet", "selected.jsonl")
        return key_of([(self.output / name).read_bytes().hex() for name in files])

    def copied(self, folder: Path) -> Place:
        """Return a copy."""
        shutil.copytree(self.folder, folder, symlinks=True)
        for file in (folder / "recipe.yaml", folder / "run/recipe.yaml"):
            if file.is_file():
                file.write_text(file.read_text().replace(str(self.folder), str(folder)))
        copy = Place.__new__(Place)
        copy.folder, copy.pool, copy.output = folder, folder / "pool.jsonl", folder / "run"
        return copy


def damaged(work: Path) -> Iterator[dict[str, Any]]:
    """Damage the folder of a run, finished or stopped while it scores, and start it again."""
    whole = Place(work / "whole", rows=200)
    made = whole.start()
    assert made.code == DONE, made.said
    right = whole.result()
    half = stopped_in(work, whole, "scores.parquet.shards", 2)

    def first(run: Path, pattern: str) -> Path:
        return sorted(run.glob(pattern))[0]

    def cut(name: str) -> Callable[[Path], object]:
        return lambda run: os.truncate(first(run, name), first(run, name).stat().st_size // 2)

    def text(name: str, content: str) -> Callable[[Path], object]:
        return lambda run: (run / name).write_text(content)

    def stages(value: object) -> Callable[[Path], object]:
        return lambda run: write_json(run / "run.json", {**read_json(run / "run.json"), "stages": value})

    def flip(name: str) -> Callable[[Path], object]:
        def change(run: Path) -> None:
            content = bytearray(first(run, name).read_bytes())
            content[len(content) // 3] ^= 255
            first(run, name).write_bytes(content)

        return change

    def gone(name: str) -> Callable[[Path], object]:
        return lambda run: remove(first(run, name))

    victim = work / "victim"
    (victim / "deep").mkdir(parents=True)
    (victim / "deep/mine.partial").write_text("mine")

    def linked(run: Path) -> None:
        shutil.rmtree(run / "proxy")
        (run / "proxy").symlink_to(victim)

    shard = "scores.parquet.shards/checkpoint-000/000000.parquet"
    changes: list[tuple[str, Place, Callable[[Path], object], tuple[str, ...]]] = [
        ("shard cut", half, cut(shard), ()),
        ("shard empty", half, text(shard, ""), ()),
        ("shard: a bit changed", half, flip(shard), ()),
        ("shard removed", half, gone(shard), ()),
        ("shards of a finished checkpoint removed", half, gone("scores.parquet.shards/checkpoint-000"), ()),
        ("shards' identity removed", half, gone("scores.parquet.shards/identity.json"), ()),
        ("aligned proxy cut", half, cut("aligned/*/model.safetensors"), ()),
        ("aligned proxy removed", half, gone("aligned/*/model.safetensors"), ()),
        ("checkpoint: a bit changed", half, flip("warmup/*/model.safetensors"), ()),
        ("checkpoint removed", half, gone("warmup/checkpoint-*"), ()),
        ("checkpoints.json cut", half, text("warmup/checkpoints.json", "{"), ()),
        ("checkpoints.json a list of numbers", half, text("warmup/checkpoints.json", "[1]"), ()),
        ("curvature: a bit changed", half, flip("curvature/**/*.safetensors"), ()),
        ("run.json empty", whole, text("run.json", ""), ()),
        ("run.json removed", whole, gone("run.json"), ()),
        ("run.json a list", whole, text("run.json", "[]"), ()),
        ("run.json: stages a text", whole, stages("x"), ()),
        ("run.json: stages of numbers", whole, stages({"score": 1}), ()),
        ("run.json: stages without keys", whole, stages({"score": {"seconds": 1}}), ()),
        ("run.json: stages with nothing but keys", whole, stages({"score": {"key": "x"}}), ()),
        ("scores cut", whole, cut("scores.parquet"), ()),
        ("scores: a bit changed", whole, flip("scores.parquet"), ()),
        ("selection cut", whole, cut("selected.jsonl"), ()),
        ("refined scores cut", whole, cut("refined/scores.parquet"), ()),
        ("audit cut", whole, cut("audit/audit.json"), ()),
        ("proxy a link to a folder", whole, linked, ()),
        ("proxy a link to a folder, --fresh", whole, linked, ("--fresh",)),
    ]
    for number, (name, source, change, options) in enumerate(changes):
        place = source.copied(work / f"damage-{number}")
        change(place.output)
        tried = place.start(*options)
        if tried.code == REFUSED:
            wrong = problem(tried, REFUSED, "run") or problem(tried, REFUSED, ".json" if "json" in name else "")
        else:
            wrong = problem(tried, DONE, "") or ("" if place.result() == right else "other scores or selection")
            said = ("again", "damaged", "missing", "not JSON")
            spoken = "--fresh" in options or any(word in tried.said for word in said)
            wrong = wrong or ("" if spoken else "nothing is said")
        if not (victim / "deep/mine.partial").is_file():
            wrong = "a file outside the run folder was removed"
        yield row("damage", name, tried, wrong)
        shutil.rmtree(place.folder)


def stopped_in(work: Path, whole: Place, folder: str, shards: int) -> Place:
    """Return a copy of a run that was killed once so many files of the second checkpoint were in one of its folders."""
    place = Place(work / "half", rows=200)
    child = os.fork()
    if child == 0:
        place.start()
        os._exit(0)
    while len(list((place.output / folder / "checkpoint-001").glob("*.parquet"))) < shards:
        time.sleep(0.01)
    for each in subprocess.run(["pgrep", "-P", str(child)], capture_output=True, text=True, check=True).stdout.split():
        os.kill(int(each), signal.SIGKILL)
    os.waitpid(child, 0)
    return place


def killed(work: Path, seed: int) -> Iterator[dict[str, Any]]:
    """Kill runs at random moments and start each again until it ends, with the bytes of an undisturbed run."""
    whole = Place(work / "whole", rows=120)
    first = whole.start()
    assert first.code == DONE, first.said
    right, draws, number = whole.result(), random.Random(seed), 0
    while number < KILLS:
        place, kills = Place(work / f"chain-{number}", rows=120), []
        while True:
            sent, moment = SIGNALS[number % len(SIGNALS)], draws.uniform(SETTLED, first.seconds / 2)
            tried = place.start(kill=(sent, moment))
            if tried.code == DONE:
                break
            gone = tried.code == -signal.SIGKILL and sent == signal.SIGKILL
            wrong = "" if gone else problem(tried, INTERRUPTED, "the same command")
            kills.append((f"{sent.name} after {moment:.1f} s", tried, wrong))
            number += 1
        same = "" if place.result() == right else "other scores or selection in the end"
        yield from (row("kills", name, tried, wrong or same) for name, tried, wrong in kills)
        shutil.rmtree(place.folder)


def shared(work: Path) -> Iterator[dict[str, Any]]:
    """Do what the README of each folder of `../shared/cases` says."""
    source, scored = work / "cases", str(BUNDLED / "model")
    shutil.copytree(SHARED / "cases", source)
    for name in (
        "quantised_bnb_without_package/bnb",
        "reasoning_stripped_by_template/r1_tpl",
        "flash_attention_in_config/flash_cfg",
    ):
        for file in (BUNDLED / "model").iterdir():
            if not (source / name / file.name).exists():
                shutil.copy(file, source / name)

    think = source / "reasoning_stripped_by_template/think.jsonl"
    shutil.copy(think, think.with_name("copy.jsonl"))  # the pool itself is refused as validation set

    def score(pool: str, model: str = scored, validation: str = "val.jsonl") -> list[str]:
        return ["score", "--model", model, "--validation", f"v={validation}", "--pool", pool]

    recipe = source / "recipe_task_key_not_text/norway.yaml"
    bomb = source / "yaml_bomb.yaml"
    commands: list[tuple[str, list[str], int, str]] = [
        # The option is read, so what is refused is the model.
        (
            "align_epochs_option",
            ["align", "--model", scored, "--proxy", scored, "--pool", "good.jsonl", "--epochs", "1"],
            REFUSED,
            "not an iprox proxy",
        ),
        ("alpaca_empty_output", score("alpaca_empty.jsonl"), REFUSED, "alpaca_empty.jsonl:2"),
        ("array_in_jsonl", score("array_named.jsonl"), REFUSED, "JSON array"),
        ("array_in_jsonl", score("array_pretty_named.jsonl"), REFUSED, "JSON array"),
        ("array_in_jsonl", score("pretty_objects.jsonl"), REFUSED, "several lines"),
        ("cloned_dataset_folder", score("hubfolder"), REFUSED, "hubfolder/data"),
        ("deepseek_v3_mla", score("good.jsonl", "f_dsv3"), DONE, ""),
        ("flash_attention_in_config", score("good.jsonl", "flash_cfg"), DONE, "sdpa"),
        ("hermes_tools_twice", score("hermes.jsonl"), REFUSED, "data.columns.tools="),
        ("hermes_tools_twice", [*score("hermes.jsonl"), "--set", "data.columns.tools="], DONE, ""),
        ("images_column", score("image_part.jsonl"), REFUSED, "image"),
        ("lfs_pointer_data", score("lfs.jsonl"), REFUSED, "git lfs pull"),
        ("masked_lm_bert", score("good.jsonl", "f_bert"), REFUSED, "BertForMaskedLM"),
        ("missing_local_folder", score("good.jsonl", "o/aligned"), REFUSED, "no such folder"),
        ("prompt_tuning_adapter", score("good.jsonl", "ad_prompt"), REFUSED, "PROMPT_TUNING"),
        ("quantised_bnb_without_package", score("good.jsonl", "bnb"), REFUSED, "bitsandbytes"),
        ("reasoning_stripped_by_template", score("think.jsonl", "r1_tpl", "copy.jsonl"), REFUSED, "reasoning"),
        ("recipe_task_key_not_text", ["plan", str(recipe)], REFUSED, "quote"),
        ("system_column_with_messages", score("bedrock_system.jsonl"), DONE, ""),
        ("unnamed_column_type", score("decimal_col.parquet"), DONE, ""),
        ("yaml_bomb.yaml", ["plan", str(bomb)], REFUSED, ""),
    ]
    for table in ("bytes_col", "ts_col", "uuid_col"):
        code, said = (REFUSED, "column") if table == "bytes_col" else (DONE, "")
        commands.append(("unnamed_column_type", score(f"{table}.parquet"), code, said))
    masks = sorted((source / "turn_masks").glob("mask_*.jsonl"))
    plain = [json.loads(line) for line in masks[0].read_text().splitlines()]
    for turn in (turn for each in plain for turn in each["messages"]):
        turn.pop("loss", None)
    (source / "turn_masks/plain.jsonl").write_text("".join(json.dumps(each) + "\n" for each in plain))
    commands += [("turn_masks", score(file.name), DONE, "") for file in (masks[0].with_name("plain.jsonl"), *masks)]
    counts: list[int] = []
    for number, (name, command, code, said) in enumerate(commands):
        folder = source / name if (source / name).is_dir() else source
        output = [] if command[0] == "plan" else ["--output", str(work / f"out-{number}")]
        tried = attempt([*command, *output], folder)
        wrong = problem(tried, code, said)
        if name == "turn_masks" and not wrong:  # of two turns of equal length one is masked
            counts += pq.read_table(work / f"out-{number}/scores.parquet")["supervised"].to_pylist()[:1]
            wrong = "" if len(counts) == 1 or 2 * counts[-1] == counts[0] else f"{counts[-1]} tokens are supervised"
        yield row(name, " ".join(command[-3:]), tried, wrong)


PAGE = RESULTS.parents[1] / "docs/results/reliability.md"
PARTS = ("cases", "bad", "damage", "kills")


def main() -> None:
    """Make the tables, and write them."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", choices=PARTS, help="one table")
    made.add_argument("--kind", default="", help="one kind of bad input; nothing is written")
    made.add_argument("--seed", type=int, default=0, help="seed of the moments of kills")
    made.add_argument("--output", type=Path, default=RESULTS / "reliability.json")
    arguments = made.parse_args()
    for module in ("iprox.cli.actions", "iprox.finetune", "iprox.report.page"):
        import_module(module)  # once, before processes are forked
    results = read_json(arguments.output) if arguments.output.is_file() else {}
    tables: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
        "cases": shared,
        "bad": partial(refused, kind=arguments.kind),
        "damage": damaged,
        "kills": partial(killed, seed=arguments.seed),
    }
    for part in (arguments.only,) if arguments.only else PARTS:
        rows: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as name:
            for each in tables[part](Path(name)):
                rows.append(each)
                if not arguments.kind:
                    write_json(arguments.output, {**results, part: {"revision": revision(), "rows": rows}})
        results[part] = {"revision": revision(), "rows": rows}
        print(f"{part}: {sum(not each['wrong'] for each in rows)} of {len(rows)} right")
    if arguments.output == RESULTS / "reliability.json":
        write_text(PAGE, page(results))


def page(results: dict[str, Any]) -> str:
    """Return the page of the tables: by kind how many are right, and what is said of one each."""
    lines = [
        "# Reliability, measured",
        "",
        "Written by `python benchmarks/reliability.py`, which says what each part tries;",
        "[reliability.md](../reliability.md) says what is promised.",
        "",
        "| part | kind | tried | right | longest, s | what is said of the first |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for part, table in results.items():
        kinds: dict[str, list[dict[str, Any]]] = {}
        for each in table["rows"]:
            kinds.setdefault(each["kind"] if part == "bad" else "", []).append(each)
        for kind, rows in kinds.items():
            right, longest = sum(not each["wrong"] for each in rows), max(each["seconds"] for each in rows)
            said = rows[0]["said"].replace("|", "\\|")
            lines.append(f"| {part} | {kind} | {len(rows)} | {right} | {longest:.0f} | {rows[0]['name']}: {said} |")
    wrong = [
        f"- {part}, {each['name']}: {each['wrong']}"
        for part, t in results.items()
        for each in t["rows"]
        if each["wrong"]
    ]
    return "\n".join([*lines, *(["", "Not right:", "", *wrong] if wrong else [])]) + "\n"


if __name__ == "__main__":
    main()
