#!/usr/bin/env bash
# 122b-a10b on 128 h100-80g. Run it from the repository's root, with the paths of
# launch/README.md set; further flags are Megatron's and win over layout.args.
set -euo pipefail
preset=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if ! command -v sbatch >/dev/null; then
    echo 'error: this plan runs on 16 nodes, and there is no sbatch here' >&2
    echo '  fix: submit it on a machine of a SLURM cluster' >&2
    exit 2
fi
exec sbatch --nodes=16 --gpus-per-node=8 launch/slurm.sbatch "$preset" "$@"
