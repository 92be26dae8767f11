"""Poses of videos, cameras and streams."""
