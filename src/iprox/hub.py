"""Publish a proxy on the Hugging Face Hub."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError  # pyright: ignore[reportPrivateImportUsage]

from iprox.errors import InputError, one_line
from iprox.models.card import CARD
from iprox.models.checkpoint import proxy_description
from iprox.models.loading import load_config

# Files of a proxy; not `run.json`, which describes this machine.
PUBLISHED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", CARD]
PRIVATE = ["run.json", "*.partial"]


def push(folder: Path, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload a proxy's folder to the Hub.

    Args:
        folder: folder of the proxy.
        repo: `owner/name`; created if it does not exist.
        private: whether a new repository is private.
        revision: branch to push to; created if it does not exist.

    Returns:
        The URL of the commit.

    Raises:
        InputError: the folder is not a proxy, or the Hub refuses or cannot be reached.
    """
    described = proxy_description(load_config(folder), str(folder))
    if described is None:
        raise InputError(f"{folder}: is not an iprox proxy; push other models with `hf upload`")
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        with _without_local_path(folder, described.target) as published:
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=published,
                revision=revision,
                commit_message="Add an influence proxy made by iprox",
                allow_patterns=PUBLISHED,
                ignore_patterns=PRIVATE,
            )
    except (HFValidationError, HTTPError, OSError) as error:
        raise InputError(f"{repo}: cannot be pushed to ({one_line(error)}); log in with `hf auth login`") from error
    return commit.commit_url


@contextmanager
def _without_local_path(folder: Path, target: str | None) -> Iterator[Path]:
    """Yield the folder to publish: a copy without the path of the target if that is local, else the folder itself."""
    if target is None or not Path(target).is_absolute():
        yield folder
        return
    with TemporaryDirectory(prefix="iprox-push-") as name:
        copy = Path(name)
        for file in folder.iterdir():
            if file.name in ("config.json", CARD):
                text = file.read_text(encoding="utf-8")
                (copy / file.name).write_text(text.replace(target, Path(target).name), encoding="utf-8")
            elif file.is_file():
                try:
                    (copy / file.name).symlink_to(file.resolve())
                except OSError:  # Windows without the permission for links
                    shutil.copyfile(file, copy / file.name)
        yield copy
