#!/usr/bin/env bash
# One rank of a SLURM job: srun starts this once for each GPU, with what Python runs and its flags.
#
# slurm.sbatch says when to save and leave by a file, because a signal through SLURM would reach
# every process of the job, also data loaders and compilers that it ends. Rank 0 alone looks for the
# file: Megatron asks all ranks after each iteration whether one of them has had a SIGTERM.
set -uo pipefail

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[[ -n ${SLURM_PROCID:-} && -n ${STOP_FILE:-} ]] || die "this is no rank of a job of slurm.sbatch" \
    "fix: submit launch/slurm.sbatch, which starts every rank; without SLURM run launch/train.sh"
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
# shellcheck source=launch/env.sh
source "$REPO/launch/env.sh"
read -rd '' -a prefix <<<"$CONTAINER"

# SIGTERM is ignored until Megatron listens for it, so that an early one ends nothing.
trap '' TERM
"${prefix[@]}" "$PYTHON" "$@" &
training=$!
# SLURM sends SIGTERM to every process before it takes a job away. The training saves and leaves;
# if this shell left first, SLURM would think that the rank has ended.
trap : TERM

next=0
while kill -0 "$training" 2>/dev/null; do
    if ((RANK == 0)); then
        # Again after a while, because the first may come too early; no sooner, because Python no
        # longer listens while it ends.
        if [[ -e $STOP_FILE ]] && ((SECONDS >= next)); then
            kill -TERM "$training" 2>/dev/null
            next=$((SECONDS + 60))
        fi
        sleep 1
    else
        wait "$training"
    fi
done
wait "$training"
status=$?

if ((status == 2)); then
    touch "$USAGE_FILE"
    # every rank finds the same mistake and rank 0 prints it; whoever ends first ends the job
    ((RANK == 0)) || sleep 20
fi
exit "$status"
