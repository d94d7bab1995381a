"""Checkpoints: what torch and safetensors wrote is read bit for bit and a few rows at a time, and nothing else is let in."""

import collections
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch

from jaxspec.convert import pickles
from jaxspec.convert.source import digest, open_source

DTYPES = """bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64""".split()


def numbers(shape, dtype="float32"):
    """A tensor of random bits."""
    dtype = getattr(torch, dtype)
    if dtype == torch.bool or 0 in shape:
        return (torch.arange(int(np.prod(shape))) % 3 == 0).to(dtype).reshape(shape)
    count = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, count, np.uint8)).view(dtype).reshape(shape)


def same(ours, theirs):
    """Equal shape and dtype, and equal in every bit."""
    name = str(theirs.dtype).removeprefix("torch.")
    bits = theirs.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return ours.shape == tuple(theirs.shape) and ours.dtype.name == name and ours.tobytes() == bits


def saved(path, value, **how):
    torch.save(value, path, **how)
    return path


def zipped(path, data, members=(), compression=zipfile.ZIP_STORED):
    """A file like torch's, with any bytes for its pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", data)
        for name, content in dict(members).items():
            archive.writestr(f"a/{name}", content)
    return path


class Call:
    """Pickles as a call of a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


class Reference(tuple):
    """Pickles as a persistent reference."""


class Saver(pickle.Pickler):
    def persistent_id(self, value):
        return tuple(value) if isinstance(value, Reference) else None


def crafted(path, value, members=()):
    buffer = io.BytesIO()
    Saver(buffer, 2).dump(value)
    return zipped(path, buffer.getvalue(), members)


def storage(size=6, cls=torch.FloatStorage, key="0"):
    return Reference(("storage", cls, key, "cpu", size))


def rebuilt(*args, of=None):
    """A call of torch's function that builds a tensor: offset, shape, strides and what follows."""
    rest = (False, collections.OrderedDict()) if len(args) == 3 else ()
    return Call(torch._utils._rebuild_tensor_v2, storage() if of is None else of, *args, *rest)


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


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_views_shared_storages_and_parameters(tmp_path, protocol):
    whole = numbers((6, 8), "bfloat16")
    state = {
        "whole": whole,
        "part": whole[2:5],
        "transposed": whole.T,
        "columns": whole[:, 1::3],
        "spread": numbers((3, 1)).expand(3, 4),
        "permuted": numbers((2, 3, 4)).permute(2, 0, 1),
        "window": numbers((9,)).unfold(0, 4, 2),
        "parameter": torch.nn.Parameter(numbers((3, 2)).nan_to_num()),
    }
    tensors = pickles.tensors(saved(tmp_path / "a.pt", state, pickle_protocol=protocol))
    for name, value in state.items():
        assert same(tensors[name].all(), value), name
        for start, stop in [(0, 0), (0, 1), (1, 3), (2, 99)]:
            assert same(tensors[name].read(start, stop), value[start:stop]), name


@pytest.mark.parametrize(
    "wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}, lambda state: {"model": state}]
)
def test_a_state_dict_of_a_module_is_found_in_its_wrapper(tmp_path, wrap):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    state = module.state_dict()  # an OrderedDict with an attribute, ``_metadata``
    tensors = pickles.tensors(saved(tmp_path / "a.bin", wrap(state)))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {name: tuple(v.shape) for name, v in state.items()}
    assert all(same(tensor.all(), state[name]) for name, tensor in tensors.items())


