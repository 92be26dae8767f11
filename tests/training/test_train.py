"""Training on real images: it learns, it resumes exactly, and it refuses what it should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from hpetr import HPetrConfig, HPetrForPoseEstimation, InputError
from hpetr.data.augment import RandomHorizontalFlip
from hpetr.data.collate import PoseCollator
from hpetr.data.dataset import open_dataset
from hpetr.poses.skeleton import COCO
from hpetr.training.data import Draw, EpochSampler, TrainingSet, build_transform
from hpetr.training.optimizer import SteadyAdamW, parameter_groups, schedule_factor
from hpetr.training.recipe import DataSource
from hpetr.training.train import open_training, train
from hpetr.training.trainer import obey_main_process
from training_runs import PUBLISHED_DESIGN, TINY, small_recipe


def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    """Four steps in one go, or the last three after a restart with other workers: the same weights, bit for bit."""
    whole = train(small_recipe(tmp_path / "whole", "train.keep=4"))
    first = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-1", first / "checkpoint-1")
    resumed = train(small_recipe(first, "train.workers=1"), resume="auto")
    expected, got = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name
    start = load_file(whole / "checkpoint-1" / "model.safetensors")
    assert any(not torch.equal(start[name], tensor) for name, tensor in expected.items())
    assert HPetrForPoseEstimation.from_pretrained(whole).config.num_queries == 20
    assert (whole / "preprocessor_config.json").is_file()
    for folder in (whole, whole / "checkpoint-4"):  # who may read the configuration may read the weights
        assert len({(folder / name).stat().st_mode for name in ("config.json", "model.safetensors")}) == 1

    with pytest.raises(InputError, match="holds checkpoints of a run; pass --resume"):
        train(small_recipe(whole))


@pytest.mark.slow
def test_one_image_is_learnt(tmp_path: Path) -> None:
    """Seventy steps from MoveNet's weights on one image."""
    backbone = {"model_type": "movenet", "out_features": ["heads8", "half_heads8", "top"]}
    queries = {"num_queries": 20, "num_one_to_many_queries": 20}
    options = {**PUBLISHED_DESIGN, "backbone_config": backbone, "loss_oks": 2.0, "loss_joint_oks": 3.0, **queries}
    settings = ["model.weights=movenet", "data.train.0.limit=1", "augment.short_sides=[64]", "augment.flip=0"]
    settings += [f"model.options={options}", "augment.mosaic=0", "train.lr=5e-4", "train.backbone_lr_factor=0.25"]
    run = ["train.total_batch_size=1", "train.epochs=70", "train.save_every=1000", "train.schedule=step"]
    folder = train(small_recipe(tmp_path / "run", *settings, *run))
    lines = (folder / "log.jsonl").read_text().splitlines()
    losses = [float(line.split('"loss": ')[1].split(",")[0]) for line in lines if '"loss"' in line]
    assert len(losses) == 70
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


def test_bad_runs_end_before_any_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.json"):
        train(small_recipe(tmp_path / "a", "data.train.0.annotations=none.json"))
    with pytest.raises(InputError, match="expected the folder of a checkpoint"):
        train(small_recipe(tmp_path / "b"), resume=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be used as output folder"):
        train(small_recipe(tmp_path / "file" / "run"))
    with pytest.raises(InputError, match=r"train.total_batch_size is 3, expected a multiple of 1 processes x 2"):
        train(small_recipe(tmp_path / "c", "train.total_batch_size=3", "train.batch_size=2"))
    with pytest.raises(InputError, match="unknown argument 'max_step', did you mean 'max_steps'"):
        train(small_recipe(tmp_path / "c", "train.arguments={max_step: 1}"))
    with pytest.raises(InputError, match="unknown option 'num_querys', did you mean 'num_queries'"):
        train(small_recipe(tmp_path / "c", "model.options={num_querys: 1}"))
    with pytest.raises(InputError, match="unknown name 'h-petr-nanno', did you mean 'h-petr-nano'"):
        train(small_recipe(tmp_path / "c", "model.preset=h-petr-nanno"))
    with pytest.raises(InputError, match="'save_steps' is set by the recipe's own keys"):
        train(small_recipe(tmp_path / "c", "train.arguments={save_steps: 1}"))
    with pytest.raises(InputError, match="fsdp needs GPUs"):
        train(small_recipe(tmp_path / "c", "train.arguments={fsdp: true}"))
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3}}')
    for config in (tmp_path / "zero.json", "{zero_optimization: {stage: 3}}"):
        with pytest.raises(InputError, match="deepspeed's stage 3 .*expected stage 1 or 2, or fsdp"):
            train(small_recipe(tmp_path / "c", f"train.arguments={{deepspeed: {config}}}"))
    with pytest.raises(InputError, match=r"deepspeed: none.json: cannot be read as JSON"):
        train(small_recipe(tmp_path / "c", "train.arguments={deepspeed: none.json}"))
    with pytest.raises(InputError, match=r"data.sigmas: 3 numbers, expected 17"):
        train(small_recipe(tmp_path / "c", "data.sigmas=[0.1, 0.1, 0.1]"))
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "c").exists()


