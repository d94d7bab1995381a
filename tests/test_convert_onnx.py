"""ONNX files: weights are read bit for bit and get the names of their modules, and what is damaged or hostile is refused."""

import os

import ml_dtypes
import numpy as np
import pytest
from reference_s3 import Graph, campplus_model, campplus_onnx, package

from jaxspec.convert import onnx

DTYPES = """bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64""".split()
W = np.arange(6, dtype=np.float32).reshape(2, 3)


def numbers(dtype, shape=(5, 3)):
    """An array of random bits."""
    dtype = np.dtype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype)
    count = int(np.prod(shape)) * dtype.itemsize
    bits = np.random.default_rng(0).integers(0, 2 if dtype.kind == "b" else 256, count, np.uint8)
    return bits.view(dtype).reshape(shape)


def same(tensor, array):
    return (tensor.shape, tensor.dtype) == (array.shape, array.dtype) and tensor.all().tobytes() == array.tobytes()


def saved(path, arrays, **how):
    """A file with these initializers."""
    graph = Graph()
    for name, array in arrays.items():
        graph.value(name, array)
    return graph.save(path, **how)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_read_bit_for_bit(tmp_path, dtype, external):
    arrays = {"matrix": numbers(dtype), "scalar": numbers(dtype, ()), "empty": numbers(dtype, (0, 4))}
    how = {"save_as_external_data": True, "size_threshold": 0, "location": "weights"} if external else {}
    found = onnx.tensors(saved(tmp_path / "a.onnx", arrays, **how))
    assert (tmp_path / "weights").exists() == external
    assert list(found) == list(arrays)
    assert all(same(found[name], array) for name, array in arrays.items())
    for start, stop in [(0, 0), (0, 1), (1, 3), (2, 99)]:
        np.testing.assert_array_equal(found["matrix"].read(start, stop), arrays["matrix"][start:stop])


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_in_a_field_of_their_kind_are_read(tmp_path, dtype):
    helper = package("onnx").helper
    array = (
        numbers(dtype, (7, 3)) if np.dtype(numbers(dtype).dtype).kind in "iub" else np.arange(-9, 12).astype(numbers(dtype).dtype)
    )
    array = array.reshape(7, 3)
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = helper.make_tensor("w", kind, array.shape, array.ravel().tolist() if dtype != "bfloat16" else array.ravel())
    assert not tensor.HasField("raw_data")
    graph = Graph()
    graph.initializers.append(tensor)
    found = onnx.tensors(graph.save(tmp_path / "a.onnx"))["w"]
    assert same(found, array)
    np.testing.assert_array_equal(found.read(2, 4), array[2:4])


def test_an_exported_network_has_the_names_and_values_of_its_state_dict(tmp_path):
    """Equal tensors are stored once; batch norms after convolutions are folded, so that these have other values."""
    model = campplus_model(small=True, plain=True)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    found = onnx.tensors(campplus_onnx(tmp_path / "a.onnx", model))
    graph = onnx.read(tmp_path / "a.onnx")
    assert any(node.operator == "Identity" for node in graph.nodes)
    assert not any(name.startswith(("onnx::", "/")) for name in found)
    kept = [
        name
        for name in found
        if name in state and "dense.nonlinear" not in name and not name.endswith(("epsilon", "linear1.weight"))
    ]
    kept = [name for name in kept if ".cam_layer." in name or "nonlinear" in name or "transit1" in name or "transit2" in name]
    assert len(kept) > 40
    assert all(same(found[name], state[name]) for name in kept)
    assert found["xvector.transit1.nonlinear.batchnorm.epsilon"].all() == np.float32(1e-5)
    extra = found.keys() - state.keys()
    assert all(name.endswith((".bias", ".epsilon", "dense.nonlinear.batchnorm.weight")) for name in extra)


def test_a_tensor_in_one_name_only(tmp_path):
    graph = Graph()
    for name in "ab":
        graph.node("Conv", "same", ["x", graph.value(name, W)])
    with pytest.raises(ValueError, match=r"one tensor as same\.weight, got a and b"):
        onnx.tensors(graph.save(tmp_path / "a.onnx"))
    graph = Graph()
    graph.value("same.weight", W)
    graph.node("Conv", "same", ["x", graph.value("b", W)])
    with pytest.raises(ValueError, match=r"one tensor as same\.weight, got b and same\.weight"):
        onnx.tensors(graph.save(tmp_path / "a.onnx"))


