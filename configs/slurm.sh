#!/usr/bin/env bash
# Trains on the nodes of a Slurm job; a requeued job resumes from its last checkpoint:
#   sbatch --nodes 2 configs/slurm.sh configs/gsm8k_qwen3.yaml [--setting value ...]
#SBATCH --job-name=hierbd3lm
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

: "${SLURM_JOB_NODELIST:?start this script with sbatch}" "${1:?the first argument must be a configuration file}"
ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-configs/accelerate/multi_node.yaml}
GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-8}

launch=(
    accelerate launch
    --config_file "$ACCELERATE_CONFIG"
    --num_machines "$SLURM_JOB_NUM_NODES"
    --num_processes "$((SLURM_JOB_NUM_NODES * GPUS_PER_NODE))"
    --main_process_ip "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)" # sed reads all input, for pipefail
    --main_process_port "$((20000 + SLURM_JOB_ID % 10000))"
)
# $SLURM_NODEID is set on the nodes only.
export LAUNCH="${launch[*]}"
srun --kill-on-bad-exit=1 bash -c '$LAUNCH --machine_rank "$SLURM_NODEID" train.py "$@"' train "$@" \
    --resume_from_checkpoint last
