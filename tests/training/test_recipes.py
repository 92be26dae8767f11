"""The recipes that come with hpetr: the published numbers, down to the objects that a run is made of."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from hpetr import HPetrConfig, HPetrForPoseEstimation
from hpetr.checkpoints.official import from_official, to_official
from hpetr.data.augment import (
    Compose,
    OneOf,
    PhotometricDistortion,
    RandomAffine,
    RandomCropResize,
    RandomHorizontalFlip,
    RandomResize,
)
from hpetr.evaluation.zoo import PUBLISHED
from hpetr.poses.skeleton import COCO, CROWDPOSE
from hpetr.training.data import build_transform
from hpetr.training.optimizer import parameter_groups, schedule_factor
from hpetr.training.recipe import Recipe, load_recipe
from paths import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
PARAMETERS = {  # counted on the official modules, CrowdPose's on ours
    "petr-r50": 43_631_713,
    "petr-r101": 62_623_841,
    "petr-swin-l": 213_712_437,
    "h-petr-r50": 46_719_073,
    "h-petr-r101": 64_660_577,
    "h-petr-swin-l": 216_799_797,
    "petr-swin-l-crowdpose": 220_444_755,
}


def recipe_of(name: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / f"{name}.yaml")


@cache
def meta_model(preset: str) -> HPetrForPoseEstimation:
    """Shapes and names without memory."""
    with torch.device("meta"):
        return HPetrForPoseEstimation(HPetrConfig.preset(preset))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_its_model_builds(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.output == Path("runs") / path.stem
    config = HPetrConfig.preset(recipe.model.preset, **recipe.model.options)
    assert {key: getattr(config, key) for key in recipe.model.options} == recipe.model.options
    assert recipe.train.save_every % recipe.train.log_every == 0
    assert meta_model(recipe.model.preset).config.num_poses > 0


@pytest.mark.parametrize("name", PARAMETERS)
def test_optimizer_and_schedule_are_the_published(name: str) -> None:
    recipe = recipe_of(name)
    settings = recipe.train
    lr = 1e-4 if "swin" in name else 2e-4
    assert recipe.model.preset == name
    assert recipe.model.weights == "imagenet"
    assert (settings.lr, settings.weight_decay, settings.clip) == (lr, 1e-4, 0.1)
    assert settings.total_batch_size == (16 if "crowdpose" in name else 8)
    assert settings.epochs == 100
    assert (settings.precision, settings.ema, settings.warmup_steps) == ("float32", None, 0)

    model = meta_model(recipe.model.preset)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    rates = {id(p): group["lr"] for group in parameter_groups(model, settings) for p in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            slow = parameter_name.startswith("backbone.body.") or "sampling_offsets" in parameter_name
            assert rates.pop(id(parameter)) == pytest.approx(lr / 10 if slow else lr), parameter_name
    assert not rates  # nothing twice, nothing frozen

    factors = [schedule_factor(step, 1000, settings) for step in (0, 799, 800, 999)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1])


@pytest.mark.parametrize("name", PARAMETERS)
def test_images_are_the_published(name: str) -> None:
    recipe = recipe_of(name)
    crowdpose = "crowdpose" in name
    skeleton = CROWDPOSE if crowdpose else COCO
    transform = build_transform(recipe.augment, recipe.processor, skeleton)
    assert isinstance(transform, Compose)
    affine = transform.transforms[1]
    assert isinstance(affine, RandomAffine)
    assert affine.fill == pytest.approx((123.675, 116.28, 103.53))
    resize = RandomResize(range(400, 1401), 1400)
    crop = RandomCropResize(RandomResize([400, 500, 600], 4200), resize, (384, 384), (600, 600))
    assert transform.transforms == [
        PhotometricDistortion(brightness=32, contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=18),
        RandomAffine(rotation=30, shear=2 if crowdpose else 0, fill=affine.fill),
        RandomHorizontalFlip(0.5, skeleton.flip_index),
        OneOf([resize, crop]),
    ]
    assert recipe.processor.build().size == {"shortest_edge": 800, "longest_edge": 1333}
    areas = [source.area_of_box for source in (*recipe.data.train, recipe.data.val) if source is not None]
    assert areas == ([1.0, 0.53] if crowdpose else [None, None])
    assert recipe.data.sigmas == (list(CROWDPOSE.sigmas) if crowdpose else None)


def test_crowdpose_preset() -> None:
    config = HPetrConfig.preset("petr-swin-l-crowdpose")
    assert config.skeleton == CROWDPOSE.to_dict()
    assert (config.decoder_layers, config.joint_decoder_layers) == (6, 3)
    assert (config.dropout, config.decoder_ffn_dim, config.joint_decoder_ffn_dim) == (0.1, 1024, 1024)
    assert config.backbone_config.drop_path_rate == 0.3
    # the official names of six and three layers lead to every tensor and back
    model = meta_model("petr-swin-l-crowdpose")
    weights = {name for name in model.state_dict() if not name.endswith("relative_position_index")}
    assert from_official(to_official(model), config).keys() == weights
    # another K leaves nothing of CrowdPose's skeleton
    assert HPetrConfig.preset("petr-swin-l-crowdpose", num_keypoints=17).skeleton == COCO.to_dict()
    assert HPetrConfig.preset("petr-swin-l-crowdpose", num_keypoints=14).skeleton == CROWDPOSE.to_dict()


def row(name: str) -> str:
    """The recipe's row of the page's table."""
    recipe = recipe_of(name)
    train = recipe.train
    config = HPetrConfig.preset(recipe.model.preset)
    extra = f" + {config.num_one_to_many_queries}, {config.one_to_many_k}" if config.num_one_to_many_queries else ""
    cells = [
        name,
        f"{PARAMETERS[name]:,}",
        train.total_batch_size,
        f"{train.lr * 1e4:g}e-4",
        f"{train.epochs:g}, {train.epochs * train.drops[0]:g}",
        f"{config.dropout:g}",
        f"{config.num_queries}{extra}",
        f"{config.decoder_ffn_dim} / {config.joint_decoder_ffn_dim}",
        f"{config.decoder_layers} / {config.joint_decoder_layers}",
        getattr(config.backbone_config, "drop_path_rate", "-"),
        f"{recipe.augment.shear:g}",
        f"{100 * PUBLISHED[name].official:.1f}",
    ]
    return f"| {' | '.join(str(cell) for cell in cells)} |"


@pytest.mark.parametrize("name", PARAMETERS)
def test_table_of_the_page(name: str) -> None:
    assert row(name) in PAGE.splitlines()


def test_every_recipe_is_on_the_page() -> None:
    first_cells = set(re.findall(r"^\| ([a-z0-9-]+) \|", PAGE, re.MULTILINE))
    assert first_cells - {"recipe", "backbone"} == {path.stem for path in RECIPES}


def test_commands_of_the_page_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the test of all pages leaves out: other programs, and options in brackets."""
    monkeypatch.chdir(ROOT)
    (line,) = re.findall(r"^hpetr train (.*downsample_in_bottleneck.*)$", PAGE, re.MULTILINE)
    recipe, *overrides = shlex.split(line)
    options = load_recipe(recipe, overrides).model.options
    assert HPetrConfig.preset("petr-r50", **options).backbone_config.downsample_in_bottleneck
    lines = re.findall(r"^(?:torchrun .* -m hpetr train|sbatch \S+/train\.sbatch) (.+)$", PAGE, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        recipe, *overrides = shlex.split(line)
        load_recipe(recipe, overrides)


@pytest.mark.slow
def test_slurm_evaluation_runs(tmp_path: Path) -> None:
    """Where the script asks SLURM to start a program, this machine starts it."""
    script = ROOT / "examples" / "slurm" / "eval.sbatch"
    usage = subprocess.run(["bash", script], capture_output=True, text=True)
    assert usage.returncode == 2
    assert "[CHECKPOINT] DATA" in usage.stderr
    (tmp_path / "srun").write_text('#!/bin/bash\nexec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    places = [str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {**os.environ, "PATH": os.pathsep.join(places), "SLURM_GPUS_ON_NODE": "2"}
    data, output = ROOT / "examples" / "tiny-coco", tmp_path / "eval.json"
    command = ["bash", script, "h-petr-nano", data, "--limit", "2", "--output", output]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "eval.metrics.json").read_text())["processes"] == 2


def test_slurm_script() -> None:
    script = ROOT / "examples" / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text(encoding="utf-8")
    nodes, gpus = (int(re.search(rf"#SBATCH --{key}=(\d+)", text)[1]) for key in ("nodes", "gpus-per-node"))
    examples = re.findall(r"#   sbatch examples/slurm/train\.sbatch (.+)", text)
    assert examples
    for example in examples:
        recipe, *overrides = shlex.split(example)
        assert load_recipe(ROOT / recipe, overrides).train.total_batch_size % (nodes * gpus) == 0
    usage = subprocess.run(["bash", script], capture_output=True, text=True)
    assert usage.returncode == 2
    assert "RECIPE" in usage.stderr
