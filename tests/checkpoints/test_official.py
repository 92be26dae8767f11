"""Official checkpoints that are not what they should be; the exact conversion is in model/test_golden.py."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest
import torch

import golden_inputs
from hpetr import HPetrConfig, InputError
from hpetr.checkpoints.official import from_official, load_official, read_official, to_official, unfold_order
from paths import GOLDEN
from tiny_model import tiny_model

KEYS = json.loads((GOLDEN / "official_keys.json").read_text())


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return golden_inputs.fill(KEYS["petr-r50"])


@pytest.mark.parametrize("layout", ["mmcv", "detr", "bare"])
def test_layouts_of_a_file(tmp_path: Path, state, layout: str) -> None:
    path = tmp_path / "official.pth"
    contents = {
        "mmcv": {"meta": {"epoch": 100}, "state_dict": state},
        "detr": {"model": state, "args": argparse.Namespace(lr=1e-4, device="cuda"), "epoch": 59},
        "bare": state,
    }
    torch.save(contents[layout], path)
    read = read_official(path)
    assert read.keys() == state.keys()
    if layout == "mmcv":
        model = load_official(path, "petr-r50")
        assert not model.training
        torch.testing.assert_close(model.heatmap_head.bias, state["bbox_head.fc_hm.bias"])


def test_number_of_keypoints_follows_the_checkpoint() -> None:
    shapes = {
        name: [14 if s == 17 else 28 if s == 34 else s for s in shape]
        for name, shape in KEYS["petr-r50"].items()
        if "decoder.layers" not in name or "attentions.1" not in name or "refine" in name
    }
    for name, shape in KEYS["petr-r50"].items():
        if name not in shapes:  # pose attention samples one point a joint
            shapes[name] = [s // 17 * 14 if s in (1088, 544) else s for s in shape]
    assert load_official(golden_inputs.fill(shapes), "petr-r50").config.num_keypoints == 14


def test_checkpoint_of_another_model(state) -> None:
    with pytest.raises(InputError, match="is it a checkpoint of h-petr-r50"):
        load_official(state, "h-petr-r50")
    with pytest.raises(InputError, match=r"missing.*is it a checkpoint of petr-r101"):
        load_official(state, "petr-r101")
    with pytest.raises(InputError, match=r"unexpected tensor 'backbone.bn1.bias'.*petr-swin-l"):
        load_official(state, "petr-swin-l")
    with pytest.raises(InputError, match="no official model has a movenet backbone"):
        load_official(state, "h-petr-nano")


def test_missing_and_leftover_tensors(state) -> None:
    less = {name: tensor for name, tensor in state.items() if name != "bbox_head.fc_hm.weight"}
    with pytest.raises(InputError, match="'bbox_head.fc_hm.weight' is missing"):
        load_official(less, "petr-r50")
    with pytest.raises(InputError, match="unexpected tensor 'optimizer'"):
        load_official({**state, "optimizer": torch.zeros(1)}, "petr-r50")


def test_preset_is_found_by_the_tensors(state, tmp_path: Path) -> None:
    model = load_official(state)
    assert model.config.to_dict() == HPetrConfig.preset("petr-r50").to_dict()
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other.pth: is none of the zoo's models; of the nearest.* 'a.weight'"):
        load_official(tmp_path / "other.pth")


def test_number_of_classes_follows_the_checkpoint(state) -> None:
    two = {name: t.repeat(2, *[1] * (t.ndim - 1)) if "cls_branches" in name else t for name, t in state.items()}
    model = load_official(two)
    assert model.config.id2label == {0: "class 0", 1: "class 1"}
    assert torch.equal(model.pose_decoder.class_heads[0].bias, two["bbox_head.cls_branches.0.bias"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"keypoint_scores": True}, "joint_decoder.score_head"),
        ({"steps": "size"}, "steps = 'size'"),
        ({"num_feature_levels": 5}, "backbone.neck.convs.4.weight"),
        ({"neck_norm": "token"}, "backbone.neck.convs.0.bias"),
    ],
)
def test_models_that_the_official_code_does_not_have(changes: dict, reason: str) -> None:
    with pytest.raises(InputError, match=f"no official model has {reason}"):
        to_official(tiny_model(**changes))


def test_heads_registered_twice_hold_the_same_numbers() -> None:
    model = tiny_model(
        decoder="group",
        joint_decoder_layers=0,
        loss_heatmap=0.0,
        num_one_to_many_queries=0,
        leading_columns=1,
        neck_bias=True,
    )
    official = to_official(model)
    twice = [name for name in official if name.startswith("transformer.decoder.class_embed.")]
    assert len(twice) == 2 * model.config.decoder_layers
    assert all(torch.equal(official[name], official[name.removeprefix("transformer.decoder.")]) for name in twice)
    back = from_official(official, model.config)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in back.items())
    official[twice[0]] += 1
    with pytest.raises(InputError, match=rf"'{twice[0]}' differs from the other one of the same head"):
        from_official(official, model.config)


def test_numbers_that_are_not_finite(state) -> None:
    state = {**state, "backbone.bn1.bias": torch.full((64,), torch.inf)}
    with pytest.raises(InputError, match="'backbone.bn1.bias' holds NaN or infinity"):
        load_official(state, "petr-r50")


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (Bomb.target,))

    target = ""


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    path, Bomb.target = tmp_path / "evil.pth", str(tmp_path / "executed")
    torch.save({"state_dict": Bomb()}, path)
    with pytest.raises(InputError, match=r"evil.pth: holds pickled objects.*nothing in it was executed"):
        load_official(path, "petr-r50")
    assert not (tmp_path / "executed").exists()


def test_files_that_are_no_checkpoints(tmp_path: Path, state) -> None:
    with pytest.raises(InputError, match=r"none.pth: no such file"):
        load_official(tmp_path / "none.pth", "petr-r50")
    (tmp_path / "empty.pth").touch()
    with pytest.raises(InputError, match="empty.pth"):
        load_official(tmp_path / "empty.pth", "petr-r50")
    whole = tmp_path / "whole.pth"
    torch.save(state, whole)
    (tmp_path / "half.pth").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(InputError, match="half.pth"):
        load_official(tmp_path / "half.pth", "petr-r50")
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other.pth: expected a state dict"):
        load_official(tmp_path / "other.pth", "petr-r50")


def test_unfold_order() -> None:
    """nn.Unfold's channel-major 2 x 2 patches against four strided patches, columns first."""
    x = torch.randn(1, 3, 4, 6)
    unfolded = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2)  # (1, patches, 3 * 4)
    strided = torch.cat([x[:, :, row::2, col::2] for col in range(2) for row in range(2)], 1)
    torch.testing.assert_close(unfolded[..., unfold_order(3)], strided.flatten(2).transpose(1, 2))
    torch.testing.assert_close(unfolded[..., unfold_order(3)][..., unfold_order(3, inverse=True)], unfolded)
