#!/usr/bin/env bash
# Train a recipe on every GPU of one or several nodes with torchrun.
#
#   examples/launch/torchrun.sh llama3-8b --data.prefix /data/web_text_document
#
# On several nodes run it on each, with NODES, NODE_RANK and HEAD set; GPUS is per node.
set -euo pipefail

recipe=${1:?name a recipe, for example llama-1b}
shift

nodes=${NODES:-1}
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
rendezvous=(--standalone)
if [[ $nodes -gt 1 ]]; then
  rendezvous=(
    --node-rank "${NODE_RANK:?set NODE_RANK, from 0 on}"
    --rdzv-backend c10d
    --rdzv-endpoint "${HEAD:?set HEAD to the name of node 0}:${PORT:-29500}"
  )
fi

# One thread per process: the processes share the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec torchrun --nnodes "$nodes" --nproc-per-node "$gpus" "${rendezvous[@]}" \
  -m megatree.cli train "$recipe" "$@"
