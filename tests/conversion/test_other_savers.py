"""What transformers, trainers and wrappers save is imported, exported, and the same model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_tools.hf.tensor_names import renamed
from tests.helpers.ckpt_cli import ckpt, ok, refused
from tests.helpers.hf_reference import load_pretrained, logits_of
from tests.helpers.hf_toy import KINDS, edit_config, pack_experts, read_all, rewrite, write_toy
from tests.helpers.kinds import kinds

Tensors = dict[str, torch.Tensor]
FAMILY = {
    f"{kind}{' tied' * tied}{' mtp' * mtp}": (kind, tied, mtp)
    for kind in KINDS
    for tied in (False, True)
    for mtp in (False, True)
}


@pytest.mark.parametrize("member", kinds(FAMILY, ("qwen3_5 mtp", "qwen3_5_moe_text tied")))
def test_import_export_load_generate_and_import_again(tmp_path: Path, member: str) -> None:
    kind, tied, mtp = FAMILY[member]
    source, back = tmp_path / "hf", tmp_path / "back"
    write_toy(source, kind, tied=tied, mtp=mtp)
    if tied and "moe" in kind:
        rewrite(source, pack_experts)
    ok(ckpt("import", source, tmp_path / "m"))
    ok(ckpt("export", tmp_path / "m", back))
    ok(ckpt("import", back, tmp_path / "again"))
    ok(ckpt("verify", tmp_path / "m", tmp_path / "again"))
    model = load_pretrained(back)
    assert torch.equal(logits_of(model), logits_of(load_pretrained(source)))
    generated = model.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > 3
    assert json.loads(ok(ckpt("inspect", back, "--json")).out)["mtp"] is mtp


def test_qwen3_next_whose_config_does_not_mention_the_mtp_layer(tmp_path: Path) -> None:
    """As it is published the layer is there; transformers drops it when it saves."""
    source, saved = tmp_path / "hf", tmp_path / "saved"
    write_toy(source, "qwen3_next")
    config = json.loads((source / "config.json").read_text())
    del config["num_nextn_predict_layers"]
    (source / "config.json").write_text(json.dumps(config))
    ok(ckpt("import", source, tmp_path / "m"))
    ok(ckpt("export", tmp_path / "m", tmp_path / "back"))
    ok(ckpt("verify", source, tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config

    load_pretrained(source).save_pretrained(saved)
    refused(ckpt("import", saved, tmp_path / "again"), "also where it is not said", "--no-mtp")
    ok(ckpt("import", saved, tmp_path / "again", "--no-mtp"))
    ok(ckpt("export", tmp_path / "again", tmp_path / "without"))
    said = json.loads((tmp_path / "without" / "config.json").read_text())
    assert said["num_nextn_predict_layers"] == 0
    ok(ckpt("import", tmp_path / "without", tmp_path / "third"))


def saved_as_text(source: Path, folder: Path) -> None:
    """The usual way of text-only fine-tuning: the text class of a vision-language folder."""
    load_pretrained(source, text_only=True).save_pretrained(folder)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", kinds(("qwen3_5", "qwen3_5_moe"), ("qwen3_5_moe",)))
def test_a_vision_language_folder_saved_as_its_text_model(
    tmp_path: Path, kind: str, tied: bool
) -> None:
    write_toy(tmp_path / "vl", kind, tied=tied)
    saved = tmp_path / "saved"
    saved_as_text(tmp_path / "vl", saved)
    assert any(name.startswith("model.language_model.") for name in read_all(saved))
    refused(ckpt("import", saved, tmp_path / "m"), "--no-mtp")
    ok(ckpt("import", saved, tmp_path / "m", "--no-mtp"))
    ok(ckpt("export", tmp_path / "m", tmp_path / "back"))
    ok(ckpt("verify", saved, tmp_path / "back"))
    assert torch.equal(
        logits_of(load_pretrained(tmp_path / "back")), logits_of(load_pretrained(saved))
    )
    ok(ckpt("import", tmp_path / "back", tmp_path / "again"))
    ok(ckpt("verify", tmp_path / "m", tmp_path / "again"))


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_a_vision_language_config_over_the_text_model_alone(tmp_path: Path, prefix: str) -> None:
    source = tmp_path / "hf"
    write_toy(source, "qwen3_5", mtp=False)
    expected = logits_of(load_pretrained(source, text_only=True))
    rewrite(
        source,
        lambda tensors: {
            name.replace("model.language_model.", prefix): tensor
            for name, tensor in tensors.items()
            if not name.startswith("model.visual.")
        },
    )
    refused(ckpt("import", source, tmp_path / "m"), "no vision tower", "Qwen3_5ForCausalLM")
    edit_config(source, architectures=["Qwen3_5ForCausalLM"])
    ok(ckpt("import", source, tmp_path / "m"))
    ok(ckpt("export", tmp_path / "m", tmp_path / "back"))
    assert torch.equal(logits_of(load_pretrained(tmp_path / "back", text_only=True)), expected)
    ok(ckpt("import", tmp_path / "back", tmp_path / "again"))
    ok(ckpt("verify", tmp_path / "m", tmp_path / "again"))


def inside(name: str) -> str:
    """As FSDP and activation checkpointing name what they wrap layer by layer."""
    for part in ("layers.0.", "layers.3."):
        name = name.replace(part, f"{part}_fsdp_wrapped_module._checkpoint_wrapped_module.")
    return f"_fsdp_wrapped_module.{name}"


WRAPPED: dict[str, Callable[[str], str]] = {
    "DDP": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "PEFT": lambda name: f"base_model.model.{name}",
    "DeepSpeed and torch.compile": lambda name: f"module._orig_mod.{name}",
    "Fabric": lambda name: f"_forward_module.{name}",
    "FSDP": inside,
    "a part of another model": lambda name: f"policy.actor.{name}",
    "doubled": lambda name: f"model.{name}",
    "without model.": lambda name: name.removeprefix("model."),
    "head inside": lambda name: f"model.{name}" if name == "lm_head.weight" else name,
    "head inside the language model": lambda name: (
        name.replace("model.", "model.language_model.", 1)
        if name.startswith("model.")
        else f"model.language_model.{name}"
    ),
    "language model first": lambda name: (
        f"language_model.{name}" if not name.startswith("mtp.") else name
    ),
}


@pytest.mark.parametrize("wrapper", kinds(WRAPPED, ("DDP", "FSDP", "head inside")))
def test_the_same_names_under_another_prefix(
    copy_of: Callable[[str], Path], toys: dict[str, Path], tmp_path: Path, wrapper: str
) -> None:
    source = copy_of("qwen3_5_moe_text")
    rewrite(source, lambda tensors: {WRAPPED[wrapper](name): tensors[name] for name in tensors}, 1)
    assert read_all(source).keys() != read_all(toys["qwen3_5_moe_text"]).keys()
    told = ok(ckpt("import", source, tmp_path / "m")).out
    assert " read " in told
    ok(ckpt("verify", toys["qwen3_5_moe_text"], tmp_path / "m"))
    ok(ckpt("export", tmp_path / "m", tmp_path / "back"))
    verified = ok(ckpt("verify", source, tmp_path / "back"))
    assert "note     A: " in verified.out
    names = {
        name.replace(".language_model.", ".") if "language" in wrapper else name
        for name in read_all(tmp_path / "back")
    }
    assert names == read_all(toys["qwen3_5_moe_text"]).keys()
    assert json.loads(ok(ckpt("inspect", source, "--json")).out)["notes"]


def test_a_wrapped_vision_language_model(
    copy_of: Callable[[str], Path], toys: dict[str, Path], tmp_path: Path
) -> None:
    source = copy_of("qwen3_5")
    rewrite(source, lambda ts: {f"base_model.model.{name}": t for name, t in ts.items()})
    ok(ckpt("import", source, tmp_path / "m"))
    ok(ckpt("export", tmp_path / "m", tmp_path / "back"))
    ok(ckpt("verify", toys["qwen3_5"], tmp_path / "back"))
    # as the class without a head names it
    rewrite(
        source,
        lambda ts: {name.removeprefix("base_model.model.model."): t for name, t in ts.items()},
    )
    rewrite(
        source, lambda ts: {name.removeprefix("base_model.model."): t for name, t in ts.items()}
    )
    ok(ckpt("verify", source, tmp_path / "back"))


def test_names_that_fit_no_single_model_stay() -> None:
    layer = "layers.0.input_layernorm.weight"
    one = ["module.model.embed_tokens.weight", f"module.model.{layer}"]
    assert renamed(one).keys() == set(one)
    assert renamed(name.removeprefix("module.") for name in one) == {}
    # a draft model or averaged weights beside: which one is meant?
    assert renamed([*one, "ema.model.embed_tokens.weight"]) == {}
    assert renamed([*one, f"model.{layer}", f"module.module.model.{layer}"]) == {}
    assert renamed([*one, f"adapter.{layer}"]).keys() == set(one)


def test_two_models_in_one_folder_are_not_guessed_about(
    copy_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = copy_of("qwen3_5_text")
    rewrite(
        source,
        lambda ts: {f"{p}.{n}": t.clone() for p in ("student", "teacher") for n, t in ts.items()},
    )
    outcome = ckpt("import", source, tmp_path / "m")
    refused(outcome, "tensors are missing", "not those of transformers")
    refused(ckpt("import", source, tmp_path / "m", "--no-mtp"), "tensors are missing")


def test_buffers_that_are_computed_are_no_obstacle(
    copy_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = copy_of("qwen3_5_text")
    names = ("model.rotary_emb.inv_freq", "model.layers.3.self_attn.rotary_emb.inv_freq")
    rewrite(source, lambda tensors: tensors | {name: torch.ones(4) for name in names})
    ok(ckpt("import", source, tmp_path / "m"))
    ok(ckpt("export", tmp_path / "m", tmp_path / "back"))
    ok(ckpt("verify", source, tmp_path / "back"))
    load_pretrained(tmp_path / "back")


def test_a_tied_model_with_a_copy_of_its_embedding(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    write_toy(source, "qwen3_5_text", tied=True)
    embedding = read_all(source)["model.embed_tokens.weight"]
    rewrite(source, lambda tensors: tensors | {"lm_head.weight": embedding.clone()})
    ok(ckpt("import", source, tmp_path / "m"))
    ok(ckpt("export", tmp_path / "m", tmp_path / "back"))
    ok(ckpt("verify", source, tmp_path / "back"))
    assert torch.equal(
        logits_of(load_pretrained(source)), logits_of(load_pretrained(tmp_path / "back"))
    )


def test_a_tied_model_that_kept_its_head_alone(tmp_path: Path) -> None:
    """As safetensors' own deduplication may leave it."""
    source = tmp_path / "hf"
    write_toy(source, "qwen3_5_text", tied=True, mtp=False)
    before = logits_of(load_pretrained(source))
    rewrite(
        source, lambda ts: {n.replace("model.embed_tokens", "lm_head"): t for n, t in ts.items()}
    )
    refused(ckpt("import", source, tmp_path / "m"), "stored as lm_head.weight", "transformers")
    load_pretrained(source).save_pretrained(tmp_path / "saved")
    ok(ckpt("import", tmp_path / "saved", tmp_path / "m"))
    ok(ckpt("export", tmp_path / "m", tmp_path / "back"))
    assert torch.equal(logits_of(load_pretrained(tmp_path / "back")), before)


