"""Publish a proxy on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError  # pyright: ignore[reportPrivateImportUsage]

from iprox.errors import InputError
from iprox.models.card import CARD
from iprox.models.loading import load_config

# What belongs to a proxy; not `run.json`, which names local paths.
PUBLISHED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", CARD]
PRIVATE = ["run.json", "*.partial"]


def push(folder: Path, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload a proxy's folder to the Hub.

    Args:
        folder: of the proxy.
        repo: `owner/name`; made if it is not there.
        private: make it private.
        revision: branch to push to; made if it is not there.

    Returns:
        The address of the commit.

    Raises:
        InputError: no proxy there, or the Hub refuses or cannot be reached.
    """
    described = getattr(load_config(folder), "quantization_config", None) or {}
    if described.get("quant_method") != "iprox":
        raise InputError(f"{folder}: is no iprox proxy; push other models with `hf upload`")
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message="Add an influence proxy made by iprox",
            allow_patterns=PUBLISHED,
            ignore_patterns=PRIVATE,
        )
    except (HFValidationError, HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{repo}: cannot be pushed to ({reason}); log in with `hf auth login`") from error
    return commit.commit_url
