"""Command-line arguments of a training run: one model choice, and megatron's own flags.

``--flavor`` or ``--hf-config`` fills every architecture flag of ``megatron.training``; what the
architecture leaves open gets defaults for this machine. A flag the user gives wins over a default
and is refused where it contradicts the model.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import qwen35_mcore
from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.data import read_sidecar
from qwen35_mcore.errors import ConfigError
from qwen35_mcore.kernels.registry import KERNELS
from qwen35_mcore.mcore import cpu_mode, imports
from qwen35_mcore.mcore.megatron_errors import as_config_errors, raise_instead_of_usage
from qwen35_mcore.model.build import DECODERS
from qwen35_mcore.model.transformer_config import Qwen35TransformerConfig, architecture_arguments
from qwen35_mcore.model.vision.vision_language_model import check_vision_run
from qwen35_mcore.parallel.layout import GDN_CONTEXT_PARALLEL
from qwen35_mcore.training.carried_files import take_over
from qwen35_mcore.training.carried_tokenizer import carry_tokenizer
from qwen35_mcore.training.checks.checkpoint import Start
from qwen35_mcore.training.checks.data import check_tokenizer, tokenizer_error
from qwen35_mcore.training.checks.data_flags import dataset_prefixes
from qwen35_mcore.training.checks.hf_start import describe, model_of_start
from qwen35_mcore.training.checks.launcher import run_alone_without_a_launcher
from qwen35_mcore.training.checks.packing import lengths_vary
from qwen35_mcore.training.checks.resume import check_resume, goes_on_in_data
from qwen35_mcore.training.checks.resume_schedule import schedule_of_flags
from qwen35_mcore.training.checks.run import MUON, check_flags, check_run
from qwen35_mcore.training.choices import (
    AUTO,
    announce_loss,
    choose_dispatcher,
    cross_entropy_default,
)
from qwen35_mcore.training.cuda_graphs import choose_graphs
from qwen35_mcore.training.decoder import take_hybrid_pattern
from qwen35_mcore.training.flags import check_classes_while_parsing
from qwen35_mcore.training.image_flags import add_image_arguments, complete_image_flags
from qwen35_mcore.training.nan_checks import place_nan_checks


def parse_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, Qwen35Config]:
    """Parse, fill, check and register megatron's arguments.

    Returns:
        megatron's validated namespace (registered as its global arguments) and the model. The
        namespace carries the model as ``qwen35_hf_config``, a JSON string, into every checkpoint.

    Raises:
        ConfigError: no model or two, a flag that does not exist or contradicts the model, or a
            parallel layout that cannot run it.
        DataError: a dataset or tokenizer that cannot train it.
        CheckpointError: no checkpoint where the run must start from one, or one of another model.
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        with _argv(argv):
            imports.parse_args(_with_readable_help)  # prints the help and exits
    run_alone_without_a_launcher()
    early, _ = _model_parser().parse_known_args(argv)
    if early.flavor is None and early.hf_config is None:
        early.hf_config = model_of_start(argv)
    model_config = choose_model(early.flavor, early.hf_config, early.override)
    args = read_flags(argv, model_config)
    complete_image_flags(args, early.hf_config)
    _let_choices_be_read(args)
    if model_config.is_moe:
        choose_dispatcher(args)
    choose_graphs(args)
    place_nan_checks(args)
    announce_loss(args)
    check_flags(args)
    _complete(args, model_config)
    start = check_run(args, model_config)
    _take_over_carried(args, start)
    with as_config_errors(args):
        config = validated_config(args)
    if args.qwen35_vision:
        check_vision_run(config)
    if not args.skip_train:
        schedule_of_flags(args)
    check_resume(args, start)
    args.qwen35_position = str(start.folder) if start and goes_on_in_data(args, start) else ""
    try:
        with as_config_errors(args):
            imports.set_global_variables(args)
    except ConfigError as error:
        raise tokenizer_error(args, error) from error
    check_tokenizer(args, model_config, imports.get_tokenizer())
    carry_tokenizer(args, model_config, start, imports.get_tokenizer())
    return args, model_config


