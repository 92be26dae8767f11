"""The Hugging Face hub: nothing here is asked for unless a user names a repository."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpetr.errors import InputError

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

# A checkpoint's place on the hub, hf://OWNER/NAME or hf://OWNER/NAME@REVISION. Without the scheme a misspelt folder
# would be looked for on the network.
SCHEME = "hf://"
CARD = "README.md"


def is_hub_place(place: object) -> bool:
    """Whether a checkpoint's name asks for the hub."""
    return isinstance(place, str) and place.startswith(SCHEME)


def download(place: str, patterns: Sequence[str]) -> Path:
    """The local folder of a hub repository's files, from the hub or its cache.

    Args:
        place: `OWNER/NAME` or `OWNER/NAME@REVISION`, with `SCHEME` in front or without.
        patterns: only files of these names.

    Raises:
        InputError: no such repository, or no network and nothing in the cache.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = place.removeprefix(SCHEME).partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client passes on the errors of several libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        option = f" --revision {revision}" if revision else ""
        raise InputError(
            f"the Hugging Face hub gave nothing ({reason}); without network, run "
            f"`hf download {repository}{option} --local-dir FOLDER` elsewhere"
        ) from error


def upload(
    folder: str | os.PathLike[str],
    repository: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Push all files of a folder in one commit; the repository is made where there is none.

    A model card that the repository has already is kept.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    name = api.create_repo(repository, private=private, exist_ok=True).repo_id
    kept = [CARD] if api.file_exists(name, CARD) else []
    return api.upload_folder(
        repo_id=name,
        folder_path=Path(folder),
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        ignore_patterns=kept,
    )
