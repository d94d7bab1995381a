"""Checkpoints are found and opened: what torch and safetensors wrote is read bit for bit, and what is damaged is refused."""

import json
import os
import struct
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from torch_files import numbers, same, saved

from jaxspec.convert.source import open_source

DTYPES = """bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64""".split()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_read_bit_for_bit(tmp_path, dtype):
    state = {"matrix": numbers((5, 3), dtype), "scalar": numbers((), dtype), "empty": numbers((0, 4), dtype)}
    saved(tmp_path / "a.pt", state)
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        tensors = open_source(tmp_path / name).tensors
        assert list(tensors) == [tensor.name for tensor in tensors.values()]
        assert {name: tensor.shape for name, tensor in tensors.items()} == {"matrix": (5, 3), "scalar": (), "empty": (0, 4)}
        assert all(same(tensors[key].all(), value) and tensors[key].dtype.name == dtype for key, value in state.items())


def header(path, entries, data=b"", size=None):
    """A safetensors file with any header."""
    content = entries.encode() if isinstance(entries, str) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(content) if size is None else size) + content + data)
    return path


def entry(begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - begin) // 4], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("entries", "size"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, None),  # overlapping
        ({"a": entry(0, 4), "b": entry(8, 12)}, None),  # a hole
        ({"a": entry(0, 16)}, None),  # beyond the end
        ({"a": entry(0, 8)}, None),  # bytes left
        ({"a": entry(0, 12) | {"shape": [-3]}}, None),
        ({"a": entry(0, 12) | {"shape": [2**62, 4]}}, None),
        ({"a": entry(0, 12, "I4")}, None),
        ({"a": entry(0, 12, "F8_E4M3") | {"shape": [12]}}, None),
        ({}, 2**63),
        ({}, 2**40),
        ({"a": entry(0, 12)}, 3),
        ("[" * 100_000, None),
        ("", None),
        ('{"a": ' + json.dumps(entry(0, 12)) + ', "a": ' + json.dumps(entry(0, 12)) + "}", None),
    ],
)
def test_a_wrong_safetensors_header_is_refused(tmp_path, entries, size):
    assert open_source(header(tmp_path / "good.safetensors", {"a": entry(0, 12)}, bytes(12))).tensors["a"].all().shape == (3,)
    with pytest.raises(ValueError, match=r"got one with problems.*\n.*a\.safetensors: "):
        open_source(header(tmp_path / "a.safetensors", entries, bytes(12), size))


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_damage_gives_nothing_but_value_errors(tmp_path, name):
    state = {"w": numbers((9, 5), "bfloat16"), "v": numbers((9, 5)).T, "s": numbers((), "int64")}
    if name == "a.pt":
        saved(tmp_path / name, state)
    else:
        safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / name)
    content, generator = (tmp_path / name).read_bytes(), np.random.default_rng(0)

    def attempt(damaged):
        (tmp_path / name).write_bytes(damaged)
        try:
            for tensor in open_source(tmp_path / name).tensors.values():
                tensor.read(0, 3)
        except ValueError:
            return True

    for length in np.linspace(0, len(content) - 1, 30).astype(int):
        assert attempt(content[:length])
    refused = 0
    for _ in range(400):
        damaged = bytearray(content)
        for place in generator.integers(0, len(content), generator.integers(1, 4)):
            damaged[place] ^= 1 << generator.integers(8)
        refused += bool(attempt(bytes(damaged)))
    assert 50 < refused < 400


