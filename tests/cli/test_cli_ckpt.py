"""The `qwen35-ckpt` command line: help, dry runs, explanations, repo ids."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from checkpoint_tools.cli import app, parse_size
from tests.cli.test_docs import commands, parse_click
from tests.helpers.ckpt_cli import ROOT, ckpt, ckpt_process, ok, refused
from tests.helpers.hf_toy import write_toy


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "moe"
    write_toy(folder, "qwen3_5_moe")
    return folder


@pytest.mark.parametrize("command", [[], ["import"], ["export"], ["verify"], ["inspect"]])
def test_help_needs_neither_torch_nor_transformers(command: list[str]) -> None:
    script = (
        "import sys; from checkpoint_tools.cli import main; sys.argv = sys.argv[:1] + "
        f"{[*command, '--help']!r}\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'megatron', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("import", "HF_DIR OUT_DIR"),
        ("export", "CHECKPOINT HF_OUT"),
        ("verify", "A B"),
        ("inspect", "DIR"),
    ],
)
def test_usage_names_arguments_as_the_readme_does(command: str, usage: str) -> None:
    shown = re.sub(r"[{}]", "", ok(ckpt(command, "--help")).out)  # typer: needed arguments
    assert f"{command} [OPTIONS] {usage}" in " ".join(shown.split())
    missing = ckpt(command)
    assert missing.code == 2
    assert f"Missing argument '{usage.split()[0]}'" in missing.err
    readme = (ROOT / "checkpoint_tools" / "README.md").read_text()
    assert re.search(rf"^qwen35-ckpt {command} +{' +'.join(usage.split())} ", readme, re.MULTILINE)


def test_commands_of_the_readme_parse() -> None:
    words = commands("checkpoint_tools/README.md")
    assert {command[1] for command in words} == {"import", "export", "verify", "inspect"}
    for command in words:
        parse_click(typer.main.get_command(app), command)


def test_no_such_option_is_exit_2(moe: Path) -> None:
    assert ckpt_process("import", moe, "--nonsense").code == 2


def test_dry_run_reports_and_writes_nothing(moe: Path, tmp_path: Path) -> None:
    report = json.loads(ok(ckpt("import", moe, tmp_path / "m", "--dry-run", "--json")).out)
    assert report["dry_run"] is True
    assert report["carried"] == 33
    assert not list(tmp_path.iterdir())
    ok(ckpt("import", moe, tmp_path / "m"))
    report = json.loads(
        ok(ckpt("export", tmp_path / "m", tmp_path / "h", "--dry-run", "--json")).out
    )
    assert "config.json" in report["files"]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert "would write" in ok(ckpt("export", tmp_path / "m", tmp_path / "h", "--dry-run")).out


def test_explain_says_where_and_how(moe: Path, tmp_path: Path) -> None:
    prefix = "model.language_model.layers"
    told = ok(
        ckpt("import", moe, tmp_path / "m", "--explain", f"{prefix}.3.self_attn.k_proj.weight")
    )
    assert "decoder.layers.3.self_attention.linear_qkv.weight [384, 64]" in told.out
    assert "per key/value head" in told.out
    key = "decoder.layers.0.mlp.experts.experts.linear_fc1.weight"
    told = ok(ckpt("import", moe, tmp_path / "m", "--explain", key))
    assert "expert parallelism splits axis 0" in told.out
    told = ok(ckpt("import", moe, tmp_path / "m", "--explain", f"{prefix}.0.linear_attn.A_log"))
    assert "float32" in told.out
    vision = "model.visual.merger.norm.weight"
    assert "carried" in ok(ckpt("import", moe, tmp_path / "m", "--explain", vision)).out
    refused(ckpt("import", moe, tmp_path / "m", "--explain", "mtp.fc.wight"), "mtp.fc.weight")
    assert not list(tmp_path.iterdir())


def test_explain_reads_a_megatron_checkpoint_too(moe: Path, tmp_path: Path) -> None:
    ok(ckpt("import", moe, tmp_path / "m", "--layout", "mcore"))
    key = "decoder.layers.0.self_attention.out_norm.weight"
    told = ok(ckpt("export", tmp_path / "m", tmp_path / "h", "--explain", key))
    assert "minus one" in told.out


def test_a_repo_id_goes_through_the_hub_cache(moe: Path, tmp_path: Path) -> None:
    """A cached snapshot is what huggingface_hub finds offline."""
    repo = tmp_path / "hub" / "models--toy--moe"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(moe, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    cache = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    ok(ckpt_process("import", "toy/moe", tmp_path / "m", **cache))
    ok(ckpt("verify", moe, tmp_path / "m"))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500MiB", 500 * 2**20),
        ("1000", 1000),
        ("1.5 kB", 1500),
        ("2T", 2 * 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_a_closed_output_is_no_failure() -> None:
    """Under a daemon there is none."""
    command = f"{sys.executable} -m checkpoint_tools.cli --help >&-"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
