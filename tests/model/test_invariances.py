"""What must not matter: how images are batched, what lies in the padding, how few or many people there are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hpetr import HPetrConfig, HPetrForPoseEstimation, InputError

SIZES = [(96, 128), (80, 112), (128, 72)]  # height, width
PADDED = (128, 128)


def small_model(**overrides) -> HPetrForPoseEstimation:
    """h-petr-nano, whose prior, heads and scores say something."""
    torch.manual_seed(0)
    config = HPetrConfig.preset("h-petr-nano", num_queries=30, num_one_to_many_queries=60, num_poses=10, **overrides)
    model = HPetrForPoseEstimation(config)
    for name, parameter in model.named_parameters():
        if any(
            part in name for part in ("_heads.", "joint_decoder.heads", "sampling_offsets", "prior.projection.weight")
        ):
            torch.nn.init.normal_(parameter, std=0.05)  # the zeros of a fresh model would hide mistakes
    return model.eval()


def label(people: int, height: int, width: int, seed: int, joints: int = 17) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([width, height])
    xy = torch.rand(people, joints, 2, generator=generator) * size
    visible = (torch.rand(people, joints, 1, generator=generator) > 0.3).float() * 2
    visible[:, 0] = 2
    return {
        "keypoints": torch.cat([xy * (visible > 0), visible], -1),
        "boxes": torch.cat([xy.amin(1), xy.amax(1)], -1),
        "areas": torch.full((people,), 900.0),
        "class_labels": torch.zeros(people, dtype=torch.long),
    }


def images(sizes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Random images padded to one size, and their mask."""
    pixels, mask = torch.zeros(len(sizes), 3, *PADDED), torch.zeros(len(sizes), *PADDED, dtype=torch.long)
    for i, (height, width) in enumerate(sizes):
        generator = torch.Generator().manual_seed(i)
        pixels[i, :, :height, :width] = torch.randn(3, height, width, generator=generator)
        mask[i, :height, :width] = 1
    return pixels, mask


