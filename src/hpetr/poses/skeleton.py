"""Skeletons: the keypoints of one category, their limbs, mirror pairs and the precision of annotators."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Integral
from typing import Any

from hpetr.errors import InputError

logger = logging.getLogger(__name__)

# Without measured sigmas every keypoint gets the mean of COCO's seventeen, rounded: neither a face point nor a hip.
FALLBACK_SIGMA = 0.06
# Share of a person's box that COCO's segmentation fills, on average: for OKS without an annotated area.
AREA_OF_BOX = 0.53


@dataclass(frozen=True)
class Skeleton:
    """The keypoints of one category.

    Args:
        names: K distinct keypoint names, in the order of the annotations.
        edges: limbs as pairs of 0-based keypoint indices; only drawing uses them.
        flip_pairs: pairs (left, right) of 0-based indices that change places in a mirrored image. A keypoint
            belongs to at most one pair; one without a pair stays itself.
        sigmas: K positive standard deviations of OKS, relative to the square root of the object's area.
        can_flip: False if the data do not say which keypoints change places, so that no image may be mirrored.

    Raises:
        InputError: lengths disagree, an index is out of range, a keypoint is in two flip pairs, or a sigma is not
            positive.
    """

    names: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]
    flip_pairs: tuple[tuple[int, int], ...]
    sigmas: tuple[float, ...]
    can_flip: bool = True

    def __post_init__(self) -> None:
        count = len(self.names)
        if count == 0:
            raise InputError("skeleton: names is empty, expected at least one keypoint name")
        for name in self.names:
            if not is_text(name):
                raise InputError(f"skeleton: name {name!r} is half of a surrogate pair, expected text")
        if (repeated := _first_repeated(self.names)) is not None:
            raise InputError(f"skeleton: names repeat ({repeated!r}), expected distinct names")
        if len(self.sigmas) != count:
            raise InputError(f"skeleton: {len(self.sigmas)} sigmas, expected {count}, one for each keypoint name")
        for name, sigma in zip(self.names, self.sigmas, strict=True):
            if not (isfinite(sigma) and sigma > 0):
                raise InputError(f"skeleton: sigma of {name!r} is {sigma}, expected a positive number")
        for field, pairs in (("edges", self.edges), ("flip_pairs", self.flip_pairs)):
            _check_pairs(f"skeleton: {field}", pairs, range(count))
        if (index := _first_repeated([index for pair in self.flip_pairs for index in pair])) is not None:
            name = self.names[index]
            raise InputError(f"skeleton: flip_pairs uses keypoint {name!r} twice, expected each at most once")

    @property
    def num_keypoints(self) -> int:
        """Number of keypoints, K."""
        return len(self.names)

    @property
    def flip_index(self) -> list[int]:
        """Permutation p of length K: keypoint i of a mirrored image is keypoint p[i] of the original."""
        index = list(range(self.num_keypoints))
        for left, right in self.flip_pairs:
            index[left], index[right] = right, left
        return index

    def difference(self, other: Skeleton, *, sigmas: bool = True) -> str | None:
        """Return the first difference that changes the meaning of labels, in words, or None.

        Args:
            other: named second.
            sigmas: whether they count. Edges never do, since only drawing uses them.
        """
        if self.num_keypoints != other.num_keypoints:
            return f"{self.num_keypoints} and {other.num_keypoints}"
        for index, (name, theirs) in enumerate(zip(self.names, other.names, strict=True)):
            if name != theirs:
                return f"keypoint {index} is {name!r} and {theirs!r}"
        for name, *mirrored in zip(self.names, self.flip_index, other.flip_index, strict=True):
            if self.can_flip and other.can_flip and mirrored[0] != mirrored[1]:
                images = " and ".join(repr(self.names[index]) for index in mirrored)
                return f"the mirror image of {name!r} is {images}"
        for name, sigma, other_sigma in zip(self.names, self.sigmas, other.sigmas, strict=True):
            if sigmas and sigma != other_sigma:
                return f"the sigma of {name!r} is {sigma:g} and {other_sigma:g}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, for JSON and YAML; `from_dict` reads them back."""
        return {
            "names": list(self.names),
            "edges": [list(map(int, edge)) for edge in self.edges],
            "flip_pairs": [list(map(int, pair)) for pair in self.flip_pairs],
            "sigmas": list(map(float, self.sigmas)),
            **({} if self.can_flip else {"can_flip": False}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Skeleton:
        """Read what `to_dict` wrote.

        Raises:
            InputError: a key is missing, unknown or of the wrong type, or the skeleton is not valid.
        """
        expected = {"names", "edges", "flip_pairs", "sigmas"}
        if not isinstance(values, Mapping) or set(values) - {"can_flip"} != expected:
            raise InputError(f"skeleton: expected exactly the keys {sorted(expected)}")
        try:
            return cls(
                names=tuple(map(str, values["names"])),
                edges=_pairs(values["edges"]),
                flip_pairs=_pairs(values["flip_pairs"]),
                sigmas=tuple(map(float, values["sigmas"])),
                can_flip=values.get("can_flip", True) is True,
            )
        except InputError:
            raise
        except (TypeError, ValueError) as error:
            raise InputError(f"skeleton: {error}; expected lists of names, index pairs and sigmas") from error

    @classmethod
    def generic(cls, num_keypoints: int) -> Skeleton:
        """Return K unknown keypoints: no edges, no flip pairs, every sigma `FALLBACK_SIGMA`."""
        names = tuple(f"keypoint_{index}" for index in range(num_keypoints))
        return cls(
            names, edges=(), flip_pairs=(), sigmas=(FALLBACK_SIGMA,) * num_keypoints, can_flip=num_keypoints == 1
        )

    @classmethod
    def from_coco_category(cls, category: Mapping[str, Any]) -> Skeleton:
        """Read one entry of `categories` in a COCO keypoint JSON.

        `keypoints` gives the names. If they are COCO's or CrowdPose's (`head` or `top_head`), the defaults are theirs.
        Optional keys:

        - `skeleton`: the edges, 1-based.
        - `flip_idx`: K 0-based indices, keypoint i of a mirrored image is keypoint flip_idx[i] of the original. Else
          flip pairs come from names that differ only in left / right (`left_eye`, `eyeRight`), in a prefix or suffix
          l / r (`l_eye`, `eye.L`, `eye-r`); if no names do, the skeleton cannot be flipped.
        - `sigmas`: K numbers. The default for other names is `FALLBACK_SIGMA`, with a warning in the log.

        Raises:
            InputError: `keypoints` is missing or empty, or another key is not valid.
        """
        label = f"category {category.get('name', category.get('id', '?'))!r}"
        names = category.get("keypoints")
        if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
            raise InputError(f"{label}: expected 'keypoints' to be a list of keypoint names")
        known = known_skeleton(names)
        names = tuple(names) if known is None else known.names
        try:
            edges, flip_idx = _category_edges(category.get("skeleton"), known, len(names)), category.get("flip_idx")
            flip_pairs = _infer_flip_pairs(names) if flip_idx is None else flip_pairs_of(flip_idx, len(names))
            sigmas = _category_sigmas(label, names, category.get("sigmas"), known)
            return cls(
                names, edges, flip_pairs, sigmas, can_flip=flip_idx is not None or bool(flip_pairs) or len(names) == 1
            )
        except InputError as error:
            raise InputError(f"{label}: {error}") from error
        except (TypeError, ValueError) as error:
            raise InputError(f"{label}: expected 'skeleton' pairs of 1-based indices, numbers in 'sigmas'") from error


def is_text(text: str) -> bool:
    """Return whether a string can be written: JSON and YAML can also hold halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def known_skeleton(names: Sequence[str]) -> Skeleton | None:
    """Return COCO or CROWDPOSE if the keypoint names are theirs, in their order; CrowdPose's own files say `head`."""
    names = tuple(names)
    if names == COCO.names:
        return COCO
    renamed = tuple("top_head" if name == "head" else name for name in names)
    return CROWDPOSE if renamed == CROWDPOSE.names else None


def flip_pairs_of(flip_index: Any, num_keypoints: int) -> tuple[tuple[int, int], ...]:
    """Return the flip pairs of a permutation such as `Skeleton.flip_index`, the lower index first.

    Raises:
        InputError: it is not K whole numbers, or more than two keypoints change places.
    """
    if not isinstance(flip_index, (list, tuple)) or not all(map(_is_whole, flip_index)):
        raise InputError(f"'flip_idx' is {flip_index!r}, expected a list of {num_keypoints} keypoint indices")
    if len(flip_index) != num_keypoints:
        raise InputError(f"'flip_idx' has {len(flip_index)} entries, expected {num_keypoints}, one for each keypoint")
    for index, mirrored in enumerate(flip_index):
        if not 0 <= mirrored < num_keypoints:
            raise InputError(f"'flip_idx' has {mirrored} at place {index}, expected an index in 0..{num_keypoints - 1}")
    for index, mirrored in enumerate(flip_index):
        if flip_index[mirrored] != index:
            raise InputError(
                f"'flip_idx' maps keypoint {index} to {mirrored} but {mirrored} to {flip_index[mirrored]}, "
                "expected two keypoints to change places or a keypoint to stay itself"
            )
    return tuple((index, int(mirrored)) for index, mirrored in enumerate(flip_index) if index < mirrored)


def unpaired_sides(skeleton: Skeleton) -> list[str]:
    """Return the names with a side (see `Skeleton.from_coco_category`) whose keypoint has no flip pair."""
    paired = {index for pair in skeleton.flip_pairs for index in pair}
    return [name for index, name in enumerate(skeleton.names) if index not in paired and _side(name) is not None]


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_pairs(field: str, pairs: Sequence[tuple[int, ...]], allowed: range) -> None:
    for pair in pairs:
        if len(pair) != 2 or pair[0] == pair[1] or not all(index in allowed for index in pair):
            expected = f"two different indices in {allowed.start}..{allowed.stop - 1}"
            raise InputError(f"{field} has {list(pair)}, expected {expected}")


def _pairs(values: Any) -> tuple[tuple[int, int], ...]:
    pairs = tuple((int(first), int(second)) for first, second in values)
    for pair, (first, second) in zip(pairs, values, strict=True):
        if pair != (first, second):
            raise ValueError(f"index pair ({first}, {second}) is not of whole numbers")
    return pairs


def _first_repeated(values: Sequence[Any]) -> Any:
    return next((value for index, value in enumerate(values) if value in values[:index]), None)


def _category_edges(listed: Any, known: Skeleton | None, count: int) -> tuple[tuple[int, int], ...]:
    """Return 0-based edges, of the known skeleton if the file gives none."""
    pairs = _pairs(listed or ())
    edges = tuple((first - 1, second - 1) for first, second in pairs)
    # Files of CrowdPose's 14 keypoints often carry COCO's list, whose indices go up to 17.
    if known is not None and (not edges or (known is CROWDPOSE and set(edges) == set(COCO.edges))):
        return known.edges
    _check_pairs("'skeleton'", pairs, range(1, count + 1))  # as in the file, from 1
    return edges


def _category_sigmas(label: str, names: Sequence[str], sigmas: Any, known: Skeleton | None) -> tuple[float, ...]:
    if sigmas is not None:
        return tuple(float(sigma) for sigma in sigmas)
    if known is not None:
        return known.sigmas
    logger.warning(
        "%s: no 'sigmas' and the keypoint names are not COCO's: every keypoint gets sigma %g", label, FALLBACK_SIGMA
    )
    return (FALLBACK_SIGMA,) * len(names)


_LETTER_PREFIX = re.compile(r"^([lLrR])([_\-. ])(.+)$")
_LETTER_SUFFIX = re.compile(r"^(.+)([_\-. ])([lLrR])$")
_WORD = re.compile(r"left|right", re.IGNORECASE)


def _side(name: str) -> tuple[str, str] | None:
    """Return the side "l" or "r" and the name with the side cut out, or None for a name without a side."""
    if word := _WORD.search(name):
        rest = name[: word.start()] + "*" + name[word.end() :]
        return word.group()[0].lower(), rest.lower()
    if prefix := _LETTER_PREFIX.match(name):
        return prefix.group(1).lower(), ("*" + prefix.group(2) + prefix.group(3)).lower()
    if suffix := _LETTER_SUFFIX.match(name):
        return suffix.group(3).lower(), (suffix.group(1) + suffix.group(2) + "*").lower()
    return None


def _infer_flip_pairs(names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Return pairs (left index, right index) in the order of the left keypoints."""
    sides = [_side(name) for name in names]
    right = {side[1]: index for index, side in enumerate(sides) if side is not None and side[0] == "r"}
    return tuple(
        (index, right.pop(side[1]))
        for index, side in enumerate(sides)
        if side is not None and side[0] == "l" and side[1] in right
    )


COCO = Skeleton(
    names=(
        *("nose", "left_eye", "right_eye", "left_ear", "right_ear"),
        *("left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist"),
        *("left_hip", "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle"),
    ),
    edges=(
        *((15, 13), (13, 11), (16, 14), (14, 12), (11, 12)),  # legs
        *((5, 11), (6, 12), (5, 6)),  # trunk
        *((5, 7), (6, 8), (7, 9), (8, 10)),  # arms
        *((1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6)),  # head
    ),
    flip_pairs=((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16)),
    sigmas=(
        *(0.026, 0.025, 0.025, 0.035, 0.035),
        *(0.079, 0.079, 0.072, 0.072, 0.062, 0.062),
        *(0.107, 0.107, 0.087, 0.087, 0.089, 0.089),
    ),
)

CROWDPOSE = Skeleton(
    names=(
        *("left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist"),
        *("left_hip", "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle", "top_head", "neck"),
    ),
    edges=(
        *((10, 8), (8, 6), (11, 9), (9, 7), (6, 7)),  # legs
        *((0, 6), (1, 7), (0, 13), (1, 13), (13, 12)),  # trunk and head
        *((0, 2), (1, 3), (2, 4), (3, 5)),  # arms
    ),
    flip_pairs=((0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)),
    sigmas=(0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089, 0.079, 0.079),
)
