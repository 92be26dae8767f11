from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from hpetr.data import HPetrImageProcessor, PoseCollator, Sample


def make_sample(height, width, people, k=4):
    rng = np.random.default_rng(height)
    return Sample(
        image=rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        keypoints=rng.uniform(0, 50, (people, k, 3)).astype(np.float32),
        boxes=np.zeros((people, 4), np.float32),
        areas=np.ones(people, np.float32),
        class_labels=np.zeros(people, np.int64),
        ignore_boxes=np.ones((1, 4), np.float32),
        image_id=height,
        path=Path(f"{height}.png"),
    )


def test_batch_has_the_processors_pixels_and_the_samples_labels():
    processor = HPetrImageProcessor(size={"shortest_edge": 80, "longest_edge": 120}, pad_size_divisor=32)
    samples = [make_sample(80, 100, 2), make_sample(120, 80, 0)]  # of these sizes, the processor's resize does nothing
    collator = PoseCollator.from_processor(processor)
    batch = collator(samples)
    expected = processor([sample.image for sample in samples])
    assert batch["pixel_values"].dtype == torch.uint8
    pixels = collator.normalize(batch["pixel_values"], batch["pixel_mask"])
    torch.testing.assert_close(pixels, expected["pixel_values"], rtol=1e-6, atol=1e-6)
    assert torch.equal(batch["pixel_mask"], expected["pixel_mask"] != 0)
    assert not batch["pixel_values"].mul(~batch["pixel_mask"][:, None]).any()
    first, second = batch["labels"]
    assert torch.equal(first["keypoints"], torch.from_numpy(samples[0].keypoints))
    assert (first["boxes"].shape, first["areas"].shape, first["ignore_boxes"].shape) == ((2, 4), (2,), (1, 4))
    assert first["class_labels"].dtype == torch.int64
    assert batch["images"] == [(80, "80.png"), (120, "120.png")]
    assert second["keypoints"].shape == (0, 4, 3)
    assert second["boxes"].shape == (0, 4)


def test_defaults_are_the_default_processors():
    theirs, ours = PoseCollator.from_processor(HPetrImageProcessor()), PoseCollator()
    batch = ours([make_sample(70, 70, 1)])
    pixels, mask = batch["pixel_values"], batch["pixel_mask"]
    assert theirs.normalize(pixels, mask).equal(ours.normalize(pixels, mask))
    assert theirs.pad_size_divisor == ours.pad_size_divisor


def test_worker_processes_give_the_same_batches():
    samples = [make_sample(80, 100, 2), make_sample(120, 80, 0), make_sample(90, 70, 1)]
    collator = PoseCollator((0.4, 0.5, 0.6), (0.2, 0.2, 0.2), 32)
    here, there = (list(DataLoader(samples, 2, collate_fn=collator, num_workers=workers)) for workers in (0, 1))
    assert len(here) == len(there) == 2
    for expected, batch in zip(here, there, strict=True):
        assert type(batch) is dict
        assert batch["images"] == expected["images"]
        for key in ("pixel_values", "pixel_mask"):
            assert batch[key].equal(expected[key])
            assert batch[key].dtype == expected[key].dtype
        for labels, expected_labels in zip(batch["labels"], expected["labels"], strict=True):
            assert labels.keys() == expected_labels.keys()
            assert all(labels[name].equal(value) for name, value in expected_labels.items())
