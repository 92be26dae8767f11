#!/usr/bin/env bash
# Everything of hpetr that needs a GPU, in nine minutes: the sampling kernel against float64 and the card's copy bandwidth,
# training steps, and a training of h-petr-nano for the rest of the time.
#   bash benchmarks/gpu/run.sh DATA OUTPUT [WHEELS]
# DATA: folders with images/ and annotations.json, as benchmarks/gpu/pack_data.py writes; `train` to learn, `val` to evaluate.
# OUTPUT: logs, and the weights, copied there every minute. WHEELS: a folder of wheels for a machine without network.
set -u
data=${1:?folder of the data} output=${2:?folder of the results} wheels=${3:-}
start=$SECONDS
mkdir -p "$output"
if [ -n "$wheels" ]; then python -m pip install --quiet --no-index --find-links "$wheels" --no-deps "$wheels"/*.whl; fi
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
timeout 110 python benchmarks/deformable_sampling.py --device cuda 2>&1 | tee "$output/sampling.txt"
for preset in h-petr-r50 group-pose-r50; do
    timeout 40 python benchmarks/training_step.py --preset "$preset" --device cuda --batch 2 --precision bfloat16 \
        --skip-literal 2>&1 | tee "$output/step-$preset.txt"
done
left=$((530 - SECONDS + start))
timeout --signal TERM "$left" python -m hpetr.cli train h-petr-nano output="$output/run" model.weights=h-petr-nano \
    "data.train=[{annotations: $data/train/annotations.json, images: $data/train/images}]" \
    "data.val={annotations: $data/val/annotations.json, images: $data/val/images}" \
    train.epochs=1000 train.total_batch_size=32 train.workers=14 train.eval_every=200 train.save_every=200 \
    train.precision=bfloat16 > "$output/train.txt" 2>&1 &
training=$!
while kill -0 "$training" 2>/dev/null; do
    sleep 60
    cp "$output/run/best/model.safetensors" "$output/best.safetensors" 2>/dev/null
    cp "$output/run/log.jsonl" "$output/" 2>/dev/null
done
tail -n 3 "$output/train.txt"
