"""Pack labelled images small enough to travel: JPEGs of a given short side, and their COCO JSON scaled with them.

python benchmarks/gpu/pack_data.py OUTPUT ANNOTATIONS:IMAGES... [--short 256] [--quality 80]

Several sets become one; ids are counted anew.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2

from hpetr.images.files import write_bytes, write_json
from hpetr.images.pixels import keep_ratio_size, resize_image
from hpetr.images.read import load_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("sets", nargs="+", help="ANNOTATIONS:IMAGES")
    parser.add_argument("--short", type=int, default=256, help="limit of the short side, pixels")
    parser.add_argument("--quality", type=int, default=80, help="of the JPEGs")
    args = parser.parse_args()
    images, annotations, categories = [], [], []
    for source in args.sets:
        file, folder = source.split(":")
        content = json.loads(Path(file).read_text())
        categories = categories or content["categories"]
        people: dict[int, list[dict]] = {}
        for annotation in content["annotations"]:
            people.setdefault(annotation["image_id"], []).append(annotation)
        for image in content["images"]:
            pixels = load_image(Path(folder) / image["file_name"])
            size = keep_ratio_size(*pixels.shape[:2], min(args.short, min(pixels.shape[:2])), 10**6)
            scale = size[0] / pixels.shape[0]
            number = len(images) + 1
            encoded = cv2.imencode(
                ".jpg",
                cv2.cvtColor(resize_image(pixels, *size, antialias=True), cv2.COLOR_RGB2BGR),
                [cv2.IMWRITE_JPEG_QUALITY, args.quality],
            )[1]
            write_bytes(args.output / "images" / f"{number:06}.jpg", encoded.tobytes())
            images.append({"id": number, "file_name": f"{number:06}.jpg", "height": size[0], "width": size[1]})
            for annotation in people.get(image["id"], []):
                points = annotation.get("keypoints") or []
                scaled = [round(v * scale, 2) if place % 3 < 2 else v for place, v in enumerate(points)]
                box = [round(v * scale, 2) for v in annotation["bbox"]]
                own = {key: annotation[key] for key in ("category_id", "iscrowd") if key in annotation}
                own |= {"id": len(annotations) + 1, "image_id": number, "bbox": box, "keypoints": scaled}
                if "area" in annotation:
                    own["area"] = round(annotation["area"] * scale**2, 2)
                annotations.append(own)
    write_json(
        args.output / "annotations.json", {"images": images, "annotations": annotations, "categories": categories}
    )
    megabytes = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file()) / 1e6
    print(f"{len(images)} images, {len(annotations)} people, {megabytes:.1f} MB: {args.output}")


if __name__ == "__main__":
    main()