def changed_annotations(path: Path, change) -> Path:
    content = json.loads(TINY.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_data_that_cannot_be_learnt_from(tmp_path: Path) -> None:
    def rename(content: dict) -> None:
        content["categories"][0]["keypoints"][3] = "left_horn"

    def empty(content: dict) -> None:
        content["annotations"] = []

    images = f"data.train.0.images={TINY.parent / 'images'}"
    other = changed_annotations(tmp_path / "other.json", rename)
    sources = f"data.train=[{{annotations: {TINY}}}, {{annotations: {other}, images: {TINY.parent / 'images'}}}]"
    with pytest.raises(InputError, match=r"other.json: its .* differ .*keypoint 3 is 'left_horn' and 'left_ear'"):
        train(small_recipe(tmp_path / "run", sources))

    def keep_sides(content: dict) -> None:
        content["categories"][0]["flip_idx"] = list(range(17))

    def sharpen(content: dict) -> None:
        content["categories"][0]["sigmas"] = [0.01, *COCO.sigmas[1:]]

    def as_val(file: Path) -> str:
        return f"data.val={{annotations: {file}, images: {TINY.parent / 'images'}}}"

    differences = {
        keep_sides: "the mirror image of 'left_eye' is 'left_eye' and 'right_eye'",
        sharpen: "the sigma of 'nose' is 0.01 and 0.026",
        rename: "keypoint 3 is 'left_horn' and 'left_ear'",
    }
    for change, message in differences.items():
        val = changed_annotations(tmp_path / "val.json", change)
        with pytest.raises(InputError, match=rf"val.json: its keypoints differ from those of .*{message}"):
            open_training(small_recipe(tmp_path / "run", as_val(val)))
    val = changed_annotations(tmp_path / "val.json", sharpen)
    _, opened, skeleton = open_training(small_recipe(tmp_path / "run", as_val(val), f"data.sigmas={[0.05] * 17}"))
    assert opened is not None
    assert opened.skeleton.sigmas == skeleton.sigmas == (0.05,) * 17

    nobody = changed_annotations(tmp_path / "nobody.json", empty)
    with pytest.raises(InputError, match=r"data.val: no person with labelled keypoints in .*nobody.json"):
        open_training(small_recipe(tmp_path / "run", as_val(nobody)))
    with pytest.raises(InputError, match=r"no person with labelled keypoints in .*nobody.json"):
        train(small_recipe(tmp_path / "run", f"data.train.0.annotations={nobody}", images))
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_only_as_itself(tmp_path: Path) -> None:
    output = train(small_recipe(tmp_path / "run", "train.epochs=1"))
    with pytest.raises(InputError, match=r"of another model than the recipe's: d_model 32, the recipe's 64"):
        train(small_recipe(output, "model.options.d_model=64"), resume="auto")
    with pytest.raises(InputError, match=r"train.total_batch_size was 2 in this run, expected the same, got 4"):
        train(small_recipe(output, "train.total_batch_size=4"), resume="auto")
    with pytest.raises(InputError, match=r"data.train.0.limit was None in this run, expected the same, got 3"):
        train(small_recipe(output, "data.train.0.limit=3"), resume="auto")
    train(small_recipe(output, "train.epochs=2"), resume="auto")  # longer is fine
    assert (output / "checkpoint-4").is_dir()


def test_images_of_val_in_train_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(small_recipe(tmp_path / "run", f"data.val.annotations={TINY}", "data.val.limit=2", "train.epochs=0.5"))
    assert "warning: 2 of 2 images of val are in train too: 000000000790.jpg" in capsys.readouterr().out


def test_everything_switched_on(tmp_path: Path) -> None:
    """Averaged weights, evaluations, early stopping, bfloat16, accumulation, checkpointing, TensorBoard: one run."""
    settings = ["train.ema=0.9", f"data.val.annotations={TINY}", "train.eval_every=2", "train.patience=2"]
    settings += ["train.precision=bfloat16", "train.batch_size=1", "train.gradient_checkpointing=true"]
    output = train(small_recipe(tmp_path / "run", *settings, "train.epochs=50", "train.report_to=[tensorboard]"))
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "AP" in line]
    # Nothing is found after so few steps: the first evaluation is the best, and two more without a better one end it.
    assert [line["step"] for line in evaluations] == [2, 4, 6]
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    trained, checkpoint = (load_file(output / name / "model.safetensors") for name in (".", "checkpoint-6"))
    average = load_file(output / "checkpoint-6" / "average.safetensors")
    assert all(torch.equal(tensor, average[name]) for name, tensor in trained.items())
    assert any(not torch.equal(tensor, checkpoint[name]) for name, tensor in trained.items())
    assert load_file(output / "best" / "model.safetensors").keys() == trained.keys()
    assert "<html" in (output / "report.html").read_text()
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    logged = [event.value for event in events.Scalars("train/decoder.0.l1")]
    assert logged == pytest.approx([line["decoder.0.l1"] for line in lines if "loss" in line])


