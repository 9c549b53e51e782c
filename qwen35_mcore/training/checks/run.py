"""Everything that can be wrong with a run, found before any process group forms.

Every rank comes to the same answer, from the flags, the environment and shared files.
"""

from __future__ import annotations

import importlib.util
from argparse import Namespace

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.errors import ConfigError
from qwen35_mcore.mcore import cpu_mode, imports
from qwen35_mcore.model.spec_providers import experts_of_run
from qwen35_mcore.parallel.check import check_layout, refuse_violations
from qwen35_mcore.parallel.layout import ParallelLayout
from qwen35_mcore.training.checks.checkpoint import Start, check_start
from qwen35_mcore.training.checks.checkpoint_flags import check_checkpoint_flags
from qwen35_mcore.training.checks.conversations import check_conversations
from qwen35_mcore.training.checks.data import check_datasets, check_tokenizer_flags
from qwen35_mcore.training.checks.hf_start import import_start
from qwen35_mcore.training.checks.numbers import check_numbers
from qwen35_mcore.training.checks.packing import check_packing, lengths_vary
from qwen35_mcore.training.checks.vision import check_vision
from qwen35_mcore.training.checks.written_folders import check_written_folders
from qwen35_mcore.training.choices import expert_ranks
from qwen35_mcore.training.cuda_graphs import check_graphs, host_counts_tokens
from qwen35_mcore.training.decoder import virtual_stages
from qwen35_mcore.training.flags.flex_dispatcher import check_flex
from qwen35_mcore.training.flags.fsdp import check_fsdp
from qwen35_mcore.training.image_flags import TEXT_DATA

MUON = ("muon", "dist_muon")
NEEDED = {
    "micro_batch_size": "sequences per forward pass and data parallel rank",
    "seq_length": "tokens per sequence",
    "lr": "the peak learning rate",
}

DATA_FLAGS = (*TEXT_DATA, "image_data")


def check_flags(args: Namespace) -> None:
    """Refuse flags that do not work together, or that are missing.

    What each flag is by itself stands in the table of :mod:`qwen35_mcore.training.flags`.

    Raises:
        ConfigError: with the first of them.
    """
    check_fsdp(args)
    sharded = (
        args.use_distributed_optimizer or args.use_megatron_fsdp or args.optimizer == "dist_muon"
    )
    if args.bf16 and not sharded and (args.save or args.load):
        raise ConfigError(
            "megatron's plain bf16 optimizer cannot write or read the state of float32 parameters "
            "(A_log, dt_bias and the GDN norm)",
            got="--bf16 without --use-distributed-optimizer",
            fix="drop --bf16, or pass --optimizer adam --use-distributed-optimizer"
            if args.optimizer == "sgd"  # which the distributed optimizer cannot save
            else "pass --use-distributed-optimizer",
        )
    _check_main_params(args)
    if args.optimizer in MUON:
        check_muon(args)
    _check_graph_device(args)
    check_graphs(args)
    if args.num_experts:
        check_flex(args)
        _check_hidden_exchange(args)
        _check_fp8_experts(args)
        _check_graph(args, experts_of_run(args))
    _check_needed(args)
    check_numbers(args)
    _check_warmup(args)


def _check_main_params(args: Namespace) -> None:
    if not args.float32_main_params:
        return
    if not args.bf16:
        raise ConfigError(
            "--float32-main-params is for bf16 runs: here the model itself is float32",
            fix="drop the flag, or pass --bf16",
        )
    if args.use_precision_aware_optimizer:
        raise ConfigError(
            "--float32-main-params fills main parameters that megatron keeps, and the "
            "precision-aware optimizer keeps its own",
            got="--float32-main-params --use-precision-aware-optimizer",
            fix="drop one of the two",
        )
    sharded = args.use_distributed_optimizer or args.use_megatron_fsdp
    if not sharded or args.optimizer != "adam":
        raise ConfigError(
            "--float32-main-params needs megatron's distributed optimizer: the others copy their "
            "main parameters from the rounded model",
            got=f"--optimizer {args.optimizer}"
            + (" --use-distributed-optimizer" if args.use_distributed_optimizer else ""),
            allowed="--optimizer adam, with --use-distributed-optimizer",
        )


