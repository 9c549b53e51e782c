"""The tokenizer that made the data travels with the run into the exported folder."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_tools.mcore.read import MegatronCheckpoint
from checkpoint_tools.table.names import Naming, hf_to_mcore, rows
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.data import tokenize
from qwen35_mcore.training.carried_files import store
from qwen35_mcore.training.carried_tokenizer import carry_tokenizer
from qwen35_mcore.training.checks.checkpoint import Start
from tests.helpers.ckpt_cli import ckpt, ok
from tests.helpers.hf_reference import modeling
from tests.helpers.hf_toy import save_folder
from tests.helpers.mcore_toy import write_training_checkpoint
from tests.helpers.pretrain_runs import script_server
from tests.helpers.text_data import make_bpe
from tests.helpers.toys import toy_config

TEXT = "x = 1234 + don't  foo\n\n  bar, Grüße 2024-01 <|im_end|> e\u0301"
SPECIAL = {"eos_token": "<|endoftext|>", "pad_token": "<|im_end|>"}


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, **options)


def make_word_level(folder: Path) -> Path:
    """A model and a pre-tokenizer that no Qwen has."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<|endoftext|>", "<|im_end|>", "x", "=", "foo", "bar", "1234"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **SPECIAL)
    fast.save_pretrained(folder)
    return folder


def make_qwen(folder: Path) -> Path:
    """Qwen's own class, as published: with a chat template, vocabulary and merges apart, too."""
    from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

    content = json.loads((make_bpe(folder / "bpe") / "tokenizer.json").read_text())
    shutil.rmtree(folder / "bpe")
    vocab, merges = content["model"]["vocab"], [tuple(m) for m in content["model"]["merges"]]
    Qwen3_5Tokenizer(vocab=vocab, merges=merges, **SPECIAL).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m }}{% endfor %}")
    return folder


def arguments(save: Path | None, prefix: Path | None = None) -> Namespace:
    """What `carry_tokenizer` looks at."""
    data = dict.fromkeys(("data_args_path", "per_split_data_args_path", "train_data_path"))
    data |= dict.fromkeys(("valid_data_path", "test_data_path", "split", "image_data"))
    data["data_path"] = prefix and [str(prefix)]
    return Namespace(save=save and str(save), rank=0, mock_data=prefix is None, **data)


def kept(save: Path, tokenizer: Path | None, config: Qwen35Config, start: Start | None) -> str:
    """Carry a tokenizer into a run's folder; returns its folder's name."""
    args = arguments(save)
    carry_tokenizer(args, config, start, tokenizer and load(tokenizer))
    return str(args.qwen35_tokenizer)


def trained(folder: Path, config: Qwen35Config, **arguments: Any) -> Path:
    """A run's checkpoint of random weights."""
    tensors = {
        spec.name: torch.zeros(spec.shape, dtype=torch.float32 if row.float32 else torch.bfloat16)
        for row in rows(config, Naming.default(config))
        for spec in row.hf
    }
    return write_training_checkpoint(folder, hf_to_mcore(config, tensors), config, **arguments)


