"""`python -m hpetr.runtime MODEL IMAGE...`: one line of JSON for each image, without torch."""

from __future__ import annotations

import argparse
import json
import sys

from hpetr.errors import InputError
from hpetr.runtime.predictor import ExportedPredictor


def main(arguments: list[str] | None = None) -> int:
    """Print the poses; the exit code is 2 when the model or an image cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m hpetr.runtime", description="Poses of an exported model.")
    parser.add_argument("model", help=".onnx or .xml file that `hpetr export` wrote")
    parser.add_argument("images", nargs="+", metavar="image")
    parser.add_argument("--threshold", type=float, help="report poses with a higher score")
    parser.add_argument("--threads", type=int, help="of the CPU")
    given = parser.parse_args(arguments)
    try:
        predictor = ExportedPredictor(given.model, given.threshold, threads=given.threads)
        for image in given.images:
            result = predictor(image)
            height, width = result.image_size
            poses = [
                {key: value for key, value in pose.items() if key != "image_id"}
                for pose in result.to_coco(0, range(1, len(predictor.class_names) + 1))
            ]
            print(json.dumps({"file_name": image, "width": width, "height": height, "poses": poses}), flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
