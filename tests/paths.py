"""Folders that tests read."""

from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
EXAMPLES = ROOT / "examples"
TINY = EXAMPLES / "tiny-coco"
GOLDEN = TESTS / "golden"
