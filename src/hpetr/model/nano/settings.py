"""The numbers that were tuned on data for the small model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NanoSettings:
    """Values that `PosePrior`, `PriorQueries` and `SizeSteps` compute with.

    All AP values below are of 289 COCO train2017 images, before training, unless a comment says otherwise.
    """

    # Adam changes a new head's weights by the learning rate, whatever the gradient: larger units move poses by pixels.
    extent_share: float = 0.1  # the pose decoder's offsets are in units of this share of the pose's half-extent
    cell_share: float = 0.25  # the joint decoder's offsets are in units of this share of the finest level's cell

    # A keypoint snaps to the largest product of its heatmap and a Gaussian around the proposed place. AP of one level
    # at a long side of 448: .381, and .373 with MoveNet's own weight, 1 / (distance + 1.8 cells) within 7 cells.
    spread: float = 0.7  # the Gaussian's scale in half-extents of the pose (geometric mean); 0.8: .381, 0.9: .378
    min_spread: float = 4.0  # its least scale, in cells of the heatmap
    reach: int = 5  # blocks of 2 x 2 cells searched on each side; AP with 8, 6 and 5: .4174, .4173, .4172
    min_heat: float = 0.05  # a keypoint whose heatmap is lower does not snap

    # Neighboring cells snap to the same keypoints, so a pose loses class logit for repeating a likelier one. AP of 90
    # COCO val2017 images: .306, and .261 without.
    repetition: float = 6.0  # the largest loss of logit
    repetition_power: float = 4.0  # of the OKS with the likelier pose
    area_of_extent: float = 0.7  # a person's area as a share of its keypoints' extent, about COCO's

    # People below this size belong to the finer of two levels. AP with 10, 14 and 20: .4133, .4162, .4152.
    border_size: float = 14.0  # sqrt(width x height) in half cells of the coarser level: 112 pixels at stride 16
    border_width: float = 0.6  # of the gradual change between the levels, in units of the log size
    prominence: float = 3.0  # a token beside the best of its 3 x 3 neighbors loses this many times the difference