def test_batch_gives_what_singles_give() -> None:
    model = small_model()
    pixels, mask = images(SIZES)
    with torch.inference_mode():
        batch = model(pixels, mask)
        for i in range(len(SIZES)):
            single = model(pixels[i : i + 1], mask[i : i + 1])
            torch.testing.assert_close(batch.scores[i], single.scores[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(batch.poses[i], single.poses[0], atol=1e-4, rtol=1e-4)


def test_losses_of_a_batch_are_the_counted_mean_of_the_singles() -> None:
    """Every term is a sum divided by a count; sums and counts of a batch are those of its images."""
    model = small_model()
    pixels, mask = images(SIZES)
    people = [3, 1, 2]
    labels = [label(n, *size, seed=i) for i, (n, size) in enumerate(zip(people, SIZES, strict=True))]
    joints = [int((entry["keypoints"][..., 2] > 0).sum()) for entry in labels]
    with torch.no_grad():
        batch = model(pixels, mask, labels).loss_dict
        singles = [model(pixels[i : i + 1], mask[i : i + 1], labels[i : i + 1]).loss_dict for i in range(len(SIZES))]
    for name, value in batch.items():
        if name == "heatmap":
            continue  # divided by its peaks, which can coincide; tested below
        counts = joints if name.endswith("l1") else people
        # decoder terms add both groups, whose counts are n and k * n: the same weights
        expected = sum(s[name] * c for s, c in zip(singles, counts, strict=True)) / sum(counts)
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5, msg=name)


def test_content_of_the_padding_changes_nothing() -> None:
    model = small_model()
    pixels, mask = images(SIZES)
    garbage = torch.where(mask[:, None].bool(), pixels, torch.full_like(pixels, 1e4))
    with torch.inference_mode():
        clean, dirty = model(pixels, mask), model(garbage, mask)
    torch.testing.assert_close(clean.poses, dirty.poses)
    torch.testing.assert_close(clean.scores, dirty.scores)


def test_mask_without_padding_equals_no_mask() -> None:
    """A whole image gives the same alone, with a mask of ones, and beside a padded image, where masks count."""
    model = small_model()
    pixels, mask = torch.randn(2, 3, 96, 128), torch.ones(2, 96, 128)
    mask[1, :, 100:] = 0
    with torch.inference_mode():
        alone = model(pixels[:1]).poses
        torch.testing.assert_close(model(pixels[:1], mask[:1]).poses, alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model(pixels, mask).poses[:1], alone, atol=1e-5, rtol=1e-4)


def test_transformer_is_independent_of_padding() -> None:
    """Given the same features of the image, more padding changes neither positions nor references nor memory.

    The convolutions see padding beyond the image's border, as in the official code, so whole-network results move.
    """
    from hpetr.model.grid import make_grid

    model = small_model()
    generator = torch.Generator().manual_seed(0)
    shapes, extra = [(12, 10), (6, 5), (3, 3)], 3
    maps = [torch.randn(1, 128, h, w, generator=generator) for h, w in shapes]
    wide = [torch.nn.functional.pad(m, (0, extra, 0, extra), value=5.0) for m in maps]
    masks = [torch.ones(1, h + extra, w + extra, dtype=torch.bool) for h, w in shapes]
    for mask, (h, w) in zip(masks, shapes, strict=True):
        mask[:, :h, :w] = False

    def encode(levels, level_masks):
        grid = make_grid(levels, level_masks)
        tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in levels], 1)
        return model.encoder(tokens, grid.positions, grid), grid

    with torch.inference_mode():
        plain, plain_grid = encode(maps, None)
        padded, padded_grid = encode(wide, masks)
    inside = ~padded_grid.padding_mask[0]
    torch.testing.assert_close(padded_grid.centers[:, inside], plain_grid.centers)
    torch.testing.assert_close(padded[:, inside], plain, atol=1e-4, rtol=1e-4)


