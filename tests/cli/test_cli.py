# SPDX-License-Identifier: Apache-2.0
"""The command line end to end on the shipped model: results, JSON, and one sentence for each bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vericache.cli import main
from vericache.models import find_model

PROMPT = "def area(width, height):\n    return"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ((), ("--help",)):
        code, out, _ = run(capsys, *arguments)
        assert code == 0
        assert all(name in out for name in ("generate", "compare", "models", "compressors"))
    for command in ("generate", "compare", "models", "compressors"):
        code, out, _ = run(capsys, command, "--help")
        assert code == 0 and "--json" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import vericache

    assert run(capsys, "--version") == (0, f"vericache {vericache.__version__}\n", "")


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "models", "--json")
    (nano,) = json.loads(out)["models"]
    assert (code, err, nano["name"]) == (0, "", "vericache-nano")
    assert (
        nano["q_heads"] // nano["kv_heads"] >= 4 and nano["head_dim"] == 64 and nano["max_positions"] >= 16384
    )
    assert nano["kv_bytes_per_token"] == 2 * nano["layers"] * nano["kv_heads"] * 64 * 2
    code, out, _ = run(capsys, "models", str(find_model("vericache-nano")))
    assert code == 0 and "LlamaForCausalLM" in out


def test_compressors(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "compressors")
    assert code == 0 and all(name in out for name in ("snapkv", "kivi", "identity", "random", "ratio"))
    code, out, _ = run(capsys, "compressors", "--json")
    assert {c["name"] for c in json.loads(out)["compressors"]} == {"snapkv", "kivi", "identity", "random"}


@pytest.mark.parametrize("mode", ["full", "lossy", "vericache", "auto"])
def test_generate(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("generate", PROMPT, "--mode", mode, "-n", "12", "-c", "identity", "--logprobs", "--json")
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    (output,) = json.loads(out)["outputs"]
    assert 1 <= len(output["token_ids"]) <= 12
    assert len(output["logprobs"]) == len(output["token_ids"])
    assert output["finish_reason"] in ("stop", "length") and output["error"] is None


def test_text_goes_to_stdout_and_figures_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "generate", PROMPT, "-n", "12", "--json")
    text = json.loads(out)["outputs"][0]["text"]
    code, out, err = run(capsys, "generate", PROMPT, "-n", "12")
    assert (code, out) == (0, text + "\n")
    assert err.startswith("vericache: ") and err.count("\n") == 1
    code, out, err = run(capsys, "generate", PROMPT, "-n", "12", "--stream")
    assert (code, out, err) == (0, text + "\n", "")
    code, out, err = run(capsys, "generate", PROMPT, "-n", "12", "--stream", "--json")
    chunks = [json.loads(line) for line in out.splitlines()]
    assert "".join(chunk["text"] for chunk in chunks) == text
    assert [chunk["finished"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_prompt_files_are_used_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    _, direct, _ = run(capsys, "generate", PROMPT, "-n", "8", "--json")
    _, read, _ = run(capsys, "generate", "-f", str(file), "-n", "8", "--json")
    assert json.loads(direct)["outputs"][0]["token_ids"] == json.loads(read)["outputs"][0]["token_ids"]
    file.write_text(PROMPT + "\n")
    _, longer, _ = run(capsys, "generate", "-f", str(file), "-n", "8", "--json")
    assert json.loads(longer)["outputs"][0]["prompt_tokens"] > json.loads(read)["outputs"][0]["prompt_tokens"]


def test_compare_is_identical(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, answer = tmp_path / "prompt.txt", tmp_path / "answer.txt"
    file.write_text("x = 1\n" * 60 + PROMPT)
    answer.write_text("no such text\n")
    shared = ("compare", "-f", str(file), "--expected-file", str(answer), "-n", "24", "--draft-len", "6")
    code, out, err = run(capsys, *shared, "-c", "random:ratio=0.05", "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    (prompt,) = result["prompts"]
    assert result["vericache_identical"] is True
    assert prompt["vericache"]["token_ids"] == prompt["full"]["token_ids"]
    assert prompt["vericache"]["first_difference"] is None and prompt["full"]["right"] is False
    assert prompt["vericache"]["rounds"] >= 1
    code, out, _ = run(capsys, *shared, "-c", "random:ratio=0.05", "--temperature", "0.9", "--seed", "3")
    assert code == 0 and "identical to full KV" in out and "answer" in out


BAD = [
    (("generate",), "no prompt"),
    (("generate", ""), "prompt"),
    (("generate", "x", "--max-tokens", "-1"), "-1"),
    (("generate", "x", "--max-tokens", "many"), "--max-tokens"),
    (("generate", "x", "--temperature", "-1"), "temperature"),
    (("generate", "x", "--top-p", "0"), "top_p"),
    (("generate", "x", "--mode", "fast"), "'fast'"),
    (("generate", "x", "--compressor", "snapkb"), "did you mean 'snapkv'"),
    (("generate", "x", "--compressor", "snapkv:ratio=0"), "ratio"),
    (("generate", "x", "--compressor", "snapkv:ratio=1.5"), "1.5"),
    (("generate", "x", "--draft-len", "0"), "draft_len"),
    (("generate", "x", "--memory-budget", "lots"), "'lots'"),
    (("generate", "x", "--memory-budget", "1KiB"), "1"),
    (("generate", "x", "--dtype", "int8"), "int8"),
    (("generate", "x", "--device", "tpu"), "tpu"),
    (("generate", "x", "--model", "no-such-model"), "no-such-model"),
    (("generate", "x", "--no-such-option"), "--no-such-option"),
    (("generate", "--prompt-file", "no-such-file"), "no-such-file"),
    (("generate", "x", "y", "--stream"), "--stream"),
    (("generate", "return " * 20000), "17408"),
    (("compare",), "no prompt"),
    (("compare", "x", "--expected-file", "no-such-file"), "--expected-file"),
    (("models", "no-such-model"), "no-such-model"),
    (("no-such-command",), "no-such-command"),
]


@pytest.mark.parametrize(("arguments", "word"), BAD, ids=[" ".join(a)[:60] for a, _ in BAD])
def test_bad_input_is_one_sentence(
    arguments: tuple[str, ...], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and word in err, err


def broken_model(folder: Path, how: str) -> Path:
    shutil.copytree(find_model("vericache-nano"), folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1000])
    else:
        tensors = load_file(shard)
        name = max(tensors, key=lambda key: tensors[key].numel())
        tensors[name].view(-1)[7] = float("nan")
        assert torch.isnan(tensors[name]).sum() == 1
        save_file(tensors, shard, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("how", ["truncated", "nan"])
def test_broken_checkpoint_is_one_sentence(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = broken_model(tmp_path / "model", how)
    code, out, err = run(capsys, "generate", "x", "--model", str(folder))
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert "safetensors" in err or "NaN" in err or "finite" in err, err
