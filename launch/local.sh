#!/usr/bin/env bash
# Starts launch/train.py on this machine: on all GPUs, or on two CPU processes where there is none.
set -euo pipefail
cd "$(dirname "$0")/.."
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  exec deepspeed launch/train.py "$@"
fi
# One thread per process: two ranks share two cores. OMP_NUM_THREADS can be raised on larger machines.
export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec deepspeed --num_accelerators 2 launch/train.py "$@"