def test_accumulated_images_are_those_of_one_batch(tmp_path: Path) -> None:
    """One image twice, each alone or both together: the gradient's scale and the number of steps are the same."""
    norms = []
    same = ["data.train.0.limit=1", "data.train.0.repeat=2", "augment.short_sides=[64]", "augment.flip=0"]
    for batch in (1, 2):
        settings = [*same, "augment.mosaic=0", f"train.batch_size={batch}", "train.epochs=1"]
        lines = (train(small_recipe(tmp_path / str(batch), *settings)) / "log.jsonl").read_text().splitlines()
        norms.append([json.loads(line)["grad_norm"] for line in lines if "grad_norm" in line])
    assert len(norms[0]) == 1
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_without_flip_pairs_no_image_is_flipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rename(content: dict) -> None:
        content["categories"][0]["keypoints"] = [f"point {index}" for index in range(17)]

    def keep_sides(content: dict) -> None:
        rename(content)
        content["categories"][0]["flip_idx"] = list(range(17))

    images = f"data.train.0.images={TINY.parent / 'images'}"
    for change, is_flipped in ((rename, False), (keep_sides, True)):
        data = changed_annotations(tmp_path / "data.json", change)
        recipe = small_recipe(tmp_path / "run", f"data.train.0.annotations={data}", images)
        opened, _, _ = open_training(recipe, print)
        flips = [step for step in opened.transform.transforms if isinstance(step, RandomHorizontalFlip)]
        assert len(flips) == is_flipped
        line = "data.json: images are not flipped in training: no flip pairs, expected 'flip_idx' or left and right"
        assert (line in capsys.readouterr().out) != is_flipped
    # A second data set that gives the pairs of the same keypoints gives them to both.
    both = [f"{{annotations: {path}, images: {TINY.parent / 'images'}}}" for path in (tmp_path / "plain.json", data)]
    changed_annotations(tmp_path / "plain.json", rename)
    _, _, skeleton = open_training(small_recipe(tmp_path / "run", f"data.train=[{', '.join(both)}]"))
    assert skeleton.can_flip


@pytest.mark.slow
def test_more_epochs_on_resume(tmp_path: Path) -> None:
    output = train(small_recipe(tmp_path / "run", "train.epochs=1"))
    train(small_recipe(output, "train.epochs=1"), resume="auto")  # finished: nothing to do
    train(small_recipe(output, "train.epochs=2"), resume="auto")
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]


