#!/usr/bin/env bash
# 122b-a10b on 128 h100-80g. Run it from the repository's root, with the paths of
# launch/README.md set; further flags are Megatron's and win over layout.args.
set -euo pipefail
preset=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec sbatch --nodes=16 --gpus-per-node=8 launch/slurm.sbatch "$preset" "$@"
