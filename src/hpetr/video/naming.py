"""Which inputs are videos, and what their drawings are called."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from hpetr.errors import InputError
from hpetr.images.read import IMAGE_SUFFIXES

VIDEO_SUFFIXES = frozenset(
    (".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .m2v .ts .mts .m2ts .wmv .flv .3gp .ogv .y4m .h264 .h265 .hevc").split()
)
RESULTS_NAME = "predictions.jsonl"


def split_inputs(inputs: Sequence[str]) -> tuple[list[str], list[str]]:
    """The videos among the inputs of a command, each once, and the inputs that are left for `find_images`.

    Videos are files, also in folders and patterns, with a video's suffix; digits that are no file's name, which mean a
    camera; and URLs. A folder is also left when there are images in it.

    Raises:
        InputError: a named video is not there.
    """
    videos: dict[str, None] = {}
    rest: list[str] = []
    for text in inputs:
        path = Path(text)
        if is_url(text) or is_camera(text):
            videos.setdefault(text)
        elif path.is_dir() or (glob.has_magic(text) and not path.exists()):
            files = list(path.iterdir()) if path.is_dir() else list(map(Path, glob.glob(text, recursive=True)))
            found = sorted(str(file) for file in files if file.is_file() and _is_video(file))
            videos.update(dict.fromkeys(found))
            rest += _left(text, files, bool(found))
        elif _is_video(path):
            if not path.is_file():
                raise InputError(f"{path}: no such file, expected a video")
            videos.setdefault(text)
        else:
            rest.append(text)
    return list(videos), rest


def _left(text: str, files: Iterable[Path], has_videos: bool) -> list[str]:
    """What of a folder or pattern is left for `find_images`, which also says when there is nothing in it."""
    if not has_videos:
        return [text]
    if Path(text).is_dir():
        return [text] if any(file.suffix.lower() in IMAGE_SUFFIXES for file in files) else []
    return sorted(str(file) for file in files if file.is_file() and not _is_video(file))


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def is_camera(text: str) -> bool:
    """Whether the text is a camera's number: digits that are no file's name."""
    return text.isascii() and text.isdigit() and not Path(text).exists()


def is_url(text: str) -> bool:
    """Whether the text begins with a protocol."""
    return re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE) is not None


def public_name(text: str) -> str:
    """The text, without a user's name and password where it is a URL that has them."""
    return re.sub(r"(?<=://)[^/@]*@", "", text, count=1) if is_url(text) else text


def output_stem(video: str, taken: Iterable[str]) -> str:
    """A name for the drawings of a video, without suffix, that differs from those taken even without letter case.

    A file's own, `camera-0`, or the last word of a URL's path, else its host.
    """
    if is_camera(video):
        stem = f"camera-{int(video)}"
    elif is_url(video):
        parts = urlsplit(video)
        stem = re.sub(r"[^\w.-]+", "-", Path(parts.path).stem or parts.hostname or "").strip("-.") or "stream"
    else:
        stem = Path(video).stem
    used = {name.lower() for name in taken}
    candidates = (stem, *(f"{stem}_{number}" for number in range(2, len(used) + 3)))
    return next(name for name in candidates if name.lower() not in used)
