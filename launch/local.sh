#!/usr/bin/env bash
# Merge on this machine, one rank for each GPU (or NPROC ranks), under torchrun.
#   launch/local.sh --base llama-70b-nf4 --adapter my-qlora --output merged
#   NPROC=2 launch/local.sh --config configs/llama-70b_qlora_bf16.yaml
set -euo pipefail

gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}

# torchrun ends without its ranks on signals that it does not handle; SIGUSR1 is what schedulers send before the end.
exec torchrun --standalone --nproc-per-node "$nproc" --max-restarts "${MAX_RESTARTS:-0}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m distmerge merge "$@"