def test_a_tied_model_with_another_head(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    write_toy(source, "qwen3_5_text", tied=True)
    rewrite(source, lambda ts: ts | {"lm_head.weight": ts["model.embed_tokens.weight"] * 2})
    refused(ckpt("import", source, tmp_path / "m"), "set tie_word_embeddings to false")
    before = logits_of(load_pretrained(source))
    edit_config(source, tie_word_embeddings=False)
    ok(ckpt("import", source, tmp_path / "m"))
    ok(ckpt("export", tmp_path / "m", tmp_path / "back"))
    assert torch.equal(logits_of(load_pretrained(tmp_path / "back")), before)


def test_experts_packed_in_some_layers_only(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = copy_of("qwen3_5_moe_text")

    def mix(tensors: Tensors) -> Tensors:
        packed = pack_experts(tensors)
        first = "model.layers.0.mlp.experts."
        return {n: t for n, t in tensors.items() if not n.startswith(first)} | {
            n: t for n, t in packed.items() if n.startswith(first)
        }

    rewrite(source, mix)
    refused(ckpt("import", source, tmp_path / "m"), "some layers hold their experts packed")
    load_pretrained(source).save_pretrained(tmp_path / "saved")
    ok(ckpt("import", tmp_path / "saved", tmp_path / "m", "--no-mtp"))


def test_tokenizer_and_generation_work_from_an_export(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source, back = tmp_path / "hf", tmp_path / "back"
    write_toy(source, "qwen3_5_text")
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt"):
        (source / name).unlink()
    words = [*"abcdefgh", "<eos>"]
    make_word_tokenizer(words, source)
    ok(ckpt("import", source, tmp_path / "m"))
    ok(ckpt("export", tmp_path / "m", back))
    tokenizer = AutoTokenizer.from_pretrained(back)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a b"}], tokenize=True, return_tensors="pt"
    )
    out = load_pretrained(back).generate(**chat, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(out[0, :2]) == "a b"
    assert (back / "chat_template.jinja").read_bytes() == (
        source / "chat_template.jinja"
    ).read_bytes()


def make_word_tokenizer(words: list[str], folder: Path) -> None:
    """A tokenizer of these words, with a chat template, as transformers saves it today."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)


def test_a_trainers_folder_leaves_its_own_checkpoints_behind(
    copy_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = copy_of("qwen3_5_text")
    inner = source / "checkpoint-500"
    inner.mkdir()
    shutil.copy(source / "config.json", inner)
    torch.save({"step": 500}, inner / "optimizer.pt")
    torch.save({"lr": 1}, source / "training_args.bin")
    report: dict[str, Any] = json.loads(ok(ckpt("import", source, tmp_path / "m", "--json")).out)
    assert not any("checkpoint-500" in name for name in report["files"])
    assert any("checkpoint-500/" in note for note in report["notes"])
    assert any("training_args.bin" in note for note in report["notes"])
