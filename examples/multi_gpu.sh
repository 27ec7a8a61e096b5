#!/usr/bin/env bash
# LoRA on all GPUs of a machine, a process each; on two CPU processes where there is no GPU.
#
#     examples/multi_gpu.sh
#     examples/multi_gpu.sh --model meta-llama/Llama-3.1-8B --data books.jsonl --tokens 32768
#     ENGINE=fsdp2 examples/multi_gpu.sh ...
#
# Options are train_lora.py's, ENGINE is a file of examples/accelerate. Run it from the
# repository's root, in the environment that lemo-hf is installed in.
set -euo pipefail
examples=$(dirname "$0")
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')

if [ "$gpus" -gt 0 ]; then
    exec python -m accelerate.commands.launch \
        --config_file "$examples/accelerate/${ENGINE:-ddp}.yaml" --num_processes "$gpus" \
        "$examples/train_lora.py" "$@"
fi
# accelerate starts CPU processes by MPI; torchrun needs none, and Trainer runs alike under both.
ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 exec python -m torch.distributed.run \
    --standalone --nproc_per_node 2 "$examples/train_lora.py" "$@"