def test_from_data_to_generation(tmp_path: Path) -> None:
    """From scratch on two ranks, on from another folder, exported, and asked for text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_bpe(tmp_path / "tokenizer", **SPECIAL)
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"{number} {TEXT} " * 20)
    tokenize(
        inputs=sorted(tmp_path.glob("*.txt")),
        output_prefix=tmp_path / "data",
        tokenizer=str(tmp_path / "tokenizer"),
        workers=1,
        quiet=True,
    )
    command = f"""--flavor tiny-moe --data-path {tmp_path / "data"} --split 80,10,10
        --seq-length 64 --micro-batch-size 1 --global-batch-size 2 --lr 1e-3 --num-workers 0
        --train-iters 2 --lr-decay-style constant --eval-iters 0 --save-interval 1""".split()
    runs = [str(tmp_path / name) for name in ("first", "second")]
    script_server().run([*command, "--save", runs[0], "--exit-interval", "1"], 2)
    byflag = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model"]
    byflag += [str(tmp_path / "tokenizer")]
    script_server().run([*command, *byflag, "--load", runs[0], "--save", runs[1]])
    shutil.rmtree(runs[0])
    shutil.move(tmp_path / "tokenizer", tmp_path / "elsewhere")
    out = ok(ckpt("export", runs[1], tmp_path / "hf")).out
    assert "no tokenizer" not in out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    original = load(tmp_path / "elsewhere")
    assert tokenizer(TEXT).input_ids == original(TEXT).input_ids
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    modeling("qwen3_5_moe")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (0, 1)
    prompt = tokenizer("def f(x):", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > prompt.input_ids.shape[1]
    ok(ckpt("import", tmp_path / "hf", tmp_path / "again"))


@pytest.mark.parametrize("kind", ["qwen3_5_text", "qwen3_5_moe_text"])
@pytest.mark.parametrize("make", [partial(make_bpe, **SPECIAL), make_word_level, make_qwen])
def test_the_same_ids_beside_the_config_of_every_kind(
    make: Callable[[Path], Path], kind: str, tmp_path: Path
) -> None:
    """transformers rebuilds a Qwen3.5's tokenizer by Qwen's rules unless it is told not to."""
    source = make(tmp_path / "tokenizer")
    config = toy_config(moe="moe" in kind)
    name = kept(tmp_path / "run", source, config, None)
    run = trained(tmp_path / "run", config, qwen35_tokenizer=name)
    ok(ckpt("export", run, tmp_path / "hf"))
    before = load(source)
    for options in ({}, {"trust_remote_code": True}):
        after = load(tmp_path / "hf", **options)
        assert after(TEXT).input_ids == before(TEXT).input_ids
        assert after.special_tokens_map == before.special_tokens_map
        assert after.chat_template == before.chat_template
    if make is make_qwen:
        for path in source.iterdir():
            assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes()


def test_ids_that_the_config_says_stay(tmp_path: Path) -> None:
    config = toy_config(carried={"eos_token_id": 7})
    name = kept(tmp_path / "run", make_bpe(tmp_path / "tokenizer", **SPECIAL), config, None)
    ok(ckpt("export", trained(tmp_path / "run", config, qwen35_tokenizer=name), tmp_path / "hf"))
    for file in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "hf" / file).read_text())
        assert (content["eos_token_id"], content["pad_token_id"]) == (7, 1)


def start_from(folder: Path, **saved: str) -> Start:
    """A checkpoint whose arguments name what lies beside it."""
    return Start(folder, {"args": Namespace(**saved)}, 0, loads_optimizer=False)


@pytest.fixture
def imported(tmp_path: Path) -> Start:
    """An import that carried a tokenizer and other files."""
    config = toy_config(carried={"eos_token_id": 7})
    tensors = {
        spec.name: torch.zeros(spec.shape, dtype=torch.bfloat16)
        for row in rows(config, Naming.default(config))
        for spec in row.hf
    }
    save_folder(tmp_path / "source", tensors, config)
    make_qwen(tmp_path / "source")
    (tmp_path / "source/generation_config.json").write_text('{"temperature": 0.6}')
    (tmp_path / "source/README.md").write_text("published")
    ok(ckpt("import", tmp_path / "source", tmp_path / "m"))
    origin = MegatronCheckpoint(tmp_path / "m").argument("qwen35_origin")
    return start_from(tmp_path / "m/release", qwen35_origin=origin)


def exported_after(imported: Start, tokenizer: Path | None, tmp_path: Path) -> dict[str, bytes]:
    """The files of an export after training from the import on data of a tokenizer."""
    config = toy_config(carried={"eos_token_id": 7})
    name = kept(tmp_path / "run", tokenizer, config, imported)
    more = {"qwen35_origin": imported.carried, "qwen35_tokenizer": name}
    run = trained(tmp_path / "run", config, **more)
    shutil.copytree(tmp_path / "m" / imported.carried, run / imported.carried)
    assert "no tokenizer" not in ok(ckpt("export", run, tmp_path / "hf")).out
    return {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}


def test_an_import_keeps_its_tokenizer(
    imported: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the data's is the same, saved in other files."""
    load(tmp_path / "source").save_pretrained(tmp_path / "same")
    files = exported_after(imported, tmp_path / "same", tmp_path)
    for path in (tmp_path / "source").iterdir():
        if path.suffix != ".safetensors":
            assert files[path.name] == path.read_bytes(), path.name
    assert capsys.readouterr().out.count("tokenizer: ") == 0


