#!/usr/bin/env bash
# Train on one node, with torchrun behind qwen35_mcore.training.launch.
#
#   DATA=data/corpus SAVE=runs/35b launch/train.sh PRESET [flags of the training]
#
# PRESET is a folder that `qwen35 plan --emit DIR` wrote. Flags given here win over the preset's. Run
# again, it continues from the last checkpoint. README.md beside this file says more.
set -euo pipefail

PRESET=${PRESET:-}                        # folder written by `qwen35 plan --emit`
DATA=${DATA:-}                            # dataset prefix, a blend of them, or mock
SAVE=${SAVE:-}                            # folder of this run's checkpoints
LOAD=${LOAD:-$SAVE}                       # where to continue from
PRETRAINED=${PRETRAINED:-}                # an imported checkpoint to start from
TENSORBOARD=${TENSORBOARD:-$SAVE/tensorboard}
SAVE_INTERVAL=${SAVE_INTERVAL:-500}       # iterations between checkpoints
NPROC=${NPROC:-}                          # processes; one for each GPU where not set
SCRIPT=${SCRIPT:-}                        # a training script of your own
PYTHON=${PYTHON:-python}
REPO=${REPO:-$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)}

if [[ ! -r $REPO/launch/common.sh ]]; then
    printf 'error: REPO is not the repository\n  got: %s\n' "$REPO" >&2
    printf '  fix: set it to the folder that holds launch/, or leave it out\n' >&2
    exit 2
fi
# shellcheck source=launch/common.sh
source "$REPO/launch/common.sh"
# shellcheck source=launch/env.sh
source "$REPO/launch/env.sh"

if [[ $# -gt 0 && $1 != -* ]]; then
    PRESET=$1
    shift
fi
declare -a layout paths script
read_preset "$PRESET"
run_flags
read_script
if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    # devices behind a negative number are hidden
    gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | sed '/^ *-/,$d' | grep -c . || true)
else
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)
fi
if [[ -z $NPROC ]]; then
    NPROC=$gpus
    ((NPROC > 0)) || die "this machine has no GPU" "fix: set NPROC to train on its CPU"
fi
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || die "NPROC is no number of processes" "got: $NPROC" \
    "allowed: 1 or more" "fix: correct it, or leave it out for one process on each GPU"
nodes=$(planned "$PRESET" nodes)
if ((${nodes:-1} > 1)); then
    check_gpus "$PRESET" "$NPROC" "submit it to SLURM: $(printf %q "$PRESET/run.sh")"
else
    check_gpus "$PRESET" "$NPROC" "set NPROC=$(planned "$PRESET" gpus)"
fi
((gpus == 0 || NPROC <= gpus)) || die "there are fewer GPUs here than processes" \
    "got: NPROC $NPROC, $gpus GPUs" "allowed: 1 to $gpus" \
    "fix: run it on a machine with $NPROC GPUs, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
check_python

exec "$PYTHON" -m qwen35_mcore.training.launch --standalone --nproc-per-node "$NPROC" \
    "${script[@]}" "${layout[@]}" "${paths[@]}" "$@"