def test_plain_values_are_skipped(tmp_path):
    plain = [
        1,
        -300,
        2**70,
        1.5,
        None,
        True,
        "x",
        (1, 2, 3, 4),
        [1, [2]],
        {"a": 1},
        torch.Size([1]),
        torch.device("cpu"),
        torch.int8,
    ]
    state = {"w": numbers((2,)), **{f"plain{i}": value for i, value in enumerate(plain)}}
    assert list(pickles.tensors(saved(tmp_path / "a.pt", state))) == ["w"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (numbers((2,)), "came a tensor"),
        ([numbers((2,))], "came a list"),
        ({}, "came a dict"),
        ({"generator": {"w": numbers((2,))}}, "'generator'"),
        ({"w": numbers((2,)), "more": {"v": numbers((2,))}}, "'more', 'w'"),
        ({"model": {"w": numbers((2,))}, "state_dict": {"w": numbers((2,))}}, "'model', 'state_dict'"),
        (torch.nn.Linear(2, 3), "torch.nn.modules.linear.Linear"),
        ({"w": numbers((2,)), "args": np.float64(3)}, "numpy"),
        ({"w": torch.zeros(2, 2).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"w": torch.zeros(2, dtype=torch.complex64).conj()}, "metadata"),
        ({"w": torch.zeros(2, dtype=torch.complex64).conj().imag}, "metadata"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, value, message):
    with pytest.raises(ValueError, match=message):
        pickles.tensors(saved(tmp_path / "a.pt", value))


def test_the_old_format_and_foreign_files_are_refused(tmp_path):
    old = saved(tmp_path / "old.pt", {"w": numbers((2,))}, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"before 1\.6; re-save .* with torch\.save, or as safetensors"):
        pickles.tensors(old)
    for name, content in {"a.pt": b"version https://git-lfs", "b.pt": b"", "c.pt": b"PK\x03\x04" + bytes(99)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            pickles.tensors(tmp_path / name)
    with pytest.raises(ValueError, match="none"):
        pickles.tensors(tmp_path / "none.pt")


def text(*values):
    return b"".join(b"X" + struct.pack("<I", len(value)) + value.encode() for value in values)


def call(form, module, name, *args):
    """A pickle that calls a function of any module, by one of the ways that pickles have."""
    named = f"{module}\n{name}\n".encode()
    return {
        "GLOBAL": b"c" + named + b"(" + text(*args) + b"tR.",
        "STACK_GLOBAL": b"\x80\x04" + text(module, name) + b"\x93(" + text(*args) + b"tR.",
        "INST": b"(" + text(*args) + b"i" + named + b".",
        "OBJ": b"(c" + named + text(*args) + b"o.",
    }[form]


ATTACKS = [
    ("os", "system", "touch {}"),
    ("posix", "system", "touch {}"),
    ("builtins", "open", "{}", "w"),
    ("builtins", "exec", "open('{}', 'w')"),
    ("torch.serialization", "os.system", "touch {}"),  # by an attribute of a module of torch's
]


@pytest.mark.parametrize("form", ["GLOBAL", "STACK_GLOBAL", "INST", "OBJ"])
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: ".".join(attack[:2]))
def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path, attack, form):
    target = tmp_path / "created"
    data = call(form, *(part.format(target) for part in attack))
    if "." not in attack[1] or form == "STACK_GLOBAL":  # the others do not look into attributes
        pickle.loads(data)
        assert target.exists(), "the attack does work elsewhere"
        target.unlink()
    with pytest.raises(ValueError, match=r"which is not loaded|does not write") as error:
        pickles.tensors(zipped(tmp_path / "a.pt", data))
    assert not target.exists()
    assert attack[1] in str(error.value)


@pytest.mark.parametrize(
    "value",
    [
        Call(torch._utils._rebuild_parameter, Call(os.getcwd), False, None),
        Call(torch._utils._rebuild_parameter, {}, False, None),
        Call(torch._utils._rebuild_parameter),
        Call(collections.OrderedDict, [("w", 1)]),
        Call(torch.FloatStorage, 10**12),
        Call(torch._utils._rebuild_tensor_v2, 1, 0, (1,), (1,), False, None),
        Call(torch._utils._rebuild_tensor_v2),
        rebuilt(0, (2, 3), (3, 1), False, None, {"neg": True}),
        rebuilt(0, (2, 3), (3,)),
        rebuilt(0, [2, 3], [3, 1]),
        rebuilt(0, (2.0,), (1,)),
        rebuilt(True, (2,), (1,)),
        rebuilt(0, (1,) * 65, (1,) * 65),
        rebuilt(0, (2,), (1,), of=Reference(("storage", torch.float32, "0", "cpu", 6))),
        rebuilt(0, (2,), (1,), of=Reference(("module", torch.FloatStorage, "0", "cpu", 6))),
        rebuilt(0, (2,), (1,), of=storage(key=0)),
        rebuilt(0, (2,), (1,), of=storage(-1)),
        storage(),
        Reference("storage"),
    ],
)
def test_torchs_own_names_are_held_to_torchs_own_arguments(tmp_path, value):
    good = rebuilt(0, (2, 3), (3, 1))
    assert pickles.tensors(crafted(tmp_path / "a.pt", {"w": good}, {"data/0": bytes(24)}))["w"].all().shape == (2, 3)
    with pytest.raises(ValueError, match=r"a\.pt: expected"):
        pickles.tensors(crafted(tmp_path / "a.pt", {"w": value}, {"data/0": bytes(24)}))