def test_the_datas_tokenizer_wins_over_the_imports(
    imported: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_word_level(tmp_path / "other")
    files = exported_after(imported, source, tmp_path)
    assert capsys.readouterr().out.count(f"tokenizer: the data were made by {source}") == 1
    assert load(tmp_path / "hf")(TEXT).input_ids == load(source)(TEXT).input_ids
    assert files["README.md"] == b"published"
    assert not files.keys() & {"vocab.json", "chat_template.jinja"}
    for file in ("config.json", "generation_config.json"):
        content = json.loads(files[file])
        assert (content["eos_token_id"], content["pad_token_id"]) == (1, 2)


def test_a_run_goes_on_with_what_it_carried(tmp_path: Path) -> None:
    """Flags that name no tokenizer, and a start in another folder."""
    config = toy_config()
    name = kept(tmp_path / "a", make_bpe(tmp_path / "tokenizer", **SPECIAL), config, None)
    start = start_from(tmp_path / "a/iter_0000001", qwen35_tokenizer=name)
    assert kept(tmp_path / "b", None, config, start) == name
    assert kept(tmp_path / "c", tmp_path / "tokenizer", config, start) == name
    for run in ("b", "c"):
        assert [f.name for f in (tmp_path / run).iterdir()] == [name]
        assert (
            load(tmp_path / run / name)(TEXT).input_ids
            == load(tmp_path / "tokenizer")(TEXT).input_ids
        )


def test_the_sidecar_names_what_the_flags_do_not(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    tokenizer = str(make_bpe(tmp_path / "tokenizer", **SPECIAL))
    for name, made_by in (("hf", tokenizer), ("bytes", "byte")):
        prefix = tmp_path / name
        inputs: list[Path | str] = [tmp_path / "a.txt"]
        tokenize(inputs=inputs, output_prefix=prefix, tokenizer=made_by, workers=1, quiet=True)
        args = arguments(tmp_path / f"run-{name}", prefix)
        carry_tokenizer(args, toy_config(), None, None)
        assert bool(args.qwen35_tokenizer) == (name == "hf")
        assert (tmp_path / f"run-{name}").exists() == (name == "hf")


def test_without_a_tokenizer_the_export_says_so(tmp_path: Path) -> None:
    config = toy_config()
    run = trained(tmp_path / "run", config, tokenizer_type="NullTokenizer")
    out = ok(ckpt("export", run, tmp_path / "hf")).out
    assert "no tokenizer: the run had NullTokenizer" in out
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert names == {"config.json", "model.safetensors"}
    run = trained(tmp_path / "copied", config, qwen35_tokenizer="qwen35-tokenizer-0")
    out = ok(ckpt("export", run, tmp_path / "other")).out
    assert f"no tokenizer: the run's own is not in {run / 'qwen35-tokenizer-0'}" in out


def fill(partial: Path) -> None:
    partial.mkdir()
    for number in range(50):
        (partial / str(number)).write_text("whole")


def test_starts_at_once_and_one_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / ".kept.partial").mkdir()
    (tmp_path / ".kept.partial/0").write_text("ha")
    (tmp_path / ".kept.lock").touch()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=store, args=("kept", tmp_path, fill)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != "."] == ["kept"]
    assert {path.read_text() for path in (tmp_path / "kept").iterdir()} == {"whole"}
    assert len(list((tmp_path / "kept").iterdir())) == 50
