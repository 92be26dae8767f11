import json
import logging

import numpy as np
import pytest

from hpetr.errors import InputError
from hpetr.poses.skeleton import COCO, CROWDPOSE, FALLBACK_SIGMA, Skeleton, flip_pairs_of, unpaired_sides


def test_coco_and_crowdpose_have_the_published_values():
    assert (COCO.num_keypoints, CROWDPOSE.num_keypoints) == (17, 14)
    assert COCO.flip_index == [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]
    assert CROWDPOSE.flip_index == [1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 12, 13]
    assert sum(COCO.sigmas) == pytest.approx(1.138)
    assert dict(zip(COCO.names, COCO.sigmas, strict=True))["left_hip"] == 0.107
    assert CROWDPOSE.sigmas[:2] == (0.079, 0.079)
    assert len(COCO.edges) == 19


@pytest.mark.parametrize("skeleton", [COCO, CROWDPOSE, Skeleton.generic(5)])
def test_dict_round_trip_through_json(skeleton):
    assert Skeleton.from_dict(json.loads(json.dumps(skeleton.to_dict()))) == skeleton


@pytest.mark.parametrize("skeleton", [COCO, CROWDPOSE])
def test_flip_index_is_an_involution_that_swaps_left_and_right(skeleton):
    index = skeleton.flip_index
    assert [index[i] for i in index] == list(range(skeleton.num_keypoints))
    for i, name in enumerate(skeleton.names):
        mirrored = name.replace("left", "?").replace("right", "left").replace("?", "right")
        assert skeleton.names[index[i]] == mirrored


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sigmas": [0.1]}, "1 sigmas"),
        ({"sigmas": [0.1, 0.0, 0.1]}, "positive"),
        ({"sigmas": [0.1, float("nan"), 0.1]}, "positive"),
        ({"sigmas": 3}, "sigmas"),
        ({"edges": [[0, 3]]}, "edges"),
        ({"edges": [[-1, 1]]}, "edges"),
        ({"edges": [[0, 1, 2]]}, "skeleton"),
        ({"flip_pairs": [[0, 1], [1, 2]]}, "'b' twice"),
        ({"flip_pairs": [[1, 1]]}, "flip_pairs"),
        ({"flip_pairs": [[0.5, 1]]}, "whole"),
        ({"names": ["a", "a", "b"]}, "'a'"),
        ({"names": []}, "names is empty"),
        ({"color": "red"}, "keys"),
    ],
)
def test_invalid_skeletons_are_refused(change, words):
    valid = {"names": ["a", "b", "c"], "edges": [[0, 1]], "flip_pairs": [], "sigmas": [0.1, 0.1, 0.1]}
    with pytest.raises(InputError, match=words):
        Skeleton.from_dict({**valid, **change})


def test_coco_category_gives_coco():
    category = {
        "name": "person",
        "keypoints": list(COCO.names),
        "skeleton": [[a + 1, b + 1] for a, b in COCO.edges],
    }
    assert Skeleton.from_coco_category(category) == COCO


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["tail", "left_paw", "right_paw"], ((1, 2),)),
        (["r_eye", "l_eye", "nose"], ((1, 0),)),
        (["eye.L", "eye.R", "ear.L"], ((0, 1),)),
        (["PawLeft", "PawRight"], ((0, 1),)),
        (["wing-l", "wing-r"], ((0, 1),)),
        (["lip", "rib", "left"], ()),
    ],
)
def test_flip_pairs_are_inferred_from_names(names, pairs):
    assert Skeleton.from_coco_category({"keypoints": names, "sigmas": [0.1] * len(names)}).flip_pairs == pairs


@pytest.mark.parametrize("known", [COCO, CROWDPOSE])
def test_known_names_alone_give_the_known_skeleton(known):
    assert Skeleton.from_coco_category({"keypoints": list(known.names)}) == known


