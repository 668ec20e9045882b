#!/usr/bin/env bash
# Ten minutes on a GPU: its tests, a step of both sizes of encoder, and the default run until the time is over.
#
#     bash extras/gpu.sh 2>&1 | tee gpu.txt      then post gpu.txt
#
# Finished, the run says "all 10,000 test images"; stopped before, `python train.py COMPILE=default` goes on with it.
cd "$(dirname "$0")/.."
start=$SECONDS
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || exit 1
git log -1 --format=%H
timeout 150 python -m pytest -q tests/test_gpu.py -k "waits or fsq or COMPILE" --maxfail 3
timeout 180 python -m extras.bench
timeout 120 python -m extras.bench ENCODER=dinov2_b IMAGE_SIZE=224 GRID=16 BATCH_SIZE=32 ROUNDS=3
timeout -s INT $((595 - SECONDS + start)) python train.py COMPILE=default