def test_parameter_groups() -> None:
    model = HPetrForPoseEstimation(HPetrConfig.preset("h-petr-nano"))
    recipe = small_recipe(
        Path("unused"), "train.lr=1e-3", "train.backbone_lr_factor=0.5", "train.offsets_lr_factor=0.1"
    )
    groups = {group["lr"]: group["params"] for group in parameter_groups(model, recipe.train)}
    assert sorted(groups) == pytest.approx([1e-4, 5e-4, 1e-3])
    assert sum(p.numel() for params in groups.values() for p in params) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    offsets = {id(p) for name, p in model.named_parameters() if "sampling_offsets" in name}
    assert {id(p) for p in groups[min(groups)]} == offsets


def test_schedules() -> None:
    step = small_recipe(Path("unused"), "train.schedule=step", "train.warmup_steps=10", "train.drops=[0.5, 0.8]").train
    assert [schedule_factor(s, 100, step) for s in (0, 9, 49, 50, 80)] == pytest.approx([0.1, 1, 1, 0.1, 0.01])
    cosine = small_recipe(Path("unused"), "train.schedule=cosine", "train.warmup_steps=0").train
    assert [schedule_factor(s, 100, cosine) for s in (0, 50, 100)] == pytest.approx([1, 0.5, 0])


def training_set(seed: int, repeat: int = 3) -> TrainingSet:
    recipe = small_recipe(Path("unused"), "augment.photometric=true", "augment.rotation=30")
    source = DataSource(annotations=TINY, repeat=repeat)
    return TrainingSet([open_dataset(TINY)], [source], build_transform(recipe.augment, recipe.processor, COCO), seed)


def test_images_follow_from_seed_epoch_and_place() -> None:
    one, other = training_set(0), training_set(0)
    assert len(one) == 3 * len(open_dataset(TINY))
    _ = other[Draw(0, 1)]  # what was read before does not matter
    first = one[Draw(0, 0)]
    np.testing.assert_array_equal(first.image, other[Draw(0, 0)].image)
    np.testing.assert_array_equal(first.keypoints, other[Draw(0, 0)].keypoints)
    assert not np.array_equal(first.keypoints, other[Draw(1, 0)].keypoints)
    assert not np.array_equal(first.keypoints, training_set(1)[Draw(0, 0)].keypoints)


@pytest.mark.slow
def test_spawned_workers_give_the_same_batches() -> None:
    """Windows and macOS start the workers anew: everything that they need is pickled."""
    recipe = small_recipe(Path("unused"))
    data, collator = training_set(0, repeat=1), PoseCollator.from_processor(recipe.processor.build())
    sampler = EpochSampler(data, 2, 0, bucketing=True)
    loaders = [
        DataLoader(data, 4, sampler=sampler, collate_fn=collator, **options)
        for options in ({}, {"num_workers": 1, "multiprocessing_context": "spawn", "worker_init_fn": obey_main_process})
    ]
    (expected,), (batch,) = (list(loader) for loader in loaders)
    assert batch["images"] == expected["images"]
    assert batch["pixel_values"].equal(expected["pixel_values"])
    assert all(a["keypoints"].equal(b["keypoints"]) for a, b in zip(batch["labels"], expected["labels"], strict=True))


def test_workers_outlive_a_signal_to_all_processes() -> None:
    """They end when the main process says so, also at its exit, which sends them SIGTERM."""
    options = {"num_workers": 1, "worker_init_fn": obey_main_process, "persistent_workers": True}
    loader = DataLoader(list(range(4)), 1, **options)
    assert len(list(loader)) == 4
    (worker,) = loader._iterator._workers
    for name in ("-INT", "-TERM"):
        subprocess.run(["kill", name, str(worker.pid)], check=True)
    assert len(list(loader)) == 4
    worker.terminate()
    worker.join()
    assert worker.exitcode == 0