def test_flip_idx_stands_above_names():
    category = {"keypoints": ["left_eye", "right_eye", "a", "b"], "sigmas": [0.1] * 4, "flip_idx": [0, 1, 3, 2]}
    skeleton = Skeleton.from_coco_category(category)
    assert skeleton.flip_pairs == ((2, 3),)
    assert skeleton.flip_index == category["flip_idx"]
    assert unpaired_sides(skeleton) == ["left_eye", "right_eye"]


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ([1, 2, 0], "maps keypoint 0 to 1 but 1 to 2"),
        ([0, 0, 2], "maps keypoint 1 to 0 but 0 to 0"),
        ([0, 1], "2 entries, expected 3"),
        ([0, 1, 3], "3 at place 2"),
        ([0, 1, 2.0], "list of 3 keypoint indices"),
        (3, "list of 3 keypoint indices"),
    ],
)
def test_flip_idx_that_is_no_involution_is_one_error(index, words):
    with pytest.raises(InputError, match=words):
        flip_pairs_of(index, 3)


def test_unknown_names_get_the_fallback_sigma_and_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        skeleton = Skeleton.from_coco_category({"name": "cat", "keypoints": ["nose", "tail"]})
    assert skeleton.sigmas == (FALLBACK_SIGMA, FALLBACK_SIGMA)
    assert "cat" in caplog.text


@pytest.mark.parametrize(
    ("category", "words"),
    [
        ({"name": "cat"}, "'keypoints'"),
        ({"name": "cat", "keypoints": []}, "'keypoints'"),
        (
            {"name": "cat", "keypoints": ["a", "b"], "skeleton": [[0, 1]]},
            r"'skeleton' has \[0, 1\], expected two different indices in 1..2",
        ),
        ({"name": "cat", "keypoints": ["a", "b"], "skeleton": [[1]]}, "pairs"),
        ({"name": "cat", "keypoints": ["a", "b"], "sigmas": [0.1]}, "1 sigmas"),
    ],
)
def test_invalid_categories_name_the_category(category, words):
    with pytest.raises(InputError, match=words) as caught:
        Skeleton.from_coco_category(category)
    assert "'cat'" in str(caught.value)


@pytest.mark.parametrize(
    ("category", "can_flip"),
    [
        ({"keypoints": ["a", "b"]}, False),
        ({"keypoints": ["a", "b"], "flip_idx": [0, 1]}, True),
        ({"keypoints": ["a", "b"], "flip_idx": [1, 0]}, True),
        ({"keypoints": ["left_a", "right_a", "b"]}, True),
        ({"keypoints": ["a"]}, True),
        ({"keypoints": list(COCO.names)}, True),
    ],
)
def test_mirror_pairs_that_are_not_given_are_no_identity(category, can_flip):
    skeleton = Skeleton.from_coco_category(category)
    assert skeleton.can_flip == can_flip
    assert Skeleton.from_dict(json.loads(json.dumps(skeleton.to_dict()))) == skeleton
    assert ("can_flip" in skeleton.to_dict()) != can_flip


def test_unknown_mirror_pairs_differ_from_none():
    names, sigmas = ("a", "b"), (0.1, 0.1)
    unknown = Skeleton(names, (), (), sigmas, can_flip=False)
    pair, identity = Skeleton(names, (), ((0, 1),), sigmas), Skeleton(names, (), (), sigmas)
    assert unknown.difference(pair) is None
    assert pair.difference(unknown) is None
    assert pair.difference(identity) == "the mirror image of 'a' is 'b' and 'a'"


def test_numpy_numbers_are_numbers():
    category = {"keypoints": ["a", "b"], "skeleton": np.array([[1, 2]]).tolist(), "flip_idx": list(np.array([1, 0]))}
    skeleton = Skeleton.from_coco_category({**category, "sigmas": np.array([0.1, 0.2])})
    direct = Skeleton(
        ("a", "b"), ((np.int64(0), np.int64(1)),), ((np.int64(0), np.int64(1)),), tuple(np.array([0.1, 0.2]))
    )
    assert skeleton == direct == Skeleton.from_dict(json.loads(json.dumps(direct.to_dict())))
    with pytest.raises(InputError, match="expected a list of 2 keypoint indices"):
        flip_pairs_of([True, False], 2)
