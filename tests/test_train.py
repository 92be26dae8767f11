"""Training on real pictures: it learns, it resumes exactly, and it refuses what it should."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hpetr import HPetrConfig, HPetrForPoseEstimation, InputError
from hpetr.data.dataset import CocoPoseDataset
from hpetr.recipe import Recipe, load_recipe
from hpetr.skeleton import COCO
from hpetr.train import TrainingSet, build_transform, parameter_groups, schedule_factor, train

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "tiny-coco" / "annotations.json"


def tiny_recipe(output: Path, *overrides: str) -> Recipe:
    """h-petr-nano made very small, at 64 pixels, from random weights."""
    small = [
        f"output={output}",
        f"data.train.0.annotations={TINY}",
        "model.weights=none",
        "model.options={encoder_layers: 1, num_queries: 20, num_one_to_many_queries: 20, num_poses: 10}",
        "augment.short_sides=[48, 64]",
        "augment.long_side=64",
        "processor.shortest_edge=64",
        "processor.longest_edge=64",
        "train.epochs=2",
        "train.batch_size=2",
        "train.warmup_steps=0",
        "train.workers=0",
        "train.log_every=1",
        "train.save_every=1",
        "train.keep=10",
    ]
    return load_recipe(ROOT / "recipes" / "h-petr-nano.yaml", [*small, *overrides])


def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    """Four steps in one go, or the last three after a restart with other workers: the same weights, bit for bit."""
    whole = train(tiny_recipe(tmp_path / "whole"))
    first = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-1", first / "checkpoint-1")
    resumed = train(tiny_recipe(first, "train.workers=1"), resume="auto")
    expected, got = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name
    start = load_file(whole / "checkpoint-1" / "model.safetensors")
    assert any(not torch.equal(start[name], tensor) for name, tensor in expected.items())
    assert HPetrForPoseEstimation.from_pretrained(whole).config.num_queries == 20
    assert (whole / "preprocessor_config.json").is_file()

    with pytest.raises(InputError, match="holds checkpoints of a run; pass --resume"):
        train(tiny_recipe(whole))


def test_one_picture_is_learnt(tmp_path: Path) -> None:
    """Seventy steps from the ImageNet weights on one picture."""
    settings = ["model.weights=imagenet", "data.train.0.limit=1", "augment.short_sides=[64]", "augment.flip=0"]
    run = ["train.epochs=70", "train.save_every=1000", "train.schedule=step"]
    folder = train(tiny_recipe(tmp_path / "run", *settings, *run))
    lines = (folder / "log.jsonl").read_text().splitlines()
    losses = [float(line.split('"loss": ')[1].split(",")[0]) for line in lines if '"loss"' in line]
    assert len(losses) == 70
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_bad_runs_end_before_any_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.json"):
        train(tiny_recipe(tmp_path / "a", "data.train.0.annotations=none.json"))
    with pytest.raises(InputError, match="expected the folder of a checkpoint"):
        train(tiny_recipe(tmp_path / "b"), resume=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write there"):
        train(tiny_recipe(tmp_path / "file" / "run"))
    with pytest.raises(InputError, match="'imagenet' is known for h-petr-nano only"):
        train(tiny_recipe(tmp_path / "c", "model.weights=imagenet", "model.preset=petr-r50", "model.options={}"))
    assert not (tmp_path / "a").exists()


def test_infinite_loss_stops_with_a_sentence(tmp_path: Path) -> None:
    config = HPetrConfig.preset("h-petr-nano", encoder_layers=1)
    model = HPetrForPoseEstimation(config)
    with torch.no_grad():
        model.heatmap_head.bias.fill_(float("nan"))
    recipe = tiny_recipe(tmp_path / "run", f"model.weights={tmp_path / 'broken'}")
    model.save_pretrained(tmp_path / "broken")
    recipe.processor.build().save_pretrained(tmp_path / "broken")
    with pytest.raises(FloatingPointError, match=r"pictures \d+, \d+: .*not finite.*heatmap = nan"):
        train(recipe)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_parameter_groups() -> None:
    model = HPetrForPoseEstimation(HPetrConfig.preset("h-petr-nano"))
    recipe = tiny_recipe(Path("unused"), "train.lr=1e-3", "train.backbone_lr_factor=0.5", "train.offsets_lr_factor=0.1")
    groups = {group["lr"]: group["params"] for group in parameter_groups(model, recipe.train)}
    assert sorted(groups) == pytest.approx([1e-4, 5e-4, 1e-3])
    assert sum(p.numel() for params in groups.values() for p in params) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    offsets = {id(p) for name, p in model.named_parameters() if "sampling_offsets" in name}
    assert {id(p) for p in groups[min(groups)]} == offsets


def test_schedules() -> None:
    step = tiny_recipe(Path("unused"), "train.schedule=step", "train.warmup_steps=10", "train.drops=[0.5, 0.8]").train
    assert [schedule_factor(s, 100, step) for s in (0, 9, 49, 50, 80)] == pytest.approx([0.1, 1, 1, 0.1, 0.01])
    cosine = tiny_recipe(Path("unused"), "train.schedule=cosine", "train.warmup_steps=0").train
    assert [schedule_factor(s, 100, cosine) for s in (0, 50, 100)] == pytest.approx([1, 0.5, 0])


def test_pictures_follow_from_seed_epoch_and_place() -> None:
    recipe = tiny_recipe(Path("unused"), "augment.photometric=true", "augment.rotation=30").augment

    def training_set(seed: int) -> TrainingSet:
        return TrainingSet([CocoPoseDataset(TINY)], [3], build_transform(recipe, COCO), seed)

    one, other = training_set(0), training_set(0)
    assert len(one) == 3 * len(CocoPoseDataset(TINY))
    _ = other[1]  # what was read before does not matter
    np.testing.assert_array_equal(one[0].image, other[0].image)
    np.testing.assert_array_equal(one[0].keypoints, other[0].keypoints)
    other.set_epoch(1)
    assert not np.array_equal(one[0].keypoints, other[0].keypoints)
    assert not np.array_equal(one[0].keypoints, training_set(1)[0].keypoints)
