"""Exported models, with NumPy, OpenCV and ONNX Runtime or OpenVINO alone; see docs/deploy.md."""

from hpetr.runtime.engine import is_exported
from hpetr.runtime.predictor import ExportedPredictor

__all__ = ["ExportedPredictor", "is_exported"]
