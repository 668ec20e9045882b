#!/usr/bin/env bash
# Ten minutes on a GPU: its tests, three short epochs in each way to compile, and the default run until the time is over.
#
#     bash extras/gpu.sh 2>&1 | tee gpu.txt      then post gpu.txt
#
# Finished, the run says "all 10,000 test images"; stopped before, `python train.py COMPILE=default` goes on with it.
cd "$(dirname "$0")/.."
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || exit 1
git log -1 --format=%H
timeout 150 python -m pytest -q tests/test_gpu.py -k "waits or fsq or COMPILE" --maxfail 3
# images a second are in each run's last column but one; the first epoch contains the compilation
for mode in "" default reduce-overhead; do
    timeout 100 python train.py SEED=$(date +%s) "STAGES=(1,)" EPOCHS=3 EPOCH_IMAGES=12800 EVAL_IMAGES=500 "COMPILE=$mode"
done
timeout -s INT $((595 - SECONDS)) python train.py COMPILE=default
