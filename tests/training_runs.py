"""Very small training runs for tests: real images, every part of the model, some milliseconds a step."""

from __future__ import annotations

from pathlib import Path

import yaml

from hpetr.training.recipe import Recipe, load_recipe
from paths import ROOT

TINY = ROOT / "examples" / "tiny-coco" / "annotations.json"
# What the published models have in the places where h-petr-nano differs.
PUBLISHED_DESIGN = {
    "pose_prior": 0,
    "encoder_first_level": 0,
    "neck_norm": "group",
    "queries": "learned",
    "steps": "logit",
    "class_target": "one",
    "oks_loss": "log",
}
SMALL_MODEL = {
    **PUBLISHED_DESIGN,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"],
    },
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_layers": 1,
    "decoder_ffn_dim": 32,
    "joint_decoder_layers": 1,
    "joint_decoder_ffn_dim": 32,
    "keypoint_head_dim": 32,
    "num_queries": 20,
    "num_one_to_many_queries": 20,
    "num_poses": 10,
}


def small_recipe(output: Path, *overrides: str) -> Recipe:
    """Two epochs of the four example images at 64 pixels, a checkpoint after each of the four steps."""
    return load_recipe(
        ROOT / "recipes" / "h-petr-nano.yaml",
        [
            f"output={output}",
            f"data.train.0.annotations={TINY}",
            "model.weights=none",
            f"model.options={yaml.safe_dump(SMALL_MODEL, default_flow_style=True, width=10_000)}",
            "augment.short_sides=[48, 64]",
            "augment.long_side=64",
            "processor.shortest_edge=64",
            "processor.longest_edge=64",
            "train.epochs=2",
            "train.total_batch_size=2",
            "train.warmup_steps=0",
            "train.workers=0",
            "train.log_every=1",
            "train.save_every=1",
            "train.keep=2",
            *overrides,
        ],
    )
