"""The model card, the Auto classes and the Hugging Face hub, whose API a stub on this machine plays."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForKeypointDetection
from typer.testing import CliRunner

from hpetr import HPetrConfig, HPetrForPoseEstimation, HPetrImageProcessor, InputError, PosePredictor, Skeleton
from hpetr.checkpoints.card import MARK, Evaluation, model_card, write_card
from hpetr.checkpoints.folder import load_checkpoint, save_checkpoint
from hpetr.checkpoints.hub import push_to_hub
from hpetr.cli.main import app
from hpetr.poses.skeleton import COCO
from hpetr.training.train import train
from hub_stub import hub_stub
from tiny_model import tiny_model
from training_runs import TINY, small_recipe

FILES = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]


def test_card_describes_the_model(tmp_path: Path) -> None:
    skeleton = dataclasses.replace(COCO, names=(*COCO.names[:16], "odd | name"))
    model = tiny_model(skeleton=skeleton.to_dict())
    metrics = Evaluation("a/b.json", 12, {"AP": 0.25, "APM": -1.0})
    save_checkpoint(model, HPetrImageProcessor(), tmp_path / "my-model", evaluation=metrics, tags=["mine"])
    card = ModelCard.load(tmp_path / "my-model" / "README.md")
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "apache-2.0",
        "hpetr",
        "keypoint-detection",
    )
    assert {"hpetr", "pose-estimation", "H-PETR", "mine"} <= set(card.data.tags)
    (metric,) = card.data.eval_results
    assert (metric.metric_type, metric.metric_value, metric.dataset_name) == ("AP", 0.25, "a/b.json")
    assert "# my-model\n" in card.text
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card.text
    assert "Of 12 images of a/b.json" in card.text
    assert "| 0.2500 | - |" in card.text
    rows = [line for line in card.text.splitlines() if line.count(" | ") == 3 and line[2].isdigit()]
    assert rows[1] == "| 1 | left_eye | right_eye | 0.025 |"
    assert "odd \\| name" in rows[16]
    assert 'PosePredictor("my-model")' in card.text


def test_card_without_metrics_says_so() -> None:
    text = model_card(HPetrConfig.preset("petr-r50"), "me/petr")
    assert "None known" in text
    assert "model-index" not in text
    assert "PETR (Shi et al., CVPR 2022) with a ResNet backbone" in text
    assert "--checkpoint hf://me/petr" in text


def test_own_card_stays_and_ours_is_renewed(tmp_path: Path) -> None:
    model, folder = tiny_model(), tmp_path / "folder"
    save_checkpoint(model, HPetrImageProcessor(), folder, evaluation=Evaluation("x.json", 1, {"AP": 0.5}))
    card = (folder / "README.md").read_text()
    assert "| 0.5000 |" in card
    write_card(folder, model_card(model.config, "folder"))
    assert "None known" in (folder / "README.md").read_text(), "metrics of other weights were left"
    (folder / "README.md").write_text("mine")
    with pytest.raises(InputError, match="was not written by hpetr and is kept"):
        write_card(folder, card)
    model.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"


def test_training_writes_its_metrics_into_the_card(tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    recipe = small_recipe(output, f"data.val.annotations={TINY}", "data.val.limit=2", "train.epochs=0.5")
    train(recipe)
    logged = [entry for entry in map(json.loads, (output / "log.jsonl").read_text().splitlines()) if "AP" in entry]
    for folder in (output, output / "best"):
        text = (folder / "README.md").read_text()
        assert "# run\n" in text
        assert "Of 2 images of tiny-coco/annotations.json" in text
        assert f"| {logged[-1]['AP']:.4f} |" in text
        assert str(tmp_path) not in text


def test_eval_writes_its_metrics_into_the_card(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    save_checkpoint(*load_checkpoint(checkpoint, "cpu"), folder)
    weights = (folder / "model.safetensors").read_bytes()
    command = ["eval", str(folder), str(TINY), "--limit", "1", "--output", str(tmp_path / "e.json"), "--card"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "e.metrics.json").read_text())
    text = (folder / "README.md").read_text()
    assert "Of 1 images of tiny-coco/annotations.json" in text
    assert f" | {metrics['AR']:.4f} | " in text
    assert (folder / "model.safetensors").read_bytes() == weights
    (folder / "README.md").write_text(text.replace(MARK, ""))
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2
    assert "was not written by hpetr and is kept" in refused.stderr


@pytest.mark.parametrize("auto_model", [AutoModel, AutoModelForKeypointDetection])
def test_auto_classes_give_the_same_model_and_processor(checkpoint: Path, auto_model: type) -> None:
    config = AutoConfig.from_pretrained(checkpoint)
    model = auto_model.from_pretrained(checkpoint).eval()
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    assert type(config) is HPetrConfig
    assert type(model) is HPetrForPoseEstimation
    assert type(processor) is HPetrImageProcessor
    own_model, own_processor = load_checkpoint(checkpoint, "cpu")
    assert config.to_dict() == own_model.config.to_dict()
    assert processor.to_dict() == own_processor.to_dict()
    image = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    with torch.inference_mode():
        expected, found = (m(**p(image)) for m, p in ((own_model, own_processor), (model, processor)))
    assert torch.equal(expected.poses, found.poses)
    assert Skeleton.from_dict(config.skeleton) == COCO


def test_push_sends_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_model(), HPetrImageProcessor(threshold=0.125)
    with hub_stub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setenv("HF_TOKEN", "hf_stub")
        push_to_hub(model, processor, "me/pushed", commit_message="First", tags=["mine"])
        push_to_hub(model, processor, "me/pushed")
        arrived = hub.files["me/pushed"]
        assert hub.commits == ["First", "Upload model"]
    assert sorted(arrived) == FILES
    folder = tmp_path / "arrived"
    folder.mkdir()
    for name, content in arrived.items():
        (folder / name).write_bytes(content)
    loaded, processor = load_checkpoint(folder, "cpu")
    assert processor.threshold == 0.125
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    card = ModelCard.load(folder / "README.md")
    assert "mine" in card.data.tags, "the first card was replaced by a later push"
    assert "--checkpoint hf://me/pushed" in card.text


def test_checkpoint_of_the_hub_comes_from_its_cache(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--someone--poses", "a" * 40
    save_checkpoint(*load_checkpoint(checkpoint, "cpu"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    predictor = PosePredictor("hf://someone/poses@v1", device="cpu")
    assert predictor.processor.size == {"shortest_edge": 128, "longest_edge": 192}
    result = CliRunner().invoke(app, ["info", "hf://someone/poses@v1"])
    assert result.exit_code == 0, result.output
    with pytest.raises(
        InputError, match=r"^hf://someone/none: the Hugging Face hub gave nothing .*`hf download"
    ) as error:
        PosePredictor("hf://someone/none")
    assert "\n" not in str(error.value)
