"""Images on a CPU: train a tiny vision-language model to read digits, stop, resume, export, ask.

    python examples/demo_vision.py      (or `make demo-vision`, which installs first)

The pictures are scikit-learn's 1,797 handwritten digits; a tenth of them is held out. Two processes
share the experts. At the end the trained model and `transformers`, which loads the exported folder,
answer the same question about every held-out picture. Everything printed is in demo.log.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from demo import DemoError, TrainingOutput, console, prepare, run_logged, shown

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.config.model_config import Qwen35Config

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTION, ANSWER = "Which digit is this?", "It is a {}."
SIDE, PATCH = 16, 4  # pixels of a picture and of a patch: 16 patches, which are four tokens
HELD_OUT, ROOM = 10, 12  # every tenth picture; tokens of an answer
TOKENS = {
    name: f"<|{name}|>"
    for name in (
        *("endoftext", "im_start", "im_end", "vision_start", "vision_end"),
        *("image_pad", "video_pad"),
    )
}
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}
{%- endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""
TRAINING = (
    *("--expert-model-parallel-size", "2", "--use-distributed-optimizer", "--num-workers", "0"),
    *("--seq-length", "48", "--micro-batch-size", "16", "--global-batch-size", "32"),
    *("--lr", "3e-3", "--min-lr", "3e-4", "--lr-decay-style", "cosine"),
    *("--lr-warmup-fraction", "0.07"),
    *("--log-interval", "20", "--eval-interval", "1000", "--eval-iters", "4"),
)


def main() -> int:
    args = parse_arguments()
    output, started = args.output, time.monotonic()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same run on every machine, GPUs or not
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the cores
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it advises kernels of GPUs
    try:
        prepare(output)
        headline("1", "write scikit-learn's digits as pictures, with a question about each")
        held_out = write_data(output)
        headline("2", f"train with two processes and stop at iteration {args.stop_at}")
        train(output, args.iters, "--exit-interval", args.stop_at)
        headline("3", "run it again: it continues with the next picture")
        resumed = train(output, args.iters)
        if resumed.resumed_at != args.stop_at:
            raise DemoError(f"the second run began at {resumed.resumed_at}; see demo.log")
        headline("4", "export it, and ask both models about the pictures that were held out")
        run(output, "qwen35-ckpt", "export", output / "checkpoints", output / "exported")
        with open(output / "demo.log", "a") as log, contextlib.redirect_stderr(log):
            accuracy = ask(output, held_out)
    except DemoError as error:
        console.print(f"[bold red]error:[/] {error}")
        return 1
    console.print(
        f"\n[bold green]done in {time.monotonic() - started:.0f} s[/]\n"
        f"  named rightly        [bold]{accuracy:.1%}[/] of {len(held_out)} held-out pictures, in "
        "the same words by both\n"
        f"  for transformers     {shown(output / 'exported')}\n"
        f"  everything printed   {shown(output / 'demo.log')}"
    )
    if accuracy <= args.wanted:
        console.print(f"[bold red]error:[/] that is not more than {args.wanted:.0%}")
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo-vision"))
    parser.add_argument("--iters", type=int, default=480, help="iterations in all")
    parser.add_argument("--stop-at", type=int, help="iteration to stop at; default: 5/8 of --iters")
    parser.add_argument("--wanted", type=float, default=0.9, help="share to be named rightly")
    args = parser.parse_args()
    args.stop_at = args.stop_at or max(1, args.iters * 5 // 8)
    if not 0 < args.stop_at < args.iters:
        parser.error("--stop-at must be between 1 and --iters - 1")
    args.output = args.output.resolve()
    return args


def write_data(output: Path) -> list[tuple[Path, str]]:
    """The model's folder without weights, and the dataset; returns the held-out pictures and what
    is to be said of them."""
    write_model(output / "model")
    pictures = write_pictures(output / "data" / "pictures")
    held_out = [each[0] for each in pictures[::HELD_OUT]]
    seen = [one for number, each in enumerate(pictures) if number % HELD_OUT for one in each]
    corpus = output / "data" / "digits.jsonl"
    corpus.write_text("".join(json.dumps({"messages": conversation(*one)}) + "\n" for one in seen))
    flags = ("--processor", output / "model", "--output-dir", output / "data" / "shards")
    run(output, "qwen35", "data", "images", corpus, *flags, "--split", "95,5,0", "--quiet")
    console.print(f"  {len(seen):,} pictures to learn from, {len(held_out)} held out")
    return held_out


def write_model(folder: Path) -> None:
    """What the published folders have beside weights: config, tokenizer, template, processor."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=list(TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [f"user\n{QUESTION}\nassistant\n{ANSWER.format(name)}" for name in NAMES]
    backend.train_from_iterator(text, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=TOKENS["im_end"], pad_token=TOKENS["endoftext"]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    ids = {
        kind: tokenizer.convert_tokens_to_ids(TOKENS[f"{kind}_pad"]) for kind in ("image", "video")
    }
    (folder / "config.json").write_text(json.dumps(model_config(ids).to_hf(), indent=2))
    common = {
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": 64, "longest_edge": 4096},  # pixels of the smallest and largest
        "processor_class": "Qwen3VLProcessor",
    }
    for name, kind in (
        ("preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessorFast"}),
        ("video_preprocessor_config.json", {"video_processor_type": "Qwen3VLVideoProcessor"}),
    ):
        (folder / name).write_text(json.dumps(common | kind, indent=2))


