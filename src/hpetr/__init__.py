"""hpetr: multi-person pose estimation with one network and no NMS (PETR and H-PETR)."""

__version__ = "0.1.0"