def test_an_epoch_sees_every_image_and_whole_steps() -> None:
    data = training_set(0, repeat=50)
    for bucketing in (False, True):
        sampler = EpochSampler(data, 8, 0, bucketing=bucketing)
        epoch = list(sampler)
        assert len(epoch) == len(sampler)
        assert len(epoch) % 8 == 0
        assert 0 <= len(epoch) - len(data) < 8
        assert {draw.place for draw in epoch} == set(range(len(data)))
        assert list(sampler) == epoch
        sampler.set_epoch(1)
        assert [draw.place for draw in sampler] != [draw.place for draw in epoch]
        assert {draw.epoch for draw in sampler} == {1}


def test_bucketing_brings_like_shapes_together() -> None:
    data = training_set(0, repeat=50)
    shapes = data.shapes()
    assert len(set(shapes)) > 1

    def spread(bucketing: bool) -> float:
        steps = np.array([draw.place for draw in EpochSampler(data, 8, 0, bucketing=bucketing)]).reshape(-1, 8)
        return float(np.ptp(shapes[steps], axis=1).mean())

    assert spread(True) < 0.3 * spread(False)


@pytest.mark.slow
def test_another_skeleton_starts_from_a_trained_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Five keypoints and two classes from a model of 17 and one: all that does not depend on them is kept."""

    def shrink(content: dict) -> None:
        category = content["categories"][0]
        category["keypoints"] = ["snout", "left_paw", "right_paw", "left_hoof", "right_hoof"]
        category["skeleton"] = []
        category.pop("sigmas", None)
        content["categories"] = [category, {**category, "id": 7, "name": "goat"}]
        for number, annotation in enumerate(content["annotations"]):
            annotation["keypoints"] = annotation["keypoints"][15:30]
            annotation["category_id"] = (category["id"], 7)[number % 2]

    start = train(small_recipe(tmp_path / "start", "train.epochs=0.5"))
    animals = changed_annotations(tmp_path / "animals.json", shrink)
    sources = [f"data.train.0.annotations={animals}", f"data.train.0.images={TINY.parent / 'images'}"]
    validation = [f"data.val={{annotations: {animals}, images: {TINY.parent / 'images'}}}"]
    recipe = small_recipe(tmp_path / "run", *sources, *validation, f"model.weights={start}", "model.options={}")
    output = train(recipe)
    said = capsys.readouterr().out
    told = re.search(r"weights: .* of \d+ tensors \((\d+)\.\d% of the numbers\); .* keep their initial values", said)
    assert told is not None, said
    assert 70 < int(told.group(1)) < 100
    model = HPetrForPoseEstimation.from_pretrained(output)
    assert model.config.num_keypoints == 5
    assert model.config.id2label == {0: "person", 1: "goat"}
    assert model.config.skeleton["flip_pairs"] == [[1, 2], [3, 4]]
    assert '"AP": ' in (output / "log.jsonl").read_text()


def test_relative_rates_of_the_backbone() -> None:
    model = HPetrForPoseEstimation(HPetrConfig.preset("h-petr-nano"))
    recipe = small_recipe(
        Path("unused"), "train.lr=1e-3", "train.backbone_relative_lr=1e-2", "train.prior_lr_factor=2"
    ).train
    rates = {id(p): group["lr"] for group in parameter_groups(model, recipe) for p in group["params"]}
    assert len(rates) == len([p for p in model.parameters() if p.requires_grad])
    weight = model.backbone.body.stem.weight
    assert rates[id(weight)] == pytest.approx(1e-2 * float(weight.detach().square().mean((1, 2, 3)).sqrt().median()))
    assert rates[id(model.backbone.prior.projection.weight)] == 2e-3  # zeros


def test_a_gradient_is_clipped_by_its_own_past_alone() -> None:
    """A gradient 1,000 times the ones before it moves its tensor about as far, and no other tensor less."""
    moved = {}
    for name, largest in (("steady", 1.0), ("jump", 1e3)):
        tensors = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
        optimizer = SteadyAdamW([{"params": tensors}], clip=2.0, lr=0.1)
        for step in range(6):
            tensors[0].grad = torch.full((4,), largest if step == 4 else 1.0)
            tensors[1].grad = torch.full((4,), 1e-3)
            optimizer.step()
        moved[name] = [float(tensor.detach().mean()) for tensor in tensors]
    assert moved["jump"][1] == moved["steady"][1]
    assert moved["jump"][0] == pytest.approx(moved["steady"][0], rel=0.1)
