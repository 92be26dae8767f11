"""Poses of videos, cameras and streams."""

from hpetr.video.frames import predict_frames

__all__ = ["predict_frames"]
