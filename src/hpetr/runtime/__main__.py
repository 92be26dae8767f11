"""`python -m hpetr.runtime MODEL IMAGE...`: one line of JSON for each image, without torch."""

from __future__ import annotations

import argparse
import json
import sys

from hpetr.errors import InputError
from hpetr.runtime.predictor import ExportedPredictor


def main(arguments: list[str] | None = None) -> int:
    """Print the poses of images; the exit code is 2 if the model or an image cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m hpetr.runtime", description="Poses of an exported model.")
    parser.add_argument("model", help=".onnx or .xml file that `hpetr export` wrote")
    parser.add_argument("images", nargs="+", metavar="image")
    parser.add_argument("--threshold", type=float, help="minimum score of a pose, exclusive")
    parser.add_argument("--threads", type=int, help="threads of the CPU")
    given = parser.parse_args(arguments)
    try:
        predictor = ExportedPredictor(given.model, given.threshold, threads=given.threads)
        for image in given.images:
            print(json.dumps({**predictor(image).to_dict(), "file_name": image}), flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
