"""Backbones of our own. Importing this package registers them with transformers' Auto classes."""

from hpetr.model.backbones import efficientnet_lite, movenet

__all__ = ["efficientnet_lite", "movenet"]
