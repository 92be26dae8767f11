"""Query groups of the pose decoder: how many queries each has, and how they are assigned to ground truth.

One group is PETR. A second one whose targets repeat k times is hybrid matching (H-DETR, Jia et al., arXiv 2207.13080).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hpetr.model.config import HPetrConfig


class Assignment(Protocol):
    """A rule that assigns the predictions of one image to its ground truth."""

    def __call__(self, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices (m,) of predictions and (m,) of their targets, from a finite cost matrix (Q, n)."""


@dataclass(frozen=True)
class Hungarian:
    """The assignment of least total cost (Carion et al. 2020).

    Attributes:
        repeats: how many predictions each target gets.
    """

    repeats: int = 1

    def __call__(self, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        from scipy.optimize import linear_sum_assignment  # building a model does not need scipy

        targets = cost.shape[1]
        query, column = linear_sum_assignment(np.tile(cost, (1, self.repeats)))
        return query, column % max(targets, 1)


@dataclass(frozen=True)
class QueryGroup:
    """Queries that attend to one another and to no other group.

    Attributes:
        name: of the group, for reports.
        size: maximum number of queries.
        assignment: which query learns which person.
    """

    name: str
    size: int
    assignment: Assignment


def query_groups(config: HPetrConfig) -> list[QueryGroup]:
    """Return the groups of a configuration; the first one predicts, the others exist in training only."""
    groups = [QueryGroup("one-to-one", config.num_queries, Hungarian())]
    if config.num_one_to_many_queries:
        groups.append(QueryGroup("one-to-many", config.num_one_to_many_queries, Hungarian(config.one_to_many_k)))
    return groups
