"""hpetr: multi-person pose estimation with one network and no NMS (PETR and H-PETR).

The public names are imported at first use, so that `import hpetr` and the command line's help stay quick; using any of
the model's names registers it with transformers' Auto classes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "HPetrConfig": "hpetr.model",
    "HPetrForPoseEstimation": "hpetr.model",
    "HPetrImageProcessor": "hpetr.model",
    "HPetrOutput": "hpetr.model",
    "InputError": "hpetr.errors",
    "PosePredictor": "hpetr.inference.torch_predictor",
    "PoseResult": "hpetr.poses.result",
    "Skeleton": "hpetr.poses.skeleton",
}
__all__ = [
    "HPetrConfig",
    "HPetrForPoseEstimation",
    "HPetrImageProcessor",
    "HPetrOutput",
    "InputError",
    "PosePredictor",
    "PoseResult",
    "Skeleton",
    "__version__",
]

if TYPE_CHECKING:
    from hpetr.errors import InputError
    from hpetr.inference.torch_predictor import PosePredictor
    from hpetr.model import HPetrConfig, HPetrForPoseEstimation, HPetrImageProcessor, HPetrOutput
    from hpetr.poses.result import PoseResult
    from hpetr.poses.skeleton import Skeleton


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'hpetr' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
