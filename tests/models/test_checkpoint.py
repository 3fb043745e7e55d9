# SPDX-License-Identifier: Apache-2.0
"""Loading: every layout gives the same weights, and every damage one sentence that names the culprit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.tiny_checkpoints import kind_named, write_checkpoint
from vericache.errors import CheckpointError, UnsupportedModelError
from vericache.models import find_model, list_models, load_model
from vericache.models.llama import CausalLM

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    write_checkpoint(kind_named("llama-biases"), folder)
    return folder


@pytest.fixture(scope="module")
def original_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    write_checkpoint(kind_named("llama-biases"), folder, shard_size="200KB")
    return folder


@pytest.fixture
def single(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture
def sharded(original_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original_shards, tmp_path / "sharded"))


def assert_same_weights(one: CausalLM, other: CausalLM) -> None:
    pairs = [(one.weights.embedding, other.weights.embedding), (one.weights.lm_head, other.weights.lm_head)]
    pairs.append((one.weights.final_norm, other.weights.final_norm))
    for mine, theirs in zip(one.weights.layers, other.weights.layers, strict=True):
        assert [t is None for t in mine] == [t is None for t in theirs]
        pairs += [(a, b) for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None]
    for a, b in pairs:
        assert torch.equal(a, b)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def test_shards_equal_the_single_file(single: Path, sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert_same_weights(load_model(single), load_model(sharded))


def test_fused_weights_and_bytes(single: Path) -> None:
    """The fused tensors are q, k, v and gate, up in that order; weight_bytes is what the files hold."""
    tensors = load_file(single / SINGLE)
    model = load_model(single)
    at = "model.layers.2."
    qkv = torch.cat([tensors[f"{at}self_attn.{p}_proj.weight"] for p in "qkv"])
    gate_up = torch.cat([tensors[f"{at}mlp.{p}_proj.weight"] for p in ("gate", "up")])
    qkv_bias = torch.cat([tensors[f"{at}self_attn.{p}_proj.bias"] for p in "qkv"])
    layer = model.weights.layers[2]
    assert torch.equal(layer.qkv, qkv) and torch.equal(layer.gate_up, gate_up)
    assert layer.qkv_bias is not None and torch.equal(layer.qkv_bias, qkv_bias)
    tables = model.cos.nbytes + model.sin.nbytes
    assert model.weight_bytes == sum(tensor.nbytes for tensor in tensors.values()) + tables


def test_tied_weights_count_once(tmp_path: Path) -> None:
    write_checkpoint(kind_named("qwen2"), tmp_path)
    model = load_model(tmp_path)
    assert model.weights.lm_head is model.weights.embedding
    stored = sum(tensor.nbytes for tensor in load_file(tmp_path / SINGLE).values())
    assert model.weight_bytes == stored + model.cos.nbytes + model.sin.nbytes


def test_progress(sharded: Path) -> None:
    calls: list[tuple[int, int]] = []
    load_model(sharded, progress=lambda done, total: calls.append((done, total)))
    total = sum(path.stat().st_size for path in sharded.glob("*.safetensors"))
    assert calls == sorted(calls) and {t for _, t in calls} == {total}
    assert 0 < calls[0][0] < calls[-1][0] <= total and calls[-1][0] > 0.9 * total


def test_stored_dtypes(single: Path) -> None:
    """Any floating dtype in the file; bfloat16 storage rounds once."""
    model = load_model(single)

    def to_half(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.half() for name, tensor in tensors.items()})

    rewrite(single, to_half)
    half = load_model(single)
    assert torch.equal(half.weights.layers[0].down, model.weights.layers[0].down.half().float())
    assert torch.equal(
        load_model(single, dtype=torch.bfloat16).weights.layers[0].down,
        half.weights.layers[0].down.bfloat16(),
    )


def test_more_positions_only_where_the_model_reaches(single: Path) -> None:
    model = load_model(single, max_positions=17)
    assert model.max_positions == model.config.max_positions == 17
    with pytest.raises(UnsupportedModelError, match="0 positions were asked for"):
        load_model(single, max_positions=0)
    with pytest.raises(UnsupportedModelError, match=r"257 positions were asked for.*serves 1 to 256"):
        load_model(single, max_positions=257)


def test_unsupported_storage_dtype(single: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"torch.float16 is not supported; torch.float32 and"):
        load_model(single, dtype=torch.float16)


def test_shipped_names_and_folders(single: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "vericache-nano" in list_models()
    assert find_model("vericache-nano").name == "vericache-nano"
    assert find_model(single) == find_model(str(single)) == single
    with pytest.raises(CheckpointError, match=r"no folder 'no-such-model'.*shipped: .*vericache-nano"):
        find_model("no-such-model")
    with pytest.raises(CheckpointError, match="is a file; name the folder"):
        find_model(single / SINGLE)


def cut(folder: Path, name: str, size: int) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:size] if size >= 0 else data[: len(data) + size])


def fails(folder: Path, words: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedModelError), match=words) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [-1, -1000, 4000])
def test_truncated_file(single: Path, size: int) -> None:
    cut(single, SINGLE, size)
    fails(single, "model.safetensors is truncated: .*; download it again")


@pytest.mark.parametrize("size", [0, 5, 100])
def test_truncated_header(single: Path, size: int) -> None:
    cut(single, SINGLE, size)
    fails(single, "model.safetensors is truncated: it ends inside its header")


def test_truncated_shard(sharded: Path) -> None:
    name = sorted(path.name for path in sharded.glob("*.safetensors"))[1]
    cut(sharded, name, -10)
    fails(sharded, f"{name} is truncated: it has [0-9]+ bytes where its header announces [0-9]+")


def test_missing_shard(sharded: Path) -> None:
    name = sorted(path.name for path in sharded.glob("*.safetensors"))[1]
    (sharded / name).unlink()
    fails(sharded, f"lacks {name}, which {INDEX} lists")


def test_index_that_names_the_wrong_shard(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"][DOWN] = next(name for name in files if name != index["weight_map"][DOWN])
    (sharded / INDEX).write_text(json.dumps(index))
    fails(sharded, f"does not hold the tensor {DOWN} that")


def test_index_without_a_map(sharded: Path) -> None:
    (sharded / INDEX).write_text("{}")
    fails(sharded, "has no weight_map")


def test_not_safetensors(single: Path) -> None:
    (single / SINGLE).write_bytes((20).to_bytes(8, "little") + b"x" * 5000)
    fails(single, "model.safetensors is not a safetensors file")


def test_lfs_pointer(single: Path) -> None:
    (single / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n")
    fails(single, "Git LFS pointer.*git lfs pull")


def test_pickled_weights_only(single: Path) -> None:
    (single / SINGLE).rename(single / "pytorch_model.bin")
    fails(single, "holds pytorch_model.bin but no safetensors; pickled weights")


def test_no_weights(single: Path) -> None:
    (single / SINGLE).unlink()
    fails(single, f"holds neither {SINGLE} nor {INDEX}")


def test_missing_tensor(single: Path) -> None:
    rewrite(single, lambda tensors: tensors.pop(DOWN))
    fails(single, f"lacks the tensor {DOWN}; the checkpoint is incomplete")


def test_wrong_shape(single: Path) -> None:
    rewrite(single, lambda tensors: tensors.update({DOWN: tensors[DOWN][:, :-1].contiguous()}))
    fails(
        single, rf"{SINGLE}: the tensor {DOWN} has shape \[128, 207\], but config.json asks for \[128, 208\]"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(single: Path, value: float) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[DOWN][3, 61] = value

    rewrite(single, damage)
    fails(single, f"{SINGLE}: the tensor {DOWN} holds a NaN or an infinity")


def test_integer_weights(single: Path) -> None:
    rewrite(single, lambda tensors: tensors.update({DOWN: tensors[DOWN].to(torch.int8)}))
    fails(single, f"the tensor {DOWN} is int8; float32")


def test_unexpected_tensor(single: Path) -> None:
    """A bias the config does not mention would silently be left out otherwise."""
    config = json.loads((single / "config.json").read_text())
    config["mlp_bias"] = False
    (single / "config.json").write_text(json.dumps(config))
    fails(
        single, "holds the tensor model.layers.0.mlp.down_proj.bias, which config.json does not account for"
    )


def test_harmless_extra_tensors(single: Path) -> None:
    rewrite(
        single,
        lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
    )
    load_model(single)