@pytest.mark.parametrize(
    ("tensor", "member"),
    [
        (rebuilt(1, (2, 3), (3, 1)), 24),  # one beyond the end
        (rebuilt(0, (2, 3), (4, 1)), 24),
        (rebuilt(0, (2**62,), (1,)), 24),
        (rebuilt(0, (2**40, 2**40), (0, 0)), 24),
        (rebuilt(2**63, (0,), (1,)), 24),
        (rebuilt(0, (-2, 3), (3, 1)), 24),
        (rebuilt(5, (2, 3), (-3, 1)), 24),
        (rebuilt(-1, (2,), (1,)), 24),
        (rebuilt(0, (2, 3), (3, 1)), 23),  # the storage is shorter than it claims
        (rebuilt(0, (2, 3), (3, 1)), None),
        (rebuilt(0, (2, 3), (3, 1), of=storage(2**62)), 24),
        (rebuilt(0, (2, 3), (3, 1), of=storage(6, torch.DoubleStorage)), 24),
    ],
)
def test_a_tensor_lies_within_its_storage(tmp_path, tensor, member):
    members = {} if member is None else {"data/0": bytes(member)}
    with pytest.raises(ValueError, match="expected"):
        pickles.tensors(crafted(tmp_path / "a.pt", {"w": tensor}, members))