PEAK = """
import pathlib, sys
from jaxspec.convert.source import open_source
def memory(what):
    return int(pathlib.Path("/proc/self/status").read_text().split(what + ":")[1].split()[0])
start = memory("VmRSS")
tensor = open_source(sys.argv[1]).tensors["w"]
total = sum(float(tensor.read(row, row + 500).sum()) for row in range(0, tensor.shape[0], 500))
print(memory("VmHWM") - start, total)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_large_file_is_read_in_little_memory(tmp_path, name):
    matrix = torch.ones(75_000, 1000)  # 300 MB
    (saved if name == "a.pt" else lambda path, state: safetensors.torch.save_file(state, path))(*(tmp_path / name, {"w": matrix}))
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path / name], capture_output=True, text=True, check=True)
    kilobytes, total = done.stdout.split()
    assert float(total) == matrix.numel()
    assert int(kilobytes) < 100_000
    (tmp_path / name).unlink()


def sharded(folder, weight_map, **shards):
    """A directory of shards, each with tensors of the given names, and an index."""
    folder.mkdir(exist_ok=True)
    for file, names in shards.items():
        safetensors.torch.save_file({name: numbers((4, 2)) + i for i, name in enumerate(names)}, folder / f"{file}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_shards_are_one_checkpoint(tmp_path):
    folder = sharded(tmp_path, {"a": "x.safetensors", "b": "y.safetensors", "c": "x.safetensors"}, y=["b"], x=["a", "c"])
    (folder / "config.json").write_text('{"hidden_size": 2}')
    for path in (folder, str(folder), folder / "model.safetensors.index.json"):
        source = open_source(path)
        assert sorted(source.tensors) == ["a", "b", "c"]
        assert source.files == (folder / "x.safetensors", folder / "y.safetensors")
        assert (source.folder, source.config, source.origin) == (folder, {"hidden_size": 2}, str(path))
    np.testing.assert_array_equal(source.tensors["c"].all(), safetensors.torch.load_file(folder / "x.safetensors")["c"])


def test_all_problems_of_a_checkpoint_are_reported_together(tmp_path):
    weight_map = {
        "a": "x.safetensors",
        "gone": "x.safetensors",
        "b": "y.safetensors",
        "c": "z.safetensors",
        "d": "../o.safetensors",
    }
    weight_map |= {"e": "broken.safetensors", "f": "eight.safetensors"}
    folder = sharded(tmp_path, weight_map, x=["a", "b", "unlisted"], y=["b"], broken=["e"])
    header(folder / "eight.safetensors", {"f": entry(0, 4, "F8_E5M2") | {"shape": [4]}}, bytes(4))
    (folder / "broken.safetensors").write_bytes((folder / "broken.safetensors").read_bytes()[:-1])
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="complete checkpoint") as error:
        open_source(folder)
    lines = str(error.value).split("\n")[1:]
    wanted = [
        "config.json: expected JSON",
        "'../o.safetensors'",
        "broken.safetensors: expected a complete safetensors file",
        "F8_E5M2",
        "z.safetensors: expected a file, got none",
        "'gone' by the index",
        "'unlisted' in the index",
        "'b' in one shard only",
    ]
    assert len(lines) == len(wanted)
    assert all(sum(part in line for line in lines) == 1 for part in wanted), error.value


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "sub/x.safetensors", "{}/x.safetensors", "..", "", "link.safetensors", "a\\x.safetensors"]
)
def test_shards_lie_in_the_directory_itself(tmp_path, file):
    outside = tmp_path / "outside"
    sharded(outside, {}, x=["a"])
    folder = outside / "sub" / "folder"
    for place in (outside, outside / "sub", folder, folder / "sub"):
        place.mkdir(exist_ok=True)
        (place / "x.safetensors").write_bytes((outside / "x.safetensors").read_bytes())
    (folder / "link.safetensors").symlink_to(outside / "x.safetensors")
    file = file.format(outside)
    sharded(folder, {"a": file}, x=["a"])
    with pytest.raises(ValueError, match="in the directory itself"):
        open_source(folder)


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "x", "a": "y"}}', "[" * 100_000]
)
def test_a_malformed_index_is_refused(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"index\.json: expected"):
        open_source(tmp_path)


@pytest.mark.parametrize("config", ["{", "[]", "[" * 100_000, "\udcff", "1" * 5000])
def test_a_malformed_config_is_refused(tmp_path, config):
    header(tmp_path / "model.safetensors", {})
    (tmp_path / "config.json").write_bytes(config.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json: expected"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        ("model.safetensors other.safetensors llm.pt", "model.safetensors"),
        ("other.safetensors ._other.safetensors pytorch_model.bin", "other.safetensors"),
        ("pytorch_model.bin llm.pt training_args.bin", "pytorch_model.bin"),
        ("llm.pt flow.pt hift.pt", "llm.pt"),
        ("flow.pt", "flow.pt"),
        ("a.safetensors b.safetensors llm.pt", None),
        ("flow.pt hift.pt", None),
        ("model.ckpt", None),
    ],
)
def test_the_file_of_a_directory(tmp_path, files, chosen):
    for name in files.split():
        if name.endswith(".safetensors"):
            safetensors.torch.save_file({"w": numbers((2,))}, tmp_path / name)
        else:
            saved(tmp_path / name, {"w": numbers((2,))})
    if chosen:
        assert open_source(tmp_path).files == (tmp_path / chosen,)
        return
    with pytest.raises(ValueError, match=r"one file of weights|expected weights in") as error:
        open_source(tmp_path)
    assert files == "model.ckpt" or all(name in str(error.value) for name in files.split()[:2])
    with pytest.raises(ValueError, match="save it as one of these"):
        open_source(saved(tmp_path / "model.ckpt", {}))


def test_a_hub_id_is_downloaded_and_its_links_are_followed(tmp_path, monkeypatch):
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    blobs = sharded(repository / "blobs", {"a": "x.safetensors"}, x=["a"])
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision))
        assert not {"*.ckpt", "*.onnx", "*"} & set(allow_patterns)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = open_source("owner/name", "main")
    assert asked == [("owner/name", "main")]
    assert (source.origin, list(source.tensors)) == ("owner/name@0123abc", ["a"])
    (snapshot / "x.safetensors").unlink()
    (tmp_path / "x.safetensors").write_bytes((blobs / "x.safetensors").read_bytes())
    (snapshot / "x.safetensors").symlink_to(tmp_path / "x.safetensors")  # outside of the repository
    with pytest.raises(ValueError, match="in the directory itself"):
        open_source("owner/name")


@pytest.mark.parametrize("error", [OSError("no network"), ValueError("bad id"), RuntimeError(""), KeyError("x")])
def test_a_hub_that_cannot_be_reached_is_a_value_error(monkeypatch, error):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match=r"owner/name at revision v1.*`hf download owner/name --revision v1 --local-dir DIR`"):
        open_source("owner/name", "v1")


OFFLINE = """
from jaxspec.convert.source import open_source
try:
    open_source("owner/name")
except ValueError as error:
    print(error)
"""


def test_offline_mode_is_a_value_error(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True, env=environment, check=True)
    assert "`hf download owner/name --local-dir DIR`" in done.stdout


@pytest.mark.parametrize("name", ["none", "a/b/c", "../none", "/none/x", "", "x\0y", "x" * 5000])
def test_what_is_no_path_and_no_hub_id_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="expected"):
        open_source(name)


def test_a_revision_belongs_to_a_hub_id(tmp_path):
    with pytest.raises(ValueError, match="leave the revision out"):
        open_source(header(tmp_path / "a.safetensors", {}), "main")


def test_a_file_that_shrinks_after_it_was_opened_is_a_value_error(tmp_path):
    tensor = open_source(saved(tmp_path / "a.pt", {"w": numbers((3,))})).tensors["w"]
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="got 0"):
        tensor.all()
    (tmp_path / "a.pt").unlink()
    with pytest.raises(ValueError, match="leave it in place"):
        tensor.all()