def check_muon(args: Namespace) -> None:
    """Refuse flags of Muon that megatron would only find wrong when it trains, or not at all.

    Raises:
        ConfigError: with the first of them.
    """
    types = [name for name in imports.get_supported_coefficient_types() if name != "custom"]
    if args.muon_coefficient_type not in types:
        raise ConfigError(
            "no such coefficients of the Newton-Schulz iteration",
            got=f"--muon-coefficient-type {args.muon_coefficient_type}",
            allowed=", ".join(types),
        )
    if args.muon_fp32_matmul_prec == "low":
        raise ConfigError(
            "torch knows no such precision",
            got="--muon-fp32-matmul-prec low",
            allowed="medium (bfloat16), high",
        )
    heads, ranks = args.num_query_groups, args.tensor_model_parallel_size
    if args.muon_tp_mode != "duplicated" and heads % ranks:
        raise ConfigError(
            "a tensor-parallel rank holds a part of one key-value head, and so no part of each "
            "matrix of attention",
            got=f"--muon-tp-mode {args.muon_tp_mode}, {heads} key-value heads over {ranks} ranks",
            allowed="--muon-tp-mode duplicated, the default",
        )


def _check_graph_device(args: Namespace) -> None:
    given = [f"--cuda-graph-impl {args.cuda_graph_impl}"] if args.cuda_graph_impl != "none" else []
    given += [_flag(n) for n in ("enable_cuda_graph", "external_cuda_graph") if getattr(args, n)]
    given += ["--cuda-graph-modules"] if args.cuda_graph_modules else []
    given += ["--cuda-graph-scope"] if args.cuda_graph_scope_deprecated else []
    if not cpu_mode.is_needed() or not given:
        return
    raise ConfigError(
        "CUDA graphs need a CUDA device, and this run is on the CPU",
        got=given[0],
        allowed="--cuda-graph-impl none on a CPU",
        fix=f"drop {', '.join(word.partition(' ')[0] for word in given)}, or run on a GPU",
    )


def _check_fp8_experts(args: Namespace) -> None:
    """Megatron refuses this, too, as a version of Transformer Engine that is too old: 0.0.0."""
    if (args.fp8 or args.fp4) and importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError(
            "FP8 and FP4 need a GPU and Transformer Engine",
            got=(f"--fp8-format {args.fp8}" if args.fp8 else f"--fp4-format {args.fp4}")
            + (
                " on the CPU"
                if cpu_mode.is_needed()
                else ", and Transformer Engine is not installed"
            ),
            fix="drop the flag, or on a GPU machine: pip install '.[gpu]'",
        )


def _check_hidden_exchange(args: Namespace) -> None:
    """What megatron's schedule of two microbatches leaves out in silence, or fails at in a step: it
    frees what experts outside FP8 still need, routes without a padding mask, and has an MTP layer
    of its own, which detaches nothing and takes no packed documents."""
    if not args.overlap_moe_expert_parallel_comm:
        return
    packed, mtp = args.dataloader_inter_document_masking, bool(args.mtp_num_layers)
    for found, option in (
        (args.fp8 and experts_of_run(args) != "te", f"--fp8-format {args.fp8}"),
        (args.image_data, "--image-data"),
        (packed and (mtp or lengths_vary(args)), "--dataloader-inter-document-masking"),
        (args.mtp_detach_heads and mtp, "--mtp-detach-heads"),
    ):
        if found:
            raise ConfigError(
                f"{option.split()[0]} does not go with megatron's schedule that runs the exchange "
                "of tokens beside another microbatch",
                got=f"--overlap-moe-expert-parallel-comm {option}",
                fix=f"drop --overlap-moe-expert-parallel-comm, or {option.split()[0]}",
            )