def test_problems_of_a_pickle_are_told_together(tmp_path):
    torch.save({"a": numbers((2,)).to(torch.float8_e4m3fn), "b": numbers((2,))}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: 'a': .* came float8_e4m3fn"):
        pickles.tensors(tmp_path / "a.pt")
    state = {"far": rebuilt(9, (2,), (1,)), "gone": rebuilt(0, (1,), (1,), of=storage(key="7"))}
    with pytest.raises(ValueError, match=r"a\.pt: 'far': .*\n.*a\.pt: 'gone': .*'7', came none"):
        pickles.tensors(crafted(tmp_path / "a.pt", state, {"data/0": bytes(24)}))


N = 200_000
BOMBS = {
    "deep key": b"\x80\x02}" + b")" + b"\x85" * N + b"Ns.",
    "wide key": b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"Ns.",
    "deep value": b"\x80\x02}" + text("w") + b")" + b"\x85" * N + b"s.",
    "a dict in itself": b"}q\x00" + text("model") + b"h\x00s.",
    "far memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "long string": b"\x8d" + struct.pack("<Q", 2**62) + b"x.",
    "long bytes": b"\x8e" + struct.pack("<Q", 2**40) + b"x.",
    "long bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "long number": b"\x8b" + struct.pack("<I", 2**20) + bytes(2**19) + b".",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b".",
    "buffer": b"\x80\x05\x97.",
    "extension": b"\x82\x01.",
    "text reference": b"Pname\n.",
    "binary reference": text("name") + b"Q.",
    "new object": b"ccollections\nOrderedDict\n)\x81.",
    "build": b"ccollections\nOrderedDict\n}b.",
    "build a tensor": b"]}b.",
    "no end": b"\x80\x02}",
    "nothing": b"",
    "no stack": b".",
    "no mark": b"t.",
    "no memo": b"h\x05.",
    "half an item": b"}(Nu.",
    "key twice": b"}" + (text("w") + b"Ns") * 2 + b".",
    "text number": b"I" + b"9" * 10_000 + b"\n.",
    "unknown": b"\xff.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_a_value_error(tmp_path, bomb):
    with pytest.raises(ValueError, match=r"a\.pt: expected"):
        pickles.tensors(zipped(tmp_path / "a.pt", BOMBS[bomb]))


def test_a_large_pickle_or_member_is_refused_before_it_is_unpacked(tmp_path):
    path = zipped(tmp_path / "a.pt", b"0" * (2**24 + 1), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=f"at most {2**24} bytes"):
        pickles.tensors(path)
    value, size = {"w": rebuilt(0, (2, 3), (3, 1))}, 2**30 + 1
    content = crafted(tmp_path / "a.pt", value, {"data/0": bytes(24)}).read_bytes()
    place = content.rindex(b"PK\x01\x02")  # the central directory's entry of the last member, data/0
    lie = struct.pack("<H", 8) + content[place + 12 : place + 24] + struct.pack("<I", size)  # deflated, and of such a size
    (tmp_path / "a.pt").write_bytes(content[: place + 10] + lie + content[place + 28 :])
    with pytest.raises(ValueError, match=f"came {size} bytes"):
        pickles.tensors(tmp_path / "a.pt")


def test_a_compressed_file_is_read(tmp_path):
    matrix = numbers((7, 5))
    with zipfile.ZipFile(saved(tmp_path / "a.pt", {"w": matrix, "v": matrix[2:]})) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        with zipfile.ZipFile(tmp_path / f"{compression}.pt", "w", compression) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    tensors = pickles.tensors(tmp_path / "8.pt")
    assert same(tensors["v"].read(1, 3), matrix[3:5])
    with pytest.raises(ValueError, match="stored or deflated"):
        pickles.tensors(tmp_path / "12.pt")


def test_odd_zips_are_refused(tmp_path):
    big = crafted(tmp_path / "a.pt", {"w": rebuilt(0, (1,), (1,))}, {"data/0": bytes(24), "byteorder": b"big"})
    with pytest.raises(ValueError, match="little-endian numbers, came byte order b'big'"):
        pickles.tensors(big)
    for names in (["a/data.pkl", "b/data.pkl"], ["data.pkl"], ["a/b/data.pkl"]):
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            for name in names:
                archive.writestr(name, b"}.")
        with pytest.raises(ValueError, match=r"one member \*/data\.pkl"):
            pickles.tensors(tmp_path / "a.pt")


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
    with pytest.raises(ValueError, match=r"came these problems.*\n.*a\.safetensors: "):
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


def test_all_problems_of_a_checkpoint_are_told_together(tmp_path):
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
    with pytest.raises(ValueError, match="whole checkpoint") as error:
        open_source(folder)
    lines = str(error.value).split("\n")[1:]
    told = [
        "config.json: expected JSON",
        "'../o.safetensors'",
        "broken.safetensors: expected a whole safetensors file",
        "F8_E5M2",
        "z.safetensors: expected a file, came none",
        "'gone' in it as the index says",
        "'unlisted' in the index",
        "'b' in one shard alone",
    ]
    assert len(lines) == len(told)
    assert all(sum(part in line for line in lines) == 1 for part in told), error.value


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
    with pytest.raises(ValueError, match=r"one file of weights|looked for") as error:
        open_source(tmp_path)
    assert files == "model.ckpt" or all(name in str(error.value) for name in files.split()[:2])
    with pytest.raises(ValueError, match="save it as one of these"):
        open_source(saved(tmp_path / "model.ckpt", {}))


def test_the_digest_is_of_names_and_contents(tmp_path):
    def of(folder):
        return digest(open_source(folder))

    weight_map = {"a": "x.safetensors", "b": "y.safetensors"}
    first = of(sharded(tmp_path / "1", weight_map, x=["a"], y=["b"]))
    assert len(first.removeprefix("sha256:")) == 64
    second = sharded(tmp_path / "2", weight_map, x=["a"], y=["b"])
    assert of(second) == first
    content = bytearray((second / "y.safetensors").read_bytes())
    content[-1] ^= 1
    (second / "y.safetensors").write_bytes(content)
    assert of(second) != first
    assert of(sharded(tmp_path / "3", {"a": "x.safetensors", "b": "z.safetensors"}, x=["a"], z=["b"])) != first


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
    with pytest.raises(ValueError, match="came 0"):
        tensor.all()
    (tmp_path / "a.pt").unlink()
    with pytest.raises(ValueError, match="leave it in place"):
        tensor.all()
