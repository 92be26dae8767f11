#!/usr/bin/env bash
# The training of the bundled h-petr-nano: MoveNet's network stays as it is, the transformer learns on top of it.
#   bash examples/train_nano.sh DATA [OUTPUT]
# DATA has the folders coco/train (COCO keypoint JSON and pictures), coco/dev (the same, to scale the joints' scores with)
# and people (further labelled photographs), each with an annotations.json. About 45 minutes on two CPU cores.
set -euo pipefail
data=${1:?folder of the data}
output=${2:-runs/nano}
coco="{annotations: $data/coco/train/annotations.json, images: $data/coco/train/images"
people="{annotations: $data/people/annotations.json, images: $data/people, only_with_people: true}"

# Without a heatmap loss, since MoveNet's heatmaps of these joints are learnt, and without one-to-many queries, which this
# checkpoint did not have. Its run was stopped at step 2,400 of the 3,195.
hpetr train recipes/h-petr-nano.yaml "output=$output/poses" train.epochs=0.78 \
    "model.options={loss_heatmap: 0, num_one_to_many_queries: 0, num_queries: 100}" "data.train=[$coco, repeat: 40}, $people]"
# From so few pictures the pose decoder learns steps that fit these alone: without them AP on others is higher by .004.
python - "$output/poses/model.safetensors" <<'PYTHON'
import sys
from safetensors.torch import load_file, save_file

tensors = load_file(sys.argv[1])
for layer in range(3):
    for name in ("weight", "bias"):
        tensors[f"pose_decoder.keypoint_heads.{layer}.6.{name}"].zero_()
save_file(tensors, sys.argv[1], metadata={"format": "pt"})
PYTHON
hpetr train recipes/h-petr-nano-scores.yaml "output=$output/scores" "model.weights=$output/poses" \
    "data.train=[$coco, repeat: 5, unlabelled: absent}]"
hpetr eval "$output/scores" "$data/coco/dev/annotations.json" --images "$data/coco/dev/images" --output "$output/eval.json"
python benchmarks/quality/keypoint_calibration.py "$output/eval.json" "$data/coco/dev/annotations.json" \
    --calibrate "$output/scores" --output "$output/calibrated"
hpetr convert "$output/calibrated" --half --output "$output/h-petr-nano"