def test_one_to_many_queries_change_nothing_at_inference() -> None:
    model = small_model()
    pixels, mask = images(SIZES)
    labels = [label(2, *size, seed=i) for i, size in enumerate(SIZES)]
    with torch.no_grad():
        alone, beside = model(pixels, mask), model(pixels, mask, labels)
    torch.testing.assert_close(alone.decoder_keypoints, beside.decoder_keypoints, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(alone.scores, beside.scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(alone.poses, beside.poses, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("people", [[0, 0], [0, 3], [40, 1]])
def test_nobody_and_more_people_than_queries(people: list[int]) -> None:
    """30 one-to-one queries; every parameter that learns gets a finite gradient even without people."""
    model = small_model().train()
    pixels, mask = images(SIZES[:2])
    labels = [label(n, *size, seed=i) for i, (n, size) in enumerate(zip(people, SIZES, strict=False))]
    output = model(pixels, mask, labels)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
    if not any(people):
        assert output.loss_dict["decoder.1.l1"] == 0
        assert output.loss_dict["joint.0.oks"] == 0
        assert output.loss_dict["proposal.class"] > 0


def test_one_visible_keypoint() -> None:
    """The L1 loss moves the labelled joint alone."""
    model = small_model()
    pixels, mask = images(SIZES[:1])
    one = label(1, *SIZES[0], seed=0)
    one["keypoints"][:, 1:] = 0
    output = model(pixels, mask, [one])
    last = model.pose_decoder.keypoint_heads[1][-1].bias
    gradient = torch.autograd.grad(output.loss_dict["decoder.1.l1"], last, retain_graph=True)[0].view(17, 2)
    assert (gradient[0] != 0).all()
    assert (gradient[1:] == 0).all()
    assert torch.isfinite(output.loss)


def test_ignore_boxes_take_background_out_of_the_loss() -> None:
    """A box over the whole image leaves only the matched queries in the class loss."""
    model = small_model()
    pixels, mask = images(SIZES[:1])
    plain = label(1, *SIZES[0], seed=0)
    everywhere = {**plain, "ignore_boxes": torch.tensor([[-1e4, -1e4, 1e4, 1e4]])}
    nowhere = {**plain, "ignore_boxes": torch.zeros(0, 4)}
    with torch.no_grad():
        terms = [model(pixels, mask, [entry]).loss_dict for entry in (plain, nowhere, everywhere)]
    torch.testing.assert_close(terms[0], terms[1])
    assert terms[2]["proposal.class"] < terms[0]["proposal.class"]
    assert terms[2]["heatmap"] == 0
    torch.testing.assert_close(terms[2]["decoder.1.l1"], terms[0]["decoder.1.l1"])


@pytest.mark.parametrize("joints", [1, 4, 21])
def test_other_skeletons(joints: int) -> None:
    model = small_model(num_keypoints=joints)
    pixels, mask = images(SIZES)
    labels = [label(2, *size, seed=i, joints=joints) for i, size in enumerate(SIZES)]
    output = model(pixels, mask, labels)
    assert output.poses.shape == (3, 10, joints, 2)
    assert output.keypoints.shape == (3, 30, joints, 2)
    assert torch.isfinite(output.loss)


def test_pixels_that_are_not_normalized() -> None:
    with pytest.raises(InputError, match=r"pixel_values: torch.uint8, expected normalized floats"):
        small_model()(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_several_classes() -> None:
    model = small_model(num_labels=3)
    pixels, mask = images(SIZES[:1])
    entry = label(2, *SIZES[0], seed=0)
    entry["class_labels"] = torch.tensor([2, 1])
    output = model(pixels, mask, [entry])
    assert output.logits.shape[-1] == 3
    assert output.pose_labels.max() < 3
    assert (output.scores.diff(dim=1) <= 0).all()
    assert torch.isfinite(output.loss)


def test_image_with_fewer_tokens_than_queries() -> None:
    model = small_model()
    with torch.inference_mode():
        output = model(torch.randn(1, 3, 32, 32))  # 16 + 4 + 1 tokens
    assert output.logits.shape[1] == 21
    assert output.poses.shape[1] == 10


def test_save_and_load(tmp_path) -> None:
    """A folder gives the same model back, through the Auto classes too."""
    from transformers import AutoModelForKeypointDetection

    model = small_model()
    model.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 64, 96)
    for loaded in (
        HPetrForPoseEstimation.from_pretrained(tmp_path),
        AutoModelForKeypointDetection.from_pretrained(tmp_path),
    ):
        with torch.inference_mode():
            torch.testing.assert_close(loaded.eval()(pixels).poses, model(pixels).poses)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("areas", torch.ones(3), r"labels\[0\].areas: shape \(3,\), expected \(2,\)"),
        ("keypoints", torch.ones(2, 16, 3), r"labels\[0\].keypoints: shape \(2, 16, 3\), expected \(2, 17, 3\)"),
        ("boxes", None, r"labels\[0\]: field 'boxes' is missing"),
    ],
)
def test_bad_labels(field: str, value: Tensor | None, message: str) -> None:
    model = small_model()
    entry = label(2, 64, 64, seed=0)
    del entry[field]
    if value is not None:
        entry[field] = value
    with pytest.raises(InputError, match=message):
        model(torch.randn(1, 3, 64, 64), None, [entry])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_querys": 3}, "unknown option 'num_querys'"),
        ({"num_heads": 7}, "d_model = 128"),
        ({"num_keypoints": 3, "skeleton": {"names": ["a"]}}, "num_keypoints = 3"),
    ],
)
def test_bad_configuration(overrides: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        HPetrConfig.preset("h-petr-nano", **overrides)
    with pytest.raises(InputError, match="unknown name 'petr-r34', did you mean 'petr-r50'"):
        HPetrConfig.preset("petr-r34")
