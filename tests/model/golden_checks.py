"""What the golden tests of all models share: the stored cases as input, and gradients under the official names."""

from __future__ import annotations

import torch

import golden_inputs
from hpetr import HPetrForPoseEstimation
from hpetr.checkpoints.official import load_official, to_official


def masked_image(case: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pixels (1, 3, H, W) and pixel mask (1, H, W) of a stored case."""
    pixels = golden_inputs.image(case["h"], case["w"], case["seed"], case["ph"], case["pw"])
    mask = torch.zeros(1, case["ph"], case["pw"], dtype=torch.long)
    mask[:, : case["h"], : case["w"]] = 1
    return pixels, mask


def training_batch(step: dict) -> tuple[torch.Tensor, torch.Tensor, list[dict]]:
    """Return pixels (B, 3, H, W), pixel mask (B, H, W) and labels of a stored training step."""
    pixels, masks, labels = [], [], []
    for i, (height, width, people, seed) in enumerate(step["sizes"]):
        case = {"h": height, "w": width, "ph": step["ph"], "pw": step["pw"], "seed": step["seed0"] + i}
        image, mask = masked_image(case)
        boxes, keypoints, areas = golden_inputs.ground_truth(people, height, width, seed)
        classes = torch.zeros(people, dtype=torch.long)
        labels.append({"boxes": boxes, "keypoints": keypoints, "areas": areas, "class_labels": classes})
        pixels.append(image)
        masks.append(mask)
    return torch.cat(pixels), torch.cat(masks), labels


def official_gradients(model: HPetrForPoseEstimation) -> dict[str, torch.Tensor]:
    """Return the gradients of a model under the official names; 0 where a parameter has none."""
    gradients = HPetrForPoseEstimation(model.config)
    with torch.no_grad():
        for target, source in zip(gradients.parameters(), model.parameters(), strict=True):
            target.copy_(torch.zeros_like(target) if source.grad is None else source.grad)
    return to_official(gradients)


def check_there_and_back(state: dict[str, torch.Tensor], name: str, parameters: int) -> None:
    """Nothing missing, nothing unexpected, bit for bit the same on the way back; and the published size."""
    model = load_official(state, name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    back = to_official(model)
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(back[key], tensor), key