def test_nodes_without_weights_or_module_are_skipped(tmp_path):
    graph = Graph()
    graph.node("MatMul", "attn", ["a", "b"])
    graph.node("Add", "attn", [graph.value("mask", np.ones(3, np.float32)), "b"])  # of no weight
    graph.node("Mul", "attn", ["a", graph.value("scale", np.ones(3, np.float32))])
    graph.nodes.append(graph.helper.make_node("Conv", ["x", graph.value("alone", W)], ["y"], ""))
    graph.linear("x", "layers/layers.0", ("m", W), ("n", W[0]))
    found = onnx.tensors(graph.save(tmp_path / "a.onnx"))
    assert sorted(found) == ["alone", "layers.0.bias", "layers.0.weight", "mask", "scale"]
    assert same(found["layers.0.weight"], W)
    np.testing.assert_array_equal(found["layers.0.weight"].read(1, 2), W[1:2])


def test_damage_gives_nothing_but_value_errors(tmp_path):
    graph = Graph()
    graph.linear("x", "a/a.0", ("m", W), ("n", W[0]), constant=True)
    graph.node("LayerNormalization", "norm", ["x", graph.value("w", W[0]), graph.value("b", W[1])], epsilon=1e-6)
    tensor = graph.helper.make_tensor("ints", 7, [4], [1, -1, 2**40, 300])
    graph.initializers.append(tensor)
    content, generator = graph.save(tmp_path / "a.onnx").read_bytes(), np.random.default_rng(0)

    def attempt(damaged):
        (tmp_path / "a.onnx").write_bytes(damaged)
        try:
            for tensor in onnx.tensors(tmp_path / "a.onnx").values():
                tensor.read(0, 3)
        except ValueError:
            return True

    assert not attempt(content)
    accepted = [length for length in range(len(content)) if not attempt(content[:length])]
    assert all(length > len(content) - 12 for length in accepted)  # what follows the graph is not needed
    refused = 0
    for _ in range(1500):
        damaged = bytearray(content)
        for place in generator.integers(0, len(content), generator.integers(1, 4)):
            damaged[place] ^= 1 << generator.integers(8)
        refused += bool(attempt(bytes(damaged)))
    assert 300 < refused < 1500