def model_config(ids: dict[str, int]) -> Qwen35Config:
    """tiny-moe without MTP, with a tower of two blocks."""
    text = get_flavor("tiny-moe", mtp_num_hidden_layers=0)
    tower = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "patch_size": PATCH,
        "num_position_embeddings": 16,
        "out_hidden_size": text.hidden_size,
    }
    outer = {"vision_config": tower} | {f"{kind}_token_id": one for kind, one in ids.items()}
    return replace(text, model_type="qwen3_5_moe", carried_outer=outer)


def write_pictures(folder: Path) -> list[list[tuple[Path, str]]]:
    """Files of every digit, as it is and moved by a pixel to either side, each with its name."""
    from PIL import Image, ImageChops
    from sklearn.datasets import load_digits

    folder.mkdir(parents=True)
    digits, pictures = load_digits(), []
    for number, (levels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        picture = Image.fromarray((levels * 15.9).astype("uint8")).convert("RGB")
        picture = picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)
        pictures.append([])
        for moved in (0, 1, -1):
            path = folder / f"{number}{'' if not moved else f'_{moved}'}.png"
            ImageChops.offset(picture, moved, moved).save(path)
            pictures[-1].append((path, NAMES[digit]))
    return pictures


def conversation(picture: Path, name: str | None = None) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": str(picture)}, {"type": "text", "text": QUESTION}]
    answer = [{"role": "assistant", "content": ANSWER.format(name)}] if name else []
    return [{"role": "user", "content": parts}, *answer]


def train(output: Path, iters: int, *more: object) -> TrainingOutput:
    printed = TrainingOutput(iters)
    launch = (sys.executable, "-m", "qwen35_mcore.training.launch", "--standalone")
    checkpoints = output / "checkpoints"
    with printed:
        run(
            output,
            *(*launch, "--nproc-per-node", 2, "-m", "qwen35_mcore.training.pretrain"),
            *("--hf-config", output / "model", "--vision", "--image-data", output / "data/shards"),
            *("--save", checkpoints, "--load", checkpoints, "--save-interval", iters),
            *("--train-iters", iters, *TRAINING, *more),
            on_line=printed,
        )
    return printed


def ask(output: Path, held_out: list[tuple[Path, str]]) -> float:
    """Share of held-out pictures that are named rightly.

    Raises:
        DemoError: the two models answer in other words.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    from qwen35_mcore.data.images.chat import load_chat

    processor = load_chat(str(output / "exported")).processor
    questions = processor.apply_chat_template(
        [conversation(picture) for picture, _ in held_out],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    length = questions["input_ids"].shape[1]
    exported = AutoModelForImageTextToText.from_pretrained(output / "exported", dtype=torch.float32)
    with torch.no_grad():
        written = {
            "transformers": exported.generate(**questions, max_new_tokens=ROOM, do_sample=False),
            "the trained model": generate(trained_model(output), questions),
        }
    theirs, ours = (
        [answer.split(TOKENS["im_end"])[0] for answer in processor.batch_decode(ids[:, length:])]
        for ids in written.values()
    )
    for (picture, _), a, b in zip(held_out, theirs, ours, strict=True):
        if a != b:
            raise DemoError(f"{picture}: transformers says {a!r}, and the trained model {b!r}")
    console.print(f"  {shown(held_out[0][0])}: {QUESTION} {ours[0]}")
    right = [ANSWER.format(name) for _, name in held_out]
    return sum(a == b for a, b in zip(ours, right, strict=True)) / len(right)


def trained_model(output: Path) -> Any:
    """The model of the last checkpoint, as Megatron runs it."""
    import qwen35_mcore as qwen35
    from qwen35_mcore.mcore.checkpoint_files import tracked_folder
    from qwen35_mcore.mcore.imports import dist_checkpointing

    qwen35.initialize_model_parallel()
    config_of_model = Qwen35Config.from_hf(output / "model")
    config = qwen35.transformer_config(config_of_model, transformer_impl="local")
    model = qwen35.build_model(config_of_model, config, vision=True).eval()
    folder = tracked_folder(output / "checkpoints")
    weights = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder))
    model.load_state_dict(weights["model"])
    return model


def generate(model: Any, questions: dict[str, Any]) -> Any:
    """The questions ``[b, s]`` and what the model finds most likely behind them."""
    import torch

    tokens = questions["input_ids"]
    images = {name: questions[name] for name in ("pixel_values", "image_grid_thw")}
    for _ in range(ROOM):
        logits = model(tokens, None, None, **images)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens


def headline(number: str, text: str) -> None:
    console.print(f"[bold]\\[{number}/4] {text}[/]")


def run(output: Path, *command: object, on_line: Any = lambda line: None) -> None:
    words = [str(word) for word in command]
    console.print(f"  $ {' '.join([Path(words[0]).name, *words[1:4]])} ...", markup=False)
    status, cause = run_logged(words, output, on_line)
    if status:
        raise DemoError(f"{words[0]} ended with exit status {status}: {cause}; see demo.log")


if __name__ == "__main__":
    sys.exit(main())
