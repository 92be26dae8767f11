"""The network. Importing this package registers configuration, model and processor with transformers' Auto classes."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForKeypointDetection

from hpetr.model import backbones  # noqa: F401 (registers them)
from hpetr.model.config import HPetrConfig
from hpetr.model.hpetr import HPetrForPoseEstimation, HPetrOutput
from hpetr.model.image_processor import HPetrImageProcessor

AutoConfig.register(HPetrConfig.model_type, HPetrConfig, exist_ok=True)
AutoModel.register(HPetrConfig, HPetrForPoseEstimation, exist_ok=True)
AutoModelForKeypointDetection.register(HPetrConfig, HPetrForPoseEstimation, exist_ok=True)
AutoImageProcessor.register(HPetrConfig, image_processor_classes={"pil": HPetrImageProcessor}, exist_ok=True)

__all__ = ["HPetrConfig", "HPetrForPoseEstimation", "HPetrImageProcessor", "HPetrOutput"]