def read_flags(
    argv: list[str], model_config: Qwen35Config, on_cpu: bool | None = None
) -> argparse.Namespace:
    """megatron's namespace: its defaults, `run_defaults` for the model, and the flags.

    Raises:
        ConfigError: a flag that does not exist, or whose class refuses it; see also
            `take_hybrid_pattern`.
    """
    on_cpu = cpu_mode.is_needed() if on_cpu is None else on_cpu

    def add_ours(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        raise_instead_of_usage(parser)
        megatrons = [action.dest for action in parser._actions]
        _add_model_arguments(parser)
        for flag in ("--moe-token-dispatcher-type", "--cuda-graph-impl"):
            action = parser._option_string_actions[flag]
            action.choices = (*(action.choices or ()), AUTO)
        parser.set_defaults(
            **run_defaults(model_config, on_cpu), **architecture_arguments(model_config)
        )
        check_classes_while_parsing(parser, megatrons, on_cpu=on_cpu)
        return parser

    with _argv(argv):
        args = imports.parse_args(add_ours)
    take_hybrid_pattern(args, model_config)
    return args


def validated_config(args: argparse.Namespace) -> Qwen35TransformerConfig:
    """The model's TransformerConfig (without YaRN); completes the namespace as megatron does.

    megatron's check of arguments refuses Transformer Engine's cross entropy, which its model takes
    and which tests/parity/test_gpu_experts.py holds to float32, and for FSDP the one format of
    checkpoints: both flags are kept out of the check.
    """
    loss, ckpt_format = args.cross_entropy_fusion_impl, args.ckpt_format
    args.cross_entropy_fusion_impl = "native"
    if args.use_megatron_fsdp:
        args.ckpt_format = "fsdp_dtensor"
    imports.validate_args(args)
    args.cross_entropy_fusion_impl, args.ckpt_format = loss, ckpt_format
    args.variable_seq_lengths = lengths_vary(args)
    return imports.core_transformer_config_from_args(args, Qwen35TransformerConfig)


def choose_model(flavor: str | None, hf_config: str | None, overrides: list[str]) -> Qwen35Config:
    """The model of ``--flavor`` or ``--hf-config``, with every ``--override KEY=VALUE`` applied.

    Values are JSON (or a bare word); see `Qwen35Config.changed`.

    Raises:
        ConfigError: not exactly one of the two, an unknown key, or an impossible value.
    """
    if (flavor is None) == (hf_config is None):
        raise ConfigError(
            "a run needs exactly one model",
            got=f"--flavor {flavor} --hf-config {hf_config}",
            allowed="--flavor NAME, --hf-config PATH of a config.json, or a Hugging Face folder as "
            "--pretrained-checkpoint",
            fix="see `qwen35 flavors` for the names",
        )
    model_config = get_flavor(flavor) if flavor else Qwen35Config.from_hf(str(hf_config))
    return model_config.changed(**dict(_parse_override(item) for item in overrides))


def _parse_override(item: str) -> tuple[str, Any]:
    key, equals, text = item.partition("=")
    known = [f.name for f in fields(Qwen35Config) if not f.name.startswith("carried")]
    if not equals or key not in known:
        raise ConfigError(
            "cannot read --override",
            got=item,
            allowed=f"KEY=VALUE with KEY one of {', '.join(known)}",
        )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # numbers of too many digits, lists too deep
        value = text
    return key, tuple(value) if isinstance(value, list) else value


def run_defaults(model_config: Qwen35Config, on_cpu: bool | None = None) -> dict[str, Any]:
    """Defaults for what the architecture leaves open, on this machine (or on the one named)."""
    defaults: dict[str, Any] = {
        "dist_ckpt_optim_fully_reshardable": True,  # the usual format cannot change TP or PP
        "eval_interval": 1000,  # megatron divides by it and has no default
        "create_attention_mask_in_dataloader": False,
        "attention_softmax_in_fp32": True,
        "calculate_per_token_loss": True,  # else unequal masks weigh tokens by their rank
        "megatron_fsdp_main_grads_dtype": "fp32",  # as of every other bf16 run
        "muon_tp_mode": "duplicated",  # megatron's blockwise takes a rank's part for a matrix
        "rerun_mode": "disabled",  # its check of losses and gradients then includes the first step
        # without experts, too: megatron lets no sequences of several lengths beside allgather
        "moe_token_dispatcher_type": "alltoall",
    }
    if model_config.is_moe:
        defaults |= {
            "moe_router_load_balancing_type": "global_aux_loss",
            "moe_aux_loss_coeff": model_config.router_aux_loss_coef,
            "moe_grouped_gemm": True,
        }
    if cpu_mode.is_needed() if on_cpu is None else on_cpu:
        return defaults | {
            "transformer_impl": "local",
            "distributed_backend": "gloo",
            "gradient_accumulation_fusion": False,
            "gradient_reduce_div_fusion": False,  # a reduction of NCCL's
            "masked_softmax_fusion": False,
            "bias_dropout_fusion": False,
            "bias_swiglu_fusion": False,
            "apply_rope_fusion": False,
            "no_persist_layer_norm": True,
        }
    if model_config.is_moe:
        defaults["moe_token_dispatcher_type"] = AUTO
    return defaults | {
        "cuda_graph_impl": AUTO,
        "moe_permute_fusion": model_config.is_moe,
        "moe_router_fusion": model_config.is_moe,
        # the float32 copies of 248k logits per token cost more than several layers
        "cross_entropy_loss_fusion": True,
        "cross_entropy_fusion_impl": cross_entropy_default(),
    }


def _model_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    raise_instead_of_usage(parser)
    return _add_model_arguments(parser)


def _add_model_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group(title="qwen3.5")
    group.add_argument("--flavor", help="A published size; see `qwen35 flavors`.")
    group.add_argument("--hf-config", help="A Hugging Face config.json, or its folder.")
    group.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="Change the model: a Hugging Face field and a JSON value, e.g. num_experts=64.",
    )
    group.add_argument(
        "--decoder",
        choices=DECODERS,
        default=DECODERS[0],
        help="Which of Megatron's models assembles the layers: GPTModel or HybridModel. Weights, "
        "losses and checkpoints are the same. With hybrid, --hybrid-layer-pattern can end a "
        "pipeline stage between a token mixer and its feed-forward.",
    )
    group.add_argument(
        "--gdn-kernel",
        choices=KERNELS,
        default="auto",
        help="Kernels of the GatedDeltaNet. auto prints what it chose and why.",
    )
    group.add_argument(
        "--gdn-context-parallel",
        choices=GDN_CONTEXT_PARALLEL,
        default=GDN_CONTEXT_PARALLEL[0],
        help="How context-parallel ranks share a GatedDeltaNet. all_to_all: each rank takes some "
        "heads of the whole sequence. state_passing: each rank keeps its tokens and passes states "
        "on; the number of heads sets no limit.",
    )
    group.add_argument(
        "--moe-experts",
        choices=("auto", "grouped_mm", "te"),
        default="auto",
        help="Routed experts on a GPU. grouped_mm: one kernel for all experts, bf16 also in an FP8 "
        "run. te: Transformer Engine's, in FP8 where the run is. auto: grouped_mm wherever it can "
        "run.",
    )
    group.add_argument(
        "--loss-per-microbatch",
        action="store_false",
        dest="calculate_per_token_loss",
        help="Megatron's own default: a step's loss is the mean over ranks and microbatches of "
        "their mean losses. Without this flag it is the mean over the step's counted tokens. The "
        "two differ where loss masks do (--eod-mask-loss, padding): a token then counts more in a "
        "microbatch, or on a context-parallel rank, that has fewer of them, so the gradients "
        "depend on the microbatch size and the parallel layout.",
    )
    group.add_argument(
        "--accept-untested-megatron",
        action="store_true",
        help="On a release of megatron-core that this package was not tested with, also apply the "
        "patches that no probe can judge; see `qwen35 doctor --patches`.",
    )
    group.add_argument(
        "--float32-main-params",
        action="store_true",
        help="In a --bf16 run that starts from a checkpoint's weights alone (an import), fill the "
        "optimizer's main parameters with them unrounded. For float32 sources; takes 4 bytes a "
        "parameter of the rank while loading. A run that resumes has its main parameters already.",
    )
    add_image_arguments(parser)
    return parser


