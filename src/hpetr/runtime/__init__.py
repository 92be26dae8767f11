"""Running an exported model: NumPy, OpenCV and ONNX Runtime or OpenVINO, and nothing else; see docs/deploy.md."""

from hpetr.runtime.engine import is_exported
from hpetr.runtime.predictor import ExportedPredictor

__all__ = ["ExportedPredictor", "is_exported"]
