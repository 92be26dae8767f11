"""Push a checkpoint to the Hugging Face hub."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi

from hpetr.checkpoints.card import CARD, Evaluation
from hpetr.checkpoints.folder import exit_on_sigterm, save_checkpoint
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.model.image_processor import HPetrImageProcessor


def push_to_hub(
    model: HPetrForPoseEstimation,
    processor: HPetrImageProcessor,
    repo_id: str,
    *,
    evaluation: Evaluation | None = None,
    tags: Sequence[str] = (),
    private: bool | None = None,
    token: bool | str | None = None,
    **options: Any,
) -> CommitInfo:
    """Upload a checkpoint in one commit; the repository is created if there is none.

    A model card that the repository has already is kept.

    Args:
        model: on any device.
        processor: of its images.
        repo_id: `OWNER/NAME`.
        evaluation: metrics of these weights for the model card.
        tags: further tags of the card's metadata.
        private: whether a new repository is private; None takes the owner's default.
        token: of the hub; None takes that of `hf auth login`.
        options: `commit_message`, `commit_description`, `revision`, `create_pr` of `HfApi.upload_folder`.
    """
    api = HfApi(token=token)
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with exit_on_sigterm(), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkpoint"
        save_checkpoint(model, processor, folder, evaluation=evaluation, name=name, tags=tags)
        return api.upload_folder(
            repo_id=name,
            folder_path=folder,
            ignore_patterns=[CARD] if api.file_exists(name, CARD) else [],
            **{"commit_message": "Upload model", **options},
        )
