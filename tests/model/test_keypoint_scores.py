"""Scores of single joints: what they learn from, and where they come out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hpetr import HPetrImageProcessor, InputError
from hpetr.data.augment import RandomHorizontalFlip, RandomResize
from hpetr.data.dataset import open_dataset
from hpetr.inference.torch_predictor import predict_batch
from hpetr.model.losses import Matches, score_loss
from hpetr.model.matching import make_targets
from hpetr.poses.skeleton import COCO
from hpetr.training.data import Draw, TrainingSet
from hpetr.training.recipe import DataSource
from hpetr.training.train import prepare
from tiny_model import people, tiny_model
from training_runs import SMALL_MODEL, TINY, small_recipe

SIGMAS = torch.full((4,), 0.1)
IMAGE = torch.tensor([[200.0, 100.0]])  # width, height


def loss_of(visibility: list[float], shift: list[float], logits: list[float]) -> float:
    """Of one person of 1,000 pixels^2, whose joints are so many pixels off."""
    keypoints = torch.tensor([[[10.0, 20.0, v] for v in visibility]])
    label = {
        "keypoints": keypoints,
        "boxes": torch.zeros(1, 4),
        "areas": torch.tensor([1000.0]),
        "class_labels": torch.zeros(1, dtype=torch.long),
    }
    poses = keypoints[..., :2].clone()
    poses[..., 0] += torch.tensor(shift)
    zero = torch.zeros(1, dtype=torch.long)
    matches = Matches([1], zero, zero, zero, zero, zero)
    targets = make_targets([label], IMAGE)
    return float(score_loss(poses / IMAGE, torch.tensor([logits]), matches, targets, SIGMAS))


def test_a_joint_is_right_within_the_distance_of_half_its_similarity() -> None:
    reach = math.sqrt(2 * 1000 * 0.2**2 * math.log(2))  # where exp(-d^2 / (2 area (2 sigma)^2)) is one half
    right = loss_of([2, 2, 2, 1], [0, reach - 0.1, 0, 0], [9.0] * 4)
    wrong = loss_of([2, 2, 2, 1], [0, reach + 0.1, 0, 0], [9.0] * 4)
    assert right == pytest.approx(math.log1p(math.exp(-9)), rel=1e-3)
    assert wrong == pytest.approx(9 / 4, rel=1e-3)


def test_absent_joints_are_wrong_and_unknown_ones_do_not_count() -> None:
    assert loss_of([2, -1, 0, 0], [0, 0, 0, 0], [9.0, -9.0, 9.0, -9.0]) == pytest.approx(0, abs=1e-3)
    assert loss_of([2, -1, 0, 0], [0, 0, 0, 0], [9.0, 9.0, 0.0, 0.0]) == pytest.approx(9 / 2, rel=1e-3)
    assert loss_of([0, 0, 0, 0], [0, 0, 0, 0], [9.0] * 4) == 0


def test_data_say_whether_joints_without_label_are_absent() -> None:
    """They stay so when the image is changed; a joint that leaves it is unknown."""

    def loaded(unlabelled: str) -> np.ndarray:
        source = DataSource(annotations=TINY, unlabelled=unlabelled)
        data = TrainingSet([open_dataset(TINY)], [source], lambda sample, rng: sample, 0)
        sample, rng = data[Draw(0, 0)], np.random.default_rng(0)
        flipped = RandomHorizontalFlip(1.0, COCO.flip_index)(sample, rng)
        again = RandomHorizontalFlip(1.0, COCO.flip_index)(RandomResize([64], 64)(flipped, rng), rng)
        np.testing.assert_array_equal(again.keypoints[..., 2], sample.keypoints[..., 2])
        return sample.keypoints

    unknown, absent = loaded("unknown"), loaded("absent")
    assert (unknown[..., 2] == 0).any()
    np.testing.assert_array_equal(absent[..., 2], np.where(unknown[..., 2] == 0, -1, unknown[..., 2]))
    np.testing.assert_array_equal(absent[..., :2], unknown[..., :2])


def test_scores_learn_and_come_out() -> None:
    """Trained on joints of which the odd ones are absent, the head tells them from the others in results."""
    model = tiny_model(keypoint_scores=True)
    label = people(2, 96, 128, seed=0)
    label["keypoints"][..., 2] = torch.where(torch.arange(17) % 2 == 1, -1.0, 2.0)
    pixels = torch.randn(1, 3, 96, 128)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        output = model(pixels, None, [label])
        output.loss_dict["joint.score"].backward()
        optimizer.step()
    model.eval()
    processor = HPetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 128}, threshold=0.0)
    result = predict_batch(model, processor, [np.zeros((96, 128, 3), np.uint8)])[0]
    assert result.keypoint_scores.shape == (5, 17)
    assert result.keypoint_scores[:, 1::2].max() < 0.2
    assert ((result.keypoint_scores >= 0) & (result.keypoint_scores <= 1)).all()


def test_models_without_them_give_ones_as_published() -> None:
    model = tiny_model().eval()
    assert model.joint_decoder.score_head is None
    processor = HPetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 128}, threshold=0.0)
    assert (predict_batch(model, processor, [np.zeros((96, 128, 3), np.uint8)])[0].keypoint_scores == 1).all()


def test_only_named_parameters_are_trained(tmp_path: Path) -> None:
    options = f"model.options={ {**SMALL_MODEL, 'keypoint_scores': True} }"
    recipe = small_recipe(tmp_path / "run", options, "train.only=[joint_decoder.score_head.]")
    trainer, _ = prepare(recipe, None)
    learning = {name for name, parameter in trainer.network.named_parameters() if parameter.requires_grad}
    assert learning == {name for name in trainer.network.state_dict() if name.startswith("joint_decoder.score_head.")}
    with pytest.raises(InputError, match=r"train.only: \['heads'\], expected beginnings of names of parameters"):
        prepare(small_recipe(tmp_path / "other", "train.only=[heads]"), None)
