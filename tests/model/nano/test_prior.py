"""Poses that a backbone knows by itself, and heads that count in pixels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hpetr import HPetrConfig, HPetrForPoseEstimation, InputError
from hpetr.checkpoints.movenet_weights import fill_prior
from hpetr.model.backbones.movenet import HEADS, MoveNetBackbone, MoveNetConfig
from hpetr.model.grid import Grid, make_grid
from hpetr.model.nano.prior import FLOOR, PosePrior, Prior, PriorMaps
from hpetr.model.nano.settings import NanoSettings
from hpetr.model.nano.steps import SizeSteps, half_extent
from hpetr.model.proposals import Proposals

SETTINGS = NanoSettings()
HEIGHT, WIDTH = 24, 32  # cells of the prior: two for each token of the finest level


SHAPES = [(12, 16), (6, 8)]  # of the levels' tokens


def prior_maps(joints: int = 3, height: int = HEIGHT, width: int = WIDTH) -> PriorMaps:
    """Nothing seen anywhere."""
    return PriorMaps(
        centers=torch.full((1, 1, height, width), FLOOR),
        steps=torch.zeros(1, 2 * joints, height, width),
        heat=torch.full((1, joints, height, width), -20.0),
        offsets=torch.zeros(1, 2 * joints, height, width),
    )


def grid_of(valid: tuple[int, int] | None = None) -> Grid:
    """Two levels of 12 x 16 and 6 x 8 tokens, of which `valid` (height, width in cells of the prior) are image."""
    maps = [torch.zeros(1, 8, *shape) for shape in SHAPES]
    if valid is None:
        return make_grid(maps, None)
    inside = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
    inside[:, : valid[0], : valid[1]] = True
    masks = [~inside[:, ::size, ::size] for size in (2, 4)]
    return make_grid(maps, masks, torch.tensor([[valid[1] / WIDTH, valid[0] / HEIGHT]]))


def snapped(maps: PriorMaps, pose: Tensor, valid: tuple[int, int] | None = None) -> Tensor:
    """A pose (K, 2) in cells of the finest level's maps, after it snapped to them."""
    height, width = valid or (HEIGHT, WIDTH)
    size = torch.tensor([width, height])
    prior = Prior.from_maps([maps], SHAPES, SETTINGS)
    return prior.snap((pose / size)[None, None], torch.tensor([[0]]), grid_of(valid))[0, 0] * size


@pytest.mark.parametrize("valid", [None, (20, 27)])
def test_joints_snap_to_the_best_place_near_by(valid: tuple[int, int] | None) -> None:
    maps = prior_maps()
    maps.heat[0, 0, 10, 20], maps.offsets[0, :2, 10, 20] = 3.0, torch.tensor([0.25, -0.5])
    maps.heat[0, 1, 10, 10 + 2 * SETTINGS.reach + 2] = 3.0  # out of reach
    maps.heat[0, 2, 10, 14] = maps.heat[0, 2, 10, 18] = 1.0  # the nearer one counts
    found = snapped(maps, torch.tensor([[17.5, 12.5], [10.5, 10.5], [15.5, 10.5]]), valid)
    torch.testing.assert_close(found, torch.tensor([[20.75, 10.0], [10.5, 10.5], [14.5, 10.5]]))


def test_joints_of_large_people_snap_from_further_away() -> None:
    """A clear peak 8 cells away outweighs a faint one beside the joint, if the person is large."""
    maps = prior_maps()
    maps.heat[0, 2, 10, 20], maps.heat[0, 2, 10, 12] = 3.0, -2.0
    for reach, expected in ((4.0, 12.5), (20.0, 20.5)):
        pose = torch.tensor([[4.5, 2.5], [4.5 + reach, 2.5 + reach], [4.5, 2.5]])
        torch.testing.assert_close(snapped(maps, pose + 8)[2], torch.tensor([expected, 10.5]))


def test_neighbors_of_the_best_cell_vote_by_their_scores() -> None:
    maps = prior_maps()
    maps.heat[0, 0, 11, 13], maps.heat[0, 0, 12, 14] = 1.0, 0.0
    maps.heat[0, 0, 11, 15] = 0.5  # no neighbor
    maps.offsets[0, 0, 12, 14] = -1.5
    found = snapped(maps, torch.tensor([[13.5, 11.5]] * 3))[0]
    first, second = torch.tensor([1.0, 0.0]).sigmoid()
    places = first * torch.tensor([13.5, 11.5]) + second * torch.tensor([14.5 - 1.5, 12.5])
    torch.testing.assert_close(found, places / (first + second))


