"""hpetr: multi-person pose estimation with one network and no NMS (PETR and H-PETR).

The public names are imported at first use, so that `import hpetr` and the command line's help stay quick. Using any
name of the model registers it with transformers' Auto classes.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
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
# Public modules, and the files that hold their code.
_PUBLIC_MODULES = {
    "hpetr.convert": "hpetr.checkpoints.official",
    "hpetr.evaluate": "hpetr.evaluation.evaluate",
    "hpetr.formats": "hpetr.poses.formats",
    "hpetr.recipe": "hpetr.training.recipe",
    "hpetr.tracking": "hpetr.video.tracking",
    "hpetr.train": "hpetr.training.train",
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
    if f"hpetr.{name}" in _PUBLIC_MODULES:
        return importlib.import_module(f"hpetr.{name}")
    raise AttributeError(f"module 'hpetr' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


class _PublicModules(MetaPathFinder, Loader):
    """Import a public module as the very module that holds its code."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in _PUBLIC_MODULES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(_PUBLIC_MODULES[spec.name])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own spec back, which the import of its public name has replaced."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.append(_PublicModules())
