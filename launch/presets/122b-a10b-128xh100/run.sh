#!/usr/bin/env bash
# 122b-a10b on 128 h100-80g, 16 nodes of 8. Run it from anywhere, with the paths of
# launch/README.md set:
#
#   122b-a10b-128xh100/run.sh [OPTIONS OF sbatch --] [FLAGS OF pretrain_qwen35.py]
#
# Flags win over those of layout.args.
set -euo pipefail
preset=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
repo=${REPO:-$preset/../../..}
[[ -n ${REPO:-} || -r $repo/launch/train.sh ]] || repo=$PWD  # moved since this was written
if [[ ! -r $repo/launch/train.sh ]]; then
    printf 'error: the repository of qwen35_mcore is not there\n  got: %s\n' "$repo" >&2
    printf '  fix: set REPO to its folder\n' >&2
    exit 2
fi
REPO=$(cd "$repo" && pwd)
export REPO
options=()
for ((i = 1; i <= $#; i++)); do
    if [[ ${!i} == -- ]]; then
        options=("${@:1:i-1}")
        shift "$i"
        break
    fi
done
if ! command -v sbatch >/dev/null; then
    echo 'error: this plan runs on 16 nodes, and there is no sbatch here' >&2
    echo '  fix: submit it on a machine of a SLURM cluster' >&2
    exit 2
fi
exec sbatch --nodes=16 --gpus-per-node=8 "${options[@]}" \
    "$REPO/launch/slurm.sbatch" "$preset" "$@"