def test_poses_outside_the_image_snap_to_its_edge_or_stay() -> None:
    maps = prior_maps()
    maps.heat[0, 0, 0, 0] = 3.0
    pose = torch.tensor([[-0.6, -0.5], [-90.0, 200.0], [48.0, 12.0]])
    found = snapped(maps, pose)
    torch.testing.assert_close(found[0], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(found[1:], pose[1:])


def test_every_pose_snaps_to_the_maps_of_its_level() -> None:
    """The same place, proposed by tokens of three levels, of which the last has no maps and reads the coarser ones."""
    fine, coarse = prior_maps(), prior_maps(height=HEIGHT // 2, width=WIDTH // 2)
    fine.heat[0, 0, 10, 12], fine.offsets[0, 0, 10, 12] = 3.0, 0.25
    coarse.heat[0, 0, 6, 7], coarse.offsets[0, 1, 6, 7] = 3.0, -0.5
    shapes = [*SHAPES, (3, 4)]
    prior = Prior.from_maps([fine, coarse], shapes, SETTINGS)
    grid = make_grid([torch.zeros(1, 8, *shape) for shape in shapes], None)
    pose = torch.tensor([[12.5, 11.5]] * 3) / torch.tensor([WIDTH, HEIGHT])
    tokens = torch.tensor([[0, 12 * 16 - 1, 12 * 16, 12 * 16 + 6 * 8]])
    found = prior.snap(pose.expand(1, 4, -1, -1), tokens, grid)[0, :, 0] * torch.tensor([WIDTH, HEIGHT])
    torch.testing.assert_close(found, torch.tensor([[12.75, 10.5]] * 2 + [[15.0, 12.0]] * 2))


def test_of_two_levels_the_one_that_knows_a_persons_size_claims_more() -> None:
    """A person of equal centers in both levels' maps, small, of the size where both claim as much, and large."""
    gaps = []
    for size in (4.0, 2 * SETTINGS.border_size, 160.0):  # sides in cells of the finer maps
        levels = []
        for scale in (1, 2):
            maps = prior_maps(height=HEIGHT // scale, width=WIDTH // scale)
            maps.centers[:] = 2.0
            maps.steps[:, 2:4] = size / scale
            levels.append(maps)
        fine, coarse = Prior.from_maps(levels, SHAPES, SETTINGS).logits[0, :, 0].split([12 * 16, 6 * 8])
        gaps.append(float(fine[0] - coarse[0]))
    assert gaps[0] > 2
    assert abs(gaps[1]) < 1e-5
    assert gaps[2] < -2


def test_tokens_take_the_best_middle_and_lose_beside_a_better_one() -> None:
    maps = prior_maps()
    maps.centers[0, 0, 8, 8], maps.centers[0, 0, 9, 10] = 2.0, 1.0  # tokens (4, 4) and (4, 5)
    maps.steps[0, 0, 8:10, 8:10] = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    prior = Prior.from_maps([maps], SHAPES, SETTINGS)
    logits, steps = prior.logits, prior.steps
    assert logits.shape == (1, 12 * 16 + 6 * 8, 1)
    best = logits[0, :, 0].topk(2)
    assert best.indices.tolist() == [4 * 16 + 4, 4 * 16 + 5]
    torch.testing.assert_close(best.values, torch.tensor([2.0, 1.0 - 3 * (2.0 - 1.0)]))
    assert steps[0, 4 * 16 + 4, 0] == 3
    torch.testing.assert_close(logits[0, 12 * 16 :], torch.full((48, 1), FLOOR))


def test_movenets_heads_become_the_prior() -> None:
    """Row by row what the heads say, x before y, counted from the cells' centers; one joint of three is none of its."""
    torch.manual_seed(0)
    body = MoveNetBackbone(MoveNetConfig(out_features=["heads4"])).eval()
    prior = PosePrior(HPetrConfig(num_keypoints=3), body.channels[0])
    torch.nn.init.zeros_(prior.projection.weight)
    prior.projection.bias.data = prior.initial_bias()
    fill_prior(prior, {0: 9, 2: 16})
    with torch.no_grad():
        finest = body(torch.randn(1, 3, 64, 96)).feature_maps[0]
        outputs = dict(zip(HEADS, finest[:, 24:].split([n for n, _ in HEADS.values()], 1), strict=True))
        heads = {name: output / HEADS[name][1] for name, output in outputs.items()}
        maps = prior(finest)
    torch.testing.assert_close(maps.centers, heads["center"])
    torch.testing.assert_close(maps.heat[:, [0, 2]], heads["heatmap"][:, [9, 16]])
    torch.testing.assert_close(maps.steps[:, 4:], heads["regress"][:, [33, 32]] - 0.5)
    torch.testing.assert_close(maps.offsets[:, :2], heads["offset"][:, [19, 18]] - 0.5)
    torch.testing.assert_close(maps.heat[:, 1], torch.full_like(maps.heat[:, 1], FLOOR))
    assert not maps.steps[:, 2:4].any()


def proposals(cells: tuple[int, int], head: torch.nn.Module, features: Tensor) -> Tensor:
    """Pixels of the pose that the token in row 2, column 3 proposes on a map of stride 8."""
    grid = make_grid([torch.zeros(1, 8, *cells)], None)
    found = Proposals(
        logits=torch.zeros(1, cells[0] * cells[1], 1),
        features=features.expand(1, cells[0] * cells[1], -1),
        valid=torch.ones(1, cells[0] * cells[1], 1, dtype=torch.bool),
        centers=grid.centers,
        head=head,
        steps=SizeSteps(SETTINGS),
        unit=grid.cells_of_tokens(),
        first_logits=torch.zeros(1, cells[0] * cells[1], 1),
    )
    pose = found.keypoints_at(torch.tensor([[0]]), torch.tensor([[2 * cells[1] + 3]]))[0, 0]
    return pose * torch.tensor([cells[1] * 8, cells[0] * 8])


def test_steps_in_cells_are_the_same_pixels_in_every_image() -> None:
    """The published steps of logits are not: they depend on place and size, which a small model has to learn."""
    torch.manual_seed(0)
    head, features = torch.nn.Linear(8, 6), torch.randn(8)
    torch.testing.assert_close(
        proposals((6, 8), head, features), proposals((20, 15), head, features), atol=1e-3, rtol=1e-4
    )


def test_half_extent_has_a_least() -> None:
    poses = torch.tensor([[[0.2, 0.5], [0.6, 0.5]]])
    torch.testing.assert_close(half_extent(poses, torch.tensor(0.01)), torch.tensor([[[0.2, 0.01]]]))


def test_padding_by_a_part_of_a_cell_moves_no_reference() -> None:
    """Of 27 of 32 cells 13.5 tokens are image: whole tokens, as published, would stretch it by half a token."""
    grid = grid_of((20, 27))
    torch.testing.assert_close(grid.cells[0, 0], torch.tensor([2 / 27, 2 / 20]))
    torch.testing.assert_close(grid.valid_ratios[0], torch.tensor([[27 / 32, 20 / 24]] * 2))


def test_nothing_is_claimed_before_training() -> None:
    torch.manual_seed(0)
    model = HPetrForPoseEstimation(HPetrConfig.preset("h-petr-nano", num_queries=20, num_poses=5)).eval()
    with torch.inference_mode():
        output = model(torch.randn(1, 3, 96, 128))
    assert output.scores.max() < 0.02


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"steps": "pixels"}, "steps is 'pixels', expected logit or size"),
        ({"class_target": "iou"}, "class_target is 'iou', expected one or oks"),
        ({"pose_prior": 1}, "pose_prior with steps = 'logit' and queries = 'learned'"),
        ({"pose_prior": True}, "pose_prior is True, expected a whole number"),
        ({"pose_prior": 5}, "pose_prior = 5 with num_feature_levels = 4"),
        ({"encoder_first_level": 4}, "encoder_first_level = 4 with num_feature_levels = 4"),
    ],
)
def test_bad_choices(overrides: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        HPetrConfig.preset("h-petr-r50", **overrides)


def test_place_loss_teaches_cell_offset_and_step() -> None:
    """A keypoint in a cell that is not the best one: its heat and offsets, and the search's center, move towards it."""
    maps = prior_maps()
    maps.heat[0, 0, 10, 14] = 2.0  # another person's
    maps.heat[0, 0, 10, 20] = -1.0
    heat, offsets = maps.heat.requires_grad_(), maps.offsets.requires_grad_()
    prior, size = Prior.from_maps([maps], SHAPES, SETTINGS), torch.tensor([WIDTH, HEIGHT])
    pose = (torch.tensor([[[17.5, 10.5]] * 3]) / size).requires_grad_()
    truth = torch.tensor([20.75, 10.5])

    def likelihoods(places: Tensor, chosen: Tensor) -> Tensor:
        assert chosen.tolist() == [0]
        return -((places * size - truth) ** 2).sum(-1)

    zero = torch.zeros(1, dtype=torch.long)
    loss = prior.place_loss(pose, zero, zero, grid_of(), likelihoods)
    assert loss.shape == (1, 3)
    loss[0, 0].backward()
    assert heat.grad is not None
    assert heat.grad[0, 0, 10, 20] < 0 < heat.grad[0, 0, 10, 14]
    assert offsets.grad is not None
    assert offsets.grad[0, 0, 10, 20] < 0  # to the right
    assert pose.grad is not None
    assert pose.grad[0, 0, 0] < 0
    level_without_maps = torch.tensor([SHAPES[0][0] * SHAPES[0][1]])
    assert prior.place_loss(pose, zero, level_without_maps, grid_of(), likelihoods).sum() == 0
