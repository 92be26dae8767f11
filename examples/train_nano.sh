#!/usr/bin/env bash
# The training of the bundled h-petr-nano: MoveNet's network stays as it is, the transformer learns on top of it.
#   bash examples/train_nano.sh DATA [OUTPUT]
# DATA has the folders coco/train (COCO keypoint JSON and images), coco/dev (the same, to scale the joints' scores with)
# and people (further labelled photographs), each with an annotations.json. About 45 minutes on two CPU cores.
set -euo pipefail
data=${1:?folder of the data}
output=${2:-runs/nano}
coco="{annotations: $data/coco/train/annotations.json, images: $data/coco/train/images"
people="{annotations: $data/people/annotations.json, images: $data/people, only_with_people: true}"

# Everything learns but MoveNet's network and the pose decoder's steps: from so few images these would fit the images
# and not the poses. No heatmap loss, since the heatmaps are MoveNet's.
learns="[backbone.neck, level_embedding, encoder, pose_decoder.layers, pose_decoder.class_heads, pose_decoder.proposal, \
pose_decoder.keypoint_heads.2, joint_decoder]"
hpetr train recipes/h-petr-nano.yaml "output=$output/poses" train.epochs=0.5 train.ema=0.998 train.workers=0 \
    "train.only=$learns" model.options.loss_heatmap=0 "data.train=[$coco, repeat: 40}, $people]"
hpetr train recipes/h-petr-nano-scores.yaml "output=$output/scores" "model.weights=$output/poses" \
    "data.train=[$coco, repeat: 5, unlabelled: absent}]"
hpetr eval "$output/scores" "$data/coco/dev/annotations.json" --images "$data/coco/dev/images" --output "$output/eval.json"
python benchmarks/quality/keypoint_calibration.py "$output/eval.json" "$data/coco/dev/annotations.json" \
    --calibrate "$output/scores" --output "$output/calibrated"
hpetr convert "$output/calibrated" --half --output "$output/h-petr-nano"
