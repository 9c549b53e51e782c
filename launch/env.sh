# shellcheck shell=bash
# Settings of every rank, sourced by train.sh, slurm.sbatch and rank.sh. A variable that is set
# already keeps its value, also an empty one: `NCCL_NVLS_ENABLE=1 sbatch ...` overrides.
# CUDA_DEVICE_MAX_CONNECTIONS is not here: training sets it to 1 where tensor or context parallelism
# needs it.

default() {
    [[ -n ${!1+set} ]] || export "$1=$2"
}

# Routing gives experts another number of tokens in every microbatch. In fixed segments that
# fragments the GPU's memory until an allocation fails with gigabytes free.
default PYTORCH_CUDA_ALLOC_CONF expandable_segments:True
# Megatron refuses CUDA graphs beside expandable segments while NCCL registers graph buffers.
default NCCL_GRAPH_REGISTER 0

# NVLink multicast (NVLS) speeds up all-reduce inside a node. Here the distributed optimizer reduces
# and gathers over nodes and experts exchange by all-to-all, while NVLS takes GPU memory for each of
# Megatron's many process groups and fails at start where the fabric manager does not offer it.
default NCCL_NVLS_ENABLE 0
default TORCH_SYMM_MEM_DISABLE_MULTICAST 1
default NVSHMEM_DISABLE_NVLS 1

# What is compiled while a run starts lies in one folder: home is mostly shared by all nodes, so that
# one of them compiles for all. `qwen35 warm` fills it before.
default QWEN35_KERNEL_CACHE "${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/qwen35-kernels"

# Says which link or peer failed; silent otherwise.
default NCCL_DEBUG WARN

# One process a GPU: more threads in each would only fight for the node's cores.
default OMP_NUM_THREADS 1

# The last lines before a crash reach the log.
default PYTHONUNBUFFERED 1

unset -f default
