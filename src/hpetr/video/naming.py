"""Tell videos from other inputs, and name their drawings."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from hpetr.errors import InputError
from hpetr.images.read import is_image

VIDEO_SUFFIXES = frozenset(
    (".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .m2v .ts .mts .m2ts .wmv .flv .3gp .ogv .y4m .h264 .h265 .hevc").split()
)
DRAWING_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv")
RESULTS_NAME = "predictions.jsonl"


def split_inputs(inputs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the inputs of a command into videos, each once, and the inputs left for `find_images`.

    Videos are files with a video's suffix, also in folders and patterns; camera numbers, which are digits that name no
    file; and URLs. A folder that holds videos and images is in both lists.

    Raises:
        InputError: a named video does not exist.
    """
    videos: dict[str, None] = {}
    rest: list[str] = []
    for text in inputs:
        path = Path(text)
        if is_url(text) or is_camera(text):
            videos.setdefault(text)
        elif path.is_dir() or (glob.has_magic(text) and not path.exists()):
            paths = path.iterdir() if path.is_dir() else map(Path, glob.glob(text, recursive=True))
            files = sorted(str(file) for file in paths if file.is_file())
            found = [file for file in files if _is_video(file)]
            others = [file for file in files if not _is_video(file)]
            videos.update(dict.fromkeys(found))
            if not found:
                rest.append(text)  # find_images has the message for an empty folder or pattern
            elif not path.is_dir():
                rest += others
            elif any(map(is_image, others)):
                rest.append(text)
        elif not _is_video(text):
            rest.append(text)
        elif path.is_file():
            videos.setdefault(text)
        else:
            raise InputError(f"{path}: no such file, expected a video")
    return list(videos), rest


def _is_video(path: str) -> bool:
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def is_camera(text: str) -> bool:
    """Return whether the text is a camera's number: digits that name no file."""
    return text.isascii() and text.isdigit() and not Path(text).exists()


def is_url(text: str) -> bool:
    """Return whether the text begins with a protocol."""
    return re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE) is not None


def public_name(text: str) -> str:
    """Return the text; of a URL, without user name and password."""
    return re.sub(r"(?<=://)[^/@]*@", "", text, count=1) if is_url(text) else text


def output_stem(video: str, taken: Iterable[str]) -> str:
    """Return a name without suffix for the drawings of a video, different from those taken even in lower case.

    It is the file's own name, `camera-0`, or the last word of a URL's path, else its host.
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
