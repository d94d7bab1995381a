"""Files of torch.save: state dicts are read bit for bit and a few rows at a time, and nothing else is let in."""

import collections
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from torch_files import numbers, same, saved

from jaxspec.convert import pickles


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
        (numbers((2,)), "got a tensor"),
        ([numbers((2,))], "got a list"),
        ({}, "got a dict"),
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
    with pytest.raises(ValueError, match=r"before 1\.6: re-save .* with torch\.save, or as safetensors"):
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


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # of the attack
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


def test_problems_of_a_pickle_are_reported_together(tmp_path):
    torch.save({"a": numbers((2,)).to(torch.float8_e4m3fn), "b": numbers((2,))}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: 'a': .* got float8_e4m3fn"):
        pickles.tensors(tmp_path / "a.pt")
    state = {"far": rebuilt(9, (2,), (1,)), "gone": rebuilt(0, (1,), (1,), of=storage(key="7"))}
    with pytest.raises(ValueError, match=r"a\.pt: 'far': .*\n.*a\.pt: 'gone': .*'7', got none"):
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
    with pytest.raises(ValueError, match=f"got {size} bytes"):
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
    with pytest.raises(ValueError, match="little-endian numbers, got byte order b'big'"):
        pickles.tensors(big)
    for names in (["a/data.pkl", "b/data.pkl"], ["data.pkl"], ["a/b/data.pkl"]):
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            for name in names:
                archive.writestr(name, b"}.")
        with pytest.raises(ValueError, match=r"one member \*/data\.pkl"):
            pickles.tensors(tmp_path / "a.pt")
