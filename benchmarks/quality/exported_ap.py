"""AP of exported models, to see the effect of other runtimes and of half precision.

    python benchmarks/quality/exported_ap.py annotations.json model.onnx model.xml [--images FOLDER] [--threads 2]

As in `hpetr eval`, all poses of every image count, whatever their scores. Prints the ten metrics of COCO's protocol.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hpetr.data.coco import read_ground_truth
from hpetr.evaluation.evaluate import coco_metrics
from hpetr.runtime import ExportedPredictor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=Path)
    parser.add_argument("models", nargs="+", help="what `hpetr export` wrote")
    parser.add_argument("--images", type=Path, help="folder of the images; that of the annotations if not given")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    truth = read_ground_truth(args.annotations)
    folder = args.images or args.annotations.parent
    categories = [category["id"] for category in truth["categories"]]
    heading = False
    for model in args.models:
        predictor = ExportedPredictor(model, 0.0, threads=args.threads)
        results = []
        for image in truth["images"]:
            results += predictor(folder / image["file_name"]).to_coco(image["id"], categories)
        metrics = coco_metrics(truth, results, predictor.skeleton.sigmas)
        if not heading:
            print(f"{'':24}" + "".join(f"{name:>8}" for name in metrics))
            heading = True
        print(f"{Path(model).name:24}" + "".join(f"{value:>8.4f}" for value in metrics.values()))


if __name__ == "__main__":
    main()
