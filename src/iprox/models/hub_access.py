"""Whether the Hub can be reached for a model, asked once."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    OfflineModeIsEnabled,
)
from huggingface_hub.file_download import repo_folder_name
from transformers.utils import CONFIG_NAME

from iprox.errors import InputError, one_line


def check_reachable(repo: str) -> None:
    """Refuse a Hub model of which nothing is in the cache if the Hub cannot be reached.

    huggingface_hub asks five more times, over 23 seconds, before it says so: long for a folder's name with a typo.
    Whatever the Hub answers (no such model, no access) is left to what loads the model.

    Raises:
        InputError: the Hub cannot be reached.
    """
    cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    if constants.HF_HUB_OFFLINE or any(cached.glob("snapshots/*/*")):
        return
    try:
        get_hf_file_metadata(hf_hub_url(repo, CONFIG_NAME))
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled):
        return
    except HTTPError as error:
        raise InputError(
            f"{repo}: no such folder here, and the Hub cannot be reached ({one_line(error)}); correct the path, or try "
            "again once there is a connection"
        ) from error
