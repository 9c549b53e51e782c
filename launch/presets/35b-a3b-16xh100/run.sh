#!/usr/bin/env bash
# 35b-a3b on 16 h100-80g. Run it from the repository's root, with the paths of
# launch/README.md set; further flags are Megatron's and win over layout.args.
set -euo pipefail
preset=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sbatch "$preset" "$@"