def varint(value):
    value &= 2**64 - 1
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def field(number, value):
    """A field with an integer, or with bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(*shape, kind=1, data=None, name=b"w", more=b""):
    """A file with one initializer, by its fields."""
    dims = b"".join(field(1, length) for length in shape)
    raw = b"" if data is None else field(9, data)
    return field(7, field(5, dims + field(2, kind) + field(8, name) + raw + more))


def external(**entries):
    """A file with one initializer of 24 bytes, which are elsewhere."""
    pairs = (field(13, field(1, key.encode()) + field(2, value.encode())) for key, value in entries.items())
    return tensor(2, 3, more=b"".join(pairs) + field(14, 1))


HOSTILE = {
    "nothing": (b"", "empty"),
    "a pointer of git": (b"version https://git-lfs.github.com/spec/v1", "wire type 6"),
    "an LFS-like text": (b"<!DOCTYPE html>", "wire type|field"),
    "no graph": (field(1, 8), "0 graphs"),
    "two graphs": (tensor(2, 3, data=bytes(24)) * 2, "2 graphs"),
    "a group": (b"\x3b\x3c", "wire type 3"),
    "a long number": (b"\x38" + b"\xff" * 10 + b"\x01", "more than 10 bytes"),
    "a number cut off": (b"\x38\xff", "cut off"),
    "field 0": (b"\x02\x00", "field 0"),
    "a field beyond the end": (field(7, b"")[:1] + varint(2**40), "where 0 are left"),
    "a field of 2**64 bytes": (field(7, b"")[:1] + varint(2**64 - 1), "where 0 are left"),
    "fewer bytes": (tensor(2, 3, data=bytes(20)), r"'w' of float32 \[2, 3\] with 20 bytes"),
    "more bytes": (tensor(2, 3, data=bytes(28)), "28 bytes"),
    "no bytes": (tensor(2, 3), "0 fields of values"),
    "values twice": (tensor(2, 3, data=bytes(24), more=field(4, bytes(24))), "2 fields of values"),
    "values of another kind": (tensor(2, 3, more=field(7, bytes(6))), "values in field 7"),
    "a negative length": (tensor(-2, -3, data=bytes(24)), "of shape|with 24 bytes"),
    "a huge shape": (tensor(2**40, 2**40, data=bytes(24)), "of shape"),
    "a huge empty shape": (tensor(0, 2**62, 2**62), "of shape"),
    "a large shape": (tensor(2**40, data=bytes(24)), "24 bytes"),
    "many axes": (tensor(*[1] * 17, data=bytes(4)), "more than 16 axes"),
    "many packed axes": (tensor(data=bytes(4), more=field(1, b"\x01" * 10**6)), "more than 16 axes"),
    "strings": (tensor(1, kind=8, more=field(6, b"text")), "data type 8"),
    "float8": (tensor(4, kind=17, data=bytes(4)), "data type 17"),
    "complex": (tensor(3, kind=14, data=bytes(24)), "data type 14"),
    "no kind": (tensor(2, 3, kind=0, data=bytes(24)), "data type 0"),
    "a long name": (tensor(2, 3, data=bytes(24), name=b"w" * 5000), "a name of 5000 bytes"),
    "no name": (tensor(2, 3, data=bytes(24), name=b""), "without a name"),
    "a name that is no text": (tensor(2, 3, data=bytes(24), name=b"\xff"), "decode"),
    "a name twice": (field(7, 2 * tensor(2, 3, data=bytes(24))[2:]), "two initializers named 'w'"),
    "many nodes": (field(7, field(1, b"") * (2**18 + 1)), "more than 262144"),
    "external, nowhere": (external(), "values at"),
    "external, above": (external(location="../w"), "outside the folder"),
    "external, above and back": (external(location="../inside/w"), "outside the folder"),
    "external, absolute": (external(location="/etc/passwd"), "outside the folder"),
    "external, linked": (external(location="link"), "outside the folder"),
    "external, with a backslash": (external(location="..\\w"), "values at"),
    "external, with a zero": (external(location="a\0b"), "values at"),
    "external, missing": (external(location="none"), "which is not there"),
    "external, a folder": (external(location="."), "which is not there"),
    "external, short": (external(location="w", offset="8"), "16 bytes in w"),
    "external, beyond": (external(location="w", offset="8", length="24"), "beyond the end"),
    "external, far": (external(location="w", offset=str(10**17), length="24"), "beyond the end"),
    "external, other length": (external(location="w", length="12"), "12 bytes in w"),
    "external, negative": (external(location="w", offset="-8"), "values at"),
    "external, no number": (external(location="w", offset="1e1"), "values at"),
    "external, a long number": (external(location="w", offset="9" * 4000), "values at"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_a_value_error(tmp_path, case):
    content, message = HOSTILE[case]
    (tmp_path / "inside").mkdir()
    (tmp_path / "w").write_bytes(W.tobytes())
    (tmp_path / "inside" / "w").write_bytes(W.tobytes())
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "w")
    path = tmp_path / "inside" / "a.onnx"
    path.write_bytes(external(location="w", offset="0", length="24", checksum="x"))
    assert same(onnx.tensors(path)["w"], W)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s)a\.onnx: expected a complete ONNX file, got .*({message})"):
        onnx.tensors(path)


def test_damaged_numbers_are_refused_as_they_are_read(tmp_path):
    path = tmp_path / "a.onnx"
    for data in (b"\x01\x02", b"\x01\x02\x03\x04", b"\x01\x02\x83", b"\x01\x02" + b"\xff" * 10 + b"\x01"):
        path.write_bytes(tensor(3, kind=7, more=field(7, data)))
        with pytest.raises(ValueError, match="expected 3 numbers"):
            onnx.tensors(path)["w"].all()


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.onnx"):
        with pytest.raises(ValueError, match="expected a complete ONNX file"):
            onnx.tensors(path)


def test_values_are_read_on_request(tmp_path):
    """A sparse file of 2 GB is opened at once, and read a few rows at a time."""
    rows = 2**19
    path = tmp_path / "a.onnx"
    path.write_bytes(
        field(
            7,
            field(
                5,
                field(1, rows)
                + field(1, 1024)
                + field(2, 1)
                + field(8, b"w")
                + field(13, field(1, b"location") + field(2, b"w")),
            ),
        )
    )
    with open(tmp_path / "w", "wb") as file:
        file.seek(rows * 4096 - 4)
        file.write(np.float32(7).tobytes())
    found = onnx.tensors(path)["w"]
    assert found.read(rows - 1, rows)[0, -1] == 7
    os.truncate(tmp_path / "w", 4096)
    assert not found.read(0, 1).any()
    with pytest.raises(ValueError, match="download it again"):
        found.read(1, 2)
