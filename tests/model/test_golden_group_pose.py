"""The numbers of Group Pose's official code."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import golden_inputs
from hpetr.checkpoints.official import load_official
from model.golden_checks import check_there_and_back, masked_image, official_gradients, training_batch
from paths import GOLDEN

KEYS = json.loads((GOLDEN / "official_keys_group_pose.json").read_text())
PARAMETERS = {  # counted on the official modules, whose batch norms have no parameters
    "group-pose-r50": 49_318_396,
    "group-pose-swin-t": 49_861_430,
    "group-pose-swin-l": 219_655_280,
    "group-pose-swin-l-crowdpose": 219_651_434,
}


def checkpoint(name: str, *, negate: bool = True) -> dict[str, torch.Tensor]:
    """Return official weights: heads equal under both names; a bias negated, so that few tokens are equal."""
    state = golden_inputs.fill(KEYS[name])
    for key in state:
        if key.startswith(("transformer.decoder.class_embed.", "transformer.decoder.pose_embed.")):
            state[key] = state[key.removeprefix("transformer.decoder.")].clone()
    if negate:
        state["transformer.enc_output.bias"] = -state["transformer.enc_output.bias"]
    return state


@pytest.fixture(scope="module", params=["group-pose-r50", "group-pose-swin-t"])
def golden(request: pytest.FixtureRequest):
    """Name, model with the golden weights, arrays, settings."""
    name = request.param
    model = load_official(checkpoint(name), name)
    return name, model, np.load(GOLDEN / f"{name}.npz"), json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.mark.parametrize("case", ["a", "b"])
def test_inference(golden, case: str) -> None:
    _, model, arrays, settings = golden
    setting = settings["inference"][case]
    pixels, mask = masked_image(setting)
    with torch.inference_mode():
        maps, _, _ = model.backbone(pixels, mask == 0)
        output = model(pixels, mask)
    neck = torch.stack([level[0, :8, 0, 0] for level in maps])
    np.testing.assert_allclose(neck, arrays[f"{case}_neck"], atol=1e-4)
    np.testing.assert_allclose(output.proposal_logits[0], arrays[f"{case}_proposal_logits"], atol=1e-4)
    order = output.proposal_logits[0].amax(-1).topk(100).indices
    np.testing.assert_array_equal(order, arrays[f"{case}_proposal_order"])
    np.testing.assert_allclose(output.decoder_logits[:, 0], arrays[f"{case}_decoder_logits"], atol=1e-4)
    stored = arrays[f"{case}_decoder_keypoints"]  # the first 8 queries
    keypoints = output.decoder_keypoints[:, 0, : stored.shape[1]].flatten(2)
    np.testing.assert_allclose(keypoints, stored, atol=1e-5)
    size = np.array([setting["w"], setting["h"]], dtype=np.float32) * 2
    order = np.argsort(-arrays[f"{case}_person_scores"], kind="stable")
    np.testing.assert_allclose(output.scores[0], arrays[f"{case}_person_scores"][order], atol=1e-5)
    np.testing.assert_allclose(output.poses[0].numpy() * size, arrays[f"{case}_person_keypoints"][order], atol=1e-2)


def test_invalid_tokens_compete() -> None:
    """Tokens on padding and at the border share one feature: where it ranks high, they become equal queries."""
    setting = json.loads((GOLDEN / "group-pose-r50.json").read_text())["inference"]["c"]
    model = load_official(checkpoint("group-pose-r50", negate=False), "group-pose-r50")
    with torch.inference_mode():
        scores = model(*masked_image(setting)).decoder_logits[-1, 0, :, 1].sigmoid().sort(descending=True).values
    np.testing.assert_allclose(scores, np.load(GOLDEN / "group-pose-r50.npz")["c_person_scores"], atol=1e-5)


def our_term(official: str) -> str:
    _, kind, *rest = official.split("_")
    part = rest[0] if rest else "5"
    kind = {"ce": "class", "keypoints": "l1", "oks": "oks"}[kind]
    return f"proposal.{kind}" if part == "interm" else f"decoder.{part}.{kind}"


def test_training_step(golden) -> None:
    _, model, _, settings = golden
    step = settings["training"]
    pixels, mask, labels = training_batch(step)
    model.zero_grad()
    output = model(pixels, mask, labels)  # evaluation mode: no drop-path
    output.loss.backward()
    assert {our_term(name) for name in step["terms"]} == set(output.loss_dict)
    for term, value in step["terms"].items():
        assert output.loss_dict[our_term(term)].item() == pytest.approx(value, rel=1e-5), term
    assert output.loss.item() == pytest.approx(step["total"], rel=1e-5)

    official = official_gradients(model)
    for parameter, norm in step["grad_norms"].items():
        assert official[parameter].norm().item() == pytest.approx(norm, rel=2e-3, abs=1e-7), parameter
    model.zero_grad()


@pytest.mark.parametrize("name", PARAMETERS)
def test_official_checkpoint_there_and_back(name: str) -> None:
    check_there_and_back(checkpoint(name), name, PARAMETERS[name])


def test_trained_parameters() -> None:
    model = load_official(checkpoint("group-pose-r50"), "group-pose-r50")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 49_095_996