def _check_graph(args: Namespace, experts: str) -> None:
    """A step in one CUDA graph may nowhere wait for the host, as an all-to-all of tokens does."""
    if args.cuda_graph_impl != "full_iteration":
        return
    if not host_counts_tokens(args):
        return
    apart = expert_ranks(args)
    raise ConfigError(
        "one CUDA graph of the whole step needs grouped_mm experts, whole on their rank or behind "
        "NCCL EP: otherwise each MoE layer waits for the host to learn how many tokens an expert "
        "has",
        got=f"--cuda-graph-impl full_iteration, experts over {apart} ranks behind "
        f"{args.moe_token_dispatcher_type}, --moe-experts {args.moe_experts}, which is {experts} "
        "here",
        allowed="--moe-experts auto or grouped_mm, --bf16; expert and expert tensor parallelism of "
        "1 and alltoall, or --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend ncclep",
        fix="drop --cuda-graph-impl, or spread the model over pipeline and data parallel ranks",
    )


def _check_warmup(args: Namespace) -> None:
    for unit in ("iters", "samples"):
        warmup, total = getattr(args, f"lr_warmup_{unit}"), getattr(args, f"train_{unit}")
        decay = getattr(args, f"lr_decay_{unit}") or total
        if warmup and decay and warmup >= decay:
            raise ConfigError(
                "the learning rate would warm up until the run ends, or longer",
                got=f"--lr-warmup-{unit} {warmup} of {decay}",
                allowed=f"less than {decay}",
                fix="shorten the warmup or train longer",
            )


def _check_needed(args: Namespace) -> None:
    missing = {flag: what for flag, what in NEEDED.items() if getattr(args, flag) is None}
    if args.train_iters is None and args.train_samples is None:
        missing["train_iters"] = "optimizer steps (or --train-samples)"
    if not any(getattr(args, name) for name in DATA_FLAGS):
        missing["data_path"] = "a dataset prefix (or --mock-data)"
    if args.save and args.save_interval is None:
        missing["save_interval"] = "steps between checkpoints, needed with --save"
    if missing:
        listing = "; ".join(f"{_flag(flag)}, {what}" for flag, what in missing.items())
        raise ConfigError("flags are missing", fix=f"pass {listing}")


def check_run(args: Namespace, model_config: Qwen35Config) -> Start | None:
    """Check the parallel layout, the datasets and the checkpoint to start from, which it returns.

    Raises:
        ConfigError: the layout cannot run the model, all violations at once; a folder that the run
            writes to cannot be made; or see `check_checkpoint_flags`, `check_vision` and
            `check_packing`.
        DataError: see `check_datasets`, `check_conversations` and `check_tokenizer_flags`.
        CheckpointError: see `import_start` and `check_start`.
    """
    check_checkpoint_flags(args)
    check_vision(args, model_config)
    _check_layout(args, model_config)
    check_packing(args, virtual_stages(args))
    check_datasets(args, model_config)
    check_conversations(args, model_config)
    check_tokenizer_flags(args)
    import_start(args, model_config)
    start = check_start(args, model_config)
    check_written_folders(args)
    return start


def _check_layout(args: Namespace, model_config: Qwen35Config) -> None:
    uneven = any(
        getattr(args, name)
        for name in (
            "decoder_first_pipeline_num_layers",
            "decoder_last_pipeline_num_layers",
            "account_for_embedding_in_pipeline_split",
            "account_for_loss_in_pipeline_split",
        )
    )
    violations = check_layout(
        model_config,
        _layout(args, model_config),
        seq_length=args.seq_length,
        world_size=args.world_size,
        micro_batch_size=args.micro_batch_size,
        global_batch_size=args.global_batch_size,
        fp8=bool(args.fp8),
    )
    if uneven:  # megatron checks its own ways of splitting unevenly
        violations = [v for v in violations if v.rule != "pp * vpp divides num_hidden_layers"]
    refuse_violations(violations)


def _layout(args: Namespace, model_config: Qwen35Config) -> ParallelLayout:
    return ParallelLayout(
        tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
        vpp=virtual_stages(args),
        cp=args.context_parallel_size,
        gdn_cp=args.gdn_context_parallel,
        ep=args.expert_model_parallel_size,
        etp=args.expert_tensor_parallel_size,
        sequence_parallel=args.sequence_parallel,
        pipeline_layout=args.pipeline_model_parallel_layout,
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