def _with_readable_help(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """argparse formats help texts with %, and one of megatron's has a bare percent sign."""
    _add_model_arguments(parser)
    for action in parser._actions:
        describe(action)
        try:
            _ = (action.help or "") % vars(action)
        except (ValueError, TypeError, KeyError):
            action.help = str(action.help).replace("%", "%%")
    return parser


def _let_choices_be_read(args: argparse.Namespace) -> None:
    """What this package chooses is said once, by rank 0, unless a level of the log is named.

    megatron shows that much only where no library has written to the log before it is imported.

    Raises:
        ConfigError: ``MEGATRON_LOGGING_LEVEL`` is no number.
    """
    named = os.environ.get("MEGATRON_LOGGING_LEVEL")
    if named is not None and not re.fullmatch(r"\s*[+-]?\d+\s*", named):
        raise ConfigError(
            "the variable MEGATRON_LOGGING_LEVEL is a number",
            got=named,
            allowed="10 (debug), 20 (info), 30 (warning), 40 (error)",
            fix="correct it, or unset it",
        )
    if args.logging_level is None and named is None:
        level = logging.INFO if args.rank == 0 else logging.WARNING
        logging.getLogger(qwen35_mcore.__name__).setLevel(level)


def _complete(args: argparse.Namespace, model_config: Qwen35Config) -> None:
    """What no default can say, because it depends on other flags."""
    args.qwen35_hf_config = json.dumps(model_config.to_hf(), sort_keys=True)
    if args.optimizer in MUON:
        args.qwen35_muon = "each matrix"  # what a checkpoint says of its optimizer state
        args.gdn_gates_apart = True  # so that Adam can take the logits b and a
    if args.tensor_model_parallel_size > 1 and model_config.is_moe:
        args.sequence_parallel = True  # megatron refuses to train MoE under TP without it
    if args.use_megatron_fsdp:
        # Transformer Engine's and megatron's layers write over the gradient of another use of a
        # weight there, as the MTP layer's use of the output weight
        args.gradient_accumulation_fusion = False
    elif args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1:
        # megatron insists: it orders communication before the computation that overlaps it
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _tokenizer_from_sidecar(args)


def _take_over_carried(args: argparse.Namespace, start: Start | None) -> None:
    args.qwen35_origin = start.carried if start is not None else ""
    if start is not None and start.carried and args.save and args.rank == 0:
        take_over(start.carried, start.folder.parent, Path(args.save))


def _tokenizer_from_sidecar(args: argparse.Namespace) -> None:
    """Without ``--tokenizer-type``, the tokenizer that made the first dataset."""
    prefixes = dataset_prefixes(args)
    if args.tokenizer_type is not None or not prefixes:
        return
    sidecar = read_sidecar(prefixes[0])
    if sidecar is None:
        return
    args.qwen35_tokenizer_sidecar = f"{prefixes[0]}.json"
    flags = sidecar.megatron_flags()
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        name = flag.removeprefix("--").replace("-", "_")
        setattr(args, name, int(value) if value.isdecimal() else value)


class _argv:  # noqa: N801
    """megatron's parser reads ``sys.argv``."""

    def __init__(self, argv: list[str]) -> None:
        self.argv = [sys.argv[0], *argv]

    def __enter__(self) -> None:
        self.saved, sys.argv = sys.argv, self.argv

    def __exit__(self, *exc: object) -> None:
        sys.argv = self.saved
