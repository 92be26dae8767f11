"""Backbones that transformers lacks. Importing this package registers them with transformers' Auto classes."""

from hpetr.model.backbones import movenet

__all__ = ["movenet"]
