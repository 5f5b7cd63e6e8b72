"""Push a proxy, a selection or a report to the Hugging Face Hub, each with a card that says how it was made."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, DatasetCard, DatasetCardData, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from iprox.errors import InputError, one_line
from iprox.records import RUN, read_json
from iprox.report import formats
from iprox.report.finished_run import FinishedRun, read_run

PAPER = "https://arxiv.org/abs/2602.17835"
SPACE_CARD = """---
title: {title}
sdk: static
tags: [iprox, data-selection]
---

The report of a data selection by [iprox]({paper}): what was chosen, how faithful the proxy is, and what it cost.
"""


class Upload(NamedTuple):
    """What goes into a repository: its kind, and files or their contents by name."""

    kind: str
    files: dict[str, Path | bytes]


def push(source: Path, repo: str, *, public: bool = False) -> str:
    """Push to a repository of the Hub, made if missing, in one commit, and return its address.

    Args:
        source: a proxy folder (becomes a model), a run folder or the JSONL file of a selection (a dataset with a card;
            of a run also with its report), or a `report.html` (a static Space).
        repo: name of the repository, `user/name`.
        public: whether a new repository is public. Rows and texts of a pool are often not for the public.

    Raises:
        InputError: the source is none of these, or the Hub refuses.
    """
    upload, api = _upload(source, repo), HfApi(library_name="iprox", library_version=version("iprox"))
    place: dict[str, Any] = {"repo_id": repo, "repo_type": upload.kind}
    try:
        sdk = "static" if upload.kind == "space" else None
        address = api.create_repo(**place, private=not public, exist_ok=True, space_sdk=sdk)
        added = [CommitOperationAdd(name, content) for name, content in sorted(upload.files.items())]
        api.create_commit(**place, operations=added, commit_message=f"Push {source.name} with iprox")
    except LocalTokenNotFoundError as error:
        raise InputError("the Hub needs a token that may write: run `hf auth login`, or set HF_TOKEN") from error
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, HTTPError) as error:
        raise InputError(f"{repo}: not pushed: {one_line(error)}; check the name, the token and the network") from error
    return str(address)


def _upload(source: Path, repo: str) -> Upload:
    if (source / "config.json").is_file() and (source / "README.md").is_file():
        return Upload("model", {file.name: file for file in source.iterdir() if file.is_file() and file.name != RUN})
    if source.is_dir() and (source / RUN).is_file():
        run = read_run(source)
        if run.selection is None:
            raise InputError(f"{source}: nothing has been selected yet; run its recipe to the end")
        files = {name: source / name for name in ("selection.json", "report.html") if (source / name).is_file()}
        return _dataset(source / "selected.jsonl", source / "selection.json", repo, run, files)
    if source.suffix == ".jsonl" and source.is_file():
        description = source.with_name(f"{source.stem}.selection.json")
        if not description.is_file():
            raise InputError(f"{source}: no {description.name} next to it says how it was made; push its run folder")
        return _dataset(source, description, repo, None, {"selection.json": description})
    if source.suffix == ".html" and source.is_file():
        card = SPACE_CARD.format(title=json.dumps(repo.rpartition("/")[2]), paper=PAPER)
        return Upload("space", {"index.html": source, "README.md": card.encode()})
    raise InputError(
        f"{source}: is no proxy or run folder, no selection (*.jsonl with its *.selection.json) and no report"
    )


def _dataset(rows: Path, description: Path, repo: str, run: FinishedRun | None, files: dict[str, Path]) -> Upload:
    card = selection_card(repo, read_json(description), run, "report.html" in files)
    return Upload("dataset", {**files, "selected.jsonl": rows, "README.md": card.encode()})


def selection_card(repo: str, chosen: dict[str, Any], run: FinishedRun | None, reported: bool = False) -> str:
    """Return the card of a selection: what was scored, by what, for which tasks, and how faithfully.

    Args:
        repo: name of the dataset, `user/name`.
        chosen: content of `selection.json`.
        run: the run that it is from; without one, the card knows only what `selection.json` says.
        reported: whether the report is pushed along.
    """
    scored = chosen["scored"]
    tasks = formats.listing(scored["tasks"], most=20)
    facts = [
        ("selected", f"{formats.rows(chosen['count'])} of {scored['rows']:,}, {chosen['tokens']:,} tokens, best first"),
        ("for", chosen["task"] or tasks),
        *(_facts_of(run) if run is not None else []),
        ("score", f"{scored['estimator']} {scored['normalize']}"),
        ("strategy", chosen["strategy"]),
        ("sources", ", ".join(f"{each['source']} {each['selection']:.0%}" for each in chosen["profile"]["sources"])),
        ("made with", f"iprox {version('iprox')}"),
    ]
    shown = "\n".join(f"| {name} | {value} |" for name, value in facts if value)
    report = "\n`report.html` has the charts, examples and costs: download it and open it in a browser.\n"
    data = DatasetCardData(
        tags=["iprox", "data-selection", "influence"],
        configs=[{"config_name": "default", "data_files": "selected.jsonl"}],  # pyright: ignore[reportCallIssue]
    )
    text = f"""---
{data.to_yaml()}
---

# Training data selected for {chosen["task"] or tasks}

Chosen by [iprox]({PAPER}) for its influence on validation examples: an example with a positive score lowers their loss
when the model is trained on it. The rows are those of the pool, byte for byte; their license is the pool's.

| | |
| --- | --- |
{shown}

`selection.json` has the row numbers, settings and profile.
{report if reported else ""}
```python
from datasets import load_dataset

selected = load_dataset("{repo}", split="train")
```
"""
    return str(DatasetCard(text))


def _facts_of(run: FinishedRun) -> list[tuple[str, str]]:
    """Return what a run knows of its scores: the model, the proxy, the validation examples and the fidelity."""
    model, made = str(run.record["model"]), run.compression
    sets = run.record["inputs"]["validation"]
    facts = [
        ("model", Path(model).name if Path(model).is_absolute() or Path(model).exists() else model),
        ("scored on", "the model itself" if made is None else f"a proxy of it (method {made['method']})"),
        ("validation", ", ".join(f"{task}: {formats.rows(entry['rows'])}" for task, entry in sets.items())),
        ("fidelity", "not measured"),
        ("seed", str(run.record["seed"])),
    ]
    if run.audit is not None:
        found = run.record["stages"]["audit"]
        agreement, (low, high) = found["fidelity"], found["fidelity"]["intervals"]["spearman"]
        facts[3] = (
            "fidelity",
            f"Spearman {agreement['spearman']:.2f} ({low:.2f} to {high:.2f}) with the model's own scores "
            f"({found['score']}) on {found['examples']:,} random examples; {agreement['overlap']['0.05']:.0%} of the "
            "model's top 5 % found",
        )
    return facts
