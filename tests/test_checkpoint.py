"""The conversion engine on small tensors, and folders of models, drafts and codecs: atomic, bit for bit, onto any mesh."""

import dataclasses
import errno
import json
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path
from unittest import mock

import checkpoints
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import traverse_util

from jaxspec import Sampling, autoregressive, generate, verify
from jaxspec.checkpoint import descriptions, pretrained, store, tensors
from jaxspec.checkpoint.descriptions import CodecDescription, DraftDescription
from jaxspec.checkpoint.tensors import of_array as tensor
from jaxspec.convert.core import Rule, conv, fold_weight_norm, plan, transpose
from jaxspec.draft import families, model_draft, ngram_draft, smaller
from jaxspec.draft.families import FAMILIES
from jaxspec.models import transformer
from jaxspec.types import Draft

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
RULES = (
    Rule(r"layers\.(\d+)\.(up|down)\.weight", "layer_{0}/{1}/kernel", transpose),
    Rule(r"qkv", ("query", "key", "value"), transpose),
    Rule(r"embed|embed_again", "table"),
    Rule(r"conv", "conv", conv),
    Rule(r"(old|older)\..*", None),
    Rule(r"older\.bias", "bias"),
)


def numbers(*shape, dtype=np.float32):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


def named(**arrays):
    return {name.replace("__", "."): tensor(name.replace("__", "."), array) for name, array in arrays.items()}


def test_a_table_of_rules_fills_every_parameter():
    state = named(
        layers__0__up__weight=numbers(3, 5), layers__12__down__weight=numbers(5, 3), qkv=numbers(6, 4), old__x=numbers(1)
    )
    state |= named(conv=numbers(2, 3, 4), embed=numbers(7, 2))
    shapes = {"layer_0/up/kernel": (5, 3), "layer_12/down/kernel": (3, 5), "query": (4, 2), "key": (4, 2), "value": (4, 2)}
    params, dropped = plan(state, RULES, shapes | {"conv": (4, 3, 2), "table": (7, 2)})
    assert list(params) == [*shapes, "conv", "table"]
    assert dropped == ["old.x"]
    wanted = [numbers(3, 5).T, numbers(5, 3).T, *(part.T for part in np.split(numbers(6, 4), 3))]
    for part, array in zip(params.values(), [*wanted, np.einsum("oik->kio", numbers(2, 3, 4)), numbers(7, 2)], strict=True):
        np.testing.assert_array_equal(part.all(), array)
        np.testing.assert_array_equal(part.read(1, 3), array[1:3])
        assert (part.shape, part.dtype) == (array.shape, array.dtype)


def test_all_errors_of_a_checkpoint_are_reported_together():
    state = named(
        layers__0__up__weight=numbers(3, 5), layers__1__up__weight=numbers(3), embed=numbers(7, 2), embed_again=numbers(7, 2)
    )
    state |= named(stranger=numbers(1), older__bias=numbers(1), qkv=numbers(7, 4), conv=numbers(2, 3))
    shapes = {"layer_0/up/kernel": (3, 5), "table": (7, 2), "query": (4, 2), "key": (4, 2), "value": (4, 2), "conv": (4, 3, 2)}
    with pytest.raises(ValueError, match="expected") as error:
        plan(state, RULES, shapes | {"norm": (4,)})
    lines = str(error.value).split("\n")
    wanted = [
        ("stranger: ", "got 0"),
        ("older.bias: ", "got 2"),
        ("embed_again: ", "one tensor for table, got also embed"),
        ("norm: ", "got none"),
        ("layers.0.up.weight: ", "shape (3, 5) of layer_0/up/kernel by the config, got (5, 3)"),
        ("layers.1.up.weight: ", "expected no layer_1/up/kernel by the config"),
        ("qkv: ", "shape (4, 2) of value by the config, got (4, 3)"),
        ("conv: ", "other axes, got shape (2, 3)"),
        ("conv: ", "got none"),
    ]
    assert len(lines) == len(wanted), error.value
    for start, part in wanted:
        assert sum(line.startswith(start) and part in line for line in lines) == 1, (start, error.value)


@pytest.mark.parametrize("naming", [torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm])
@pytest.mark.parametrize("kind", [torch.nn.Conv1d, torch.nn.ConvTranspose1d])
def test_weight_norm_is_folded_in_both_namings(naming, kind):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), naming(kind(6, 4, 3)))
    with torch.no_grad():
        for name, value in module.named_parameters():
            if name.endswith(("weight_g", "original0")):
                value.mul_(torch.empty_like(value).uniform_(0.5, 2))
    state = {name: value.numpy() for name, value in module.state_dict().items()}
    folded = checkpoints.folded(state)
    assert sorted(folded) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    module[1](torch.zeros(1, 6, 3))  # the older kind makes the weight only now
    theirs = module[1].weight.detach().numpy()
    assert folded["1.weight"].shape == theirs.shape
    np.testing.assert_allclose(folded["1.weight"].all(), theirs, rtol=1e-6)
    np.testing.assert_allclose(folded["1.weight"].read(1, 3), theirs[1:3], rtol=1e-6)
    half = next(name for name in state if name.endswith(("weight_v", "original1")))
    with pytest.raises(ValueError, match=r"magnitude and direction of 1\.weight"):
        fold_weight_norm({name: tensor(name, array) for name, array in state.items() if name != half})


def test_views_read_the_rows_that_are_asked_for():
    a, b = numbers(5, 2), numbers(3, 2)
    one, other = tensor("a", a), tensor("b", b)
    views = {
        "rows": (tensors.rows(one, 1, 4), a[1:4]),
        "padded": (tensors.padded(one, 8), np.pad(a, ((0, 3), (0, 0)))),
        "joined": (tensors.joined([one, other, tensors.rows(one, 0, 1)]), np.concatenate([a, b, a[:1]])),
        "cast": (tensors.cast(one, BFLOAT16), a.astype(BFLOAT16)),
        "all": (tensors.joined([tensors.padded(tensors.rows(one, 2, 5), 4), other]), np.concatenate([a[2:], 0 * a[:1], b])),
    }
    for name, (view, array) in views.items():
        assert (view.shape, view.dtype) == (array.shape, array.dtype), name
        for start in range(len(array)):
            for stop in range(start + 1, len(array) + 3):
                np.testing.assert_array_equal(view.read(start, stop), array[start:stop], err_msg=f"{name} {start} {stop}")
    assert tensors.equal(one, tensor("c", a.copy()), block=2)
    assert not tensors.equal(one, tensors.padded(one, 6))
    assert not tensors.equal(one, tensor("c", a + np.eye(5, 2, -3)), block=2)


def written(folder, params):
    """Writes parameters as a checkpoint; returns their digests."""
    with store.creating(folder) as partial:
        digests = store.write_params(partial, params)
        store.write_description(partial, {"kind": "test"})
    return digests


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


ARRAYS = {
    "a/kernel": numbers(7, 6),
    "a/bias": numbers(33, dtype=BFLOAT16),
    "b/c/d": numbers(2, 3, 4, dtype=np.float16),
    "scale": np.float32(3).reshape(()),
}


def test_parameters_come_back_bit_for_bit(tmp_path):
    written(tmp_path / "a", {path: tensor(path, array) for path, array in ARRAYS.items()})
    back = flat(store.read_params(tmp_path / "a"))
    assert back.keys() == ARRAYS.keys()
    for path, array in ARRAYS.items():
        assert (back[path].shape, back[path].dtype) == (array.shape, array.dtype)
        assert np.asarray(back[path]).tobytes() == array.tobytes()
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o755
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_large_parameter_is_read_a_few_rows_at_a_time(tmp_path, monkeypatch):
    array, asked = numbers(101, 8), []

    def read(start, stop):
        asked.append((start, stop))
        return array[start:stop]

    whole = written(tmp_path / "whole", {"a": tensor("a", array)})
    monkeypatch.setattr(store, "_BLOCK_BYTES", 320)
    parts = written(tmp_path / "parts", {"a": tensor("a", array)._replace(read=read)})
    assert sorted(asked) == [(start, min(start + 10, 101)) for start in range(0, 101, 10)]
    np.testing.assert_array_equal(store.read_params(tmp_path / "parts")["a"], array)
    assert parts == whole
    assert written(tmp_path / "other", {"a": tensor("a", array + np.eye(101, 8, -93, np.float32))}) != whole


@pytest.mark.parametrize("piece", [1, 96, 1000, 2**23])
def test_numbers_are_written_in_the_order_of_their_rows(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(store, "_BLOCK_BYTES", 2000)
    monkeypatch.setattr(store, "_PIECE_BYTES", piece)
    monkeypatch.setattr(store, "_WRITE_BYTES", 40)
    arrays = {"a": numbers(37, 41).T, "b": numbers(35, 50, dtype=BFLOAT16).T, "c": numbers(5, 6, 7).transpose(2, 1, 0)}
    views = written(tmp_path / "views", {path: tensor(path, array) for path, array in arrays.items()})
    copies = {path: tensor(path, np.ascontiguousarray(array)) for path, array in arrays.items()}
    assert written(tmp_path / "copies", copies) == views
    for path, leaf in flat(store.read_params(tmp_path / "views")).items():
        np.testing.assert_array_equal(leaf, arrays[path])


def test_parameters_are_restored_in_any_type(tmp_path):
    written(tmp_path / "a", {path: tensor(path, array) for path, array in ARRAYS.items()})
    for dtype in ("float32", "bfloat16", "float16"):
        for path, leaf in flat(store.read_params(tmp_path / "a", dtype)).items():
            assert leaf.dtype == dtype
            np.testing.assert_array_equal(leaf, ARRAYS[path].astype(leaf.dtype))


def test_a_folder_at_gs_is_read(llasa, monkeypatch):
    """With etils' paths, here to the same folder on disk; there is no gcsfs in the tests."""
    from etils import epath

    monkeypatch.setattr(store.importlib.util, "find_spec", lambda name: name)
    assert str(store.located(Path("gs://bucket/llasa"))) == "gs://bucket/llasa"
    monkeypatch.setattr(store, "located", lambda folder: epath.Path(llasa))
    came, wanted = pretrained.load(Path("gs://bucket/llasa")), pretrained.load(llasa)
    jax.tree.map(np.testing.assert_array_equal, came.params, wanted.params)
    assert came.model == wanted.model


def test_gs_without_its_package_or_credentials_is_one_sentence(monkeypatch):
    monkeypatch.setattr(store.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="expected the package gcsfs to read gs:/bucket/llasa, got none: pip install gcsfs"):
        pretrained.load(Path("gs://bucket/llasa"))
    file = mock.Mock(read_text=mock.Mock(side_effect=RuntimeError("Anonymous caller")))
    monkeypatch.setattr(store, "located", lambda folder: mock.MagicMock(__truediv__=lambda *_: file))
    with pytest.raises(ValueError, match=r"got RuntimeError .Anonymous caller.: log in by `gcloud auth"):
        store.read_description("gs://bucket/llasa")


def chunks_of(folder, path):
    return sorted(file.name for file in (folder / "params" / path).iterdir() if not file.name.startswith("."))


def test_a_matrix_is_cut_into_files_of_some_columns_with_the_same_digest(tmp_path, monkeypatch):
    """A host that needs some columns reads only their files; folders of whole rows, as they were written before, still load."""
    array = numbers(300, 64, dtype=BFLOAT16)
    whole = written(tmp_path / "whole", {"up": tensor("up", array)})
    monkeypatch.setattr(store, "_PART_BYTES", 2000)
    monkeypatch.setattr(store, "_BLOCK_BYTES", 20_000)
    cut = written(tmp_path / "cut", {"up": tensor("up", array), "turned": tensor("turned", numbers(64, 300).T)})
    assert cut["up"] == whole["up"]
    assert chunks_of(tmp_path / "whole", "up") == ["0.0"]
    assert chunks_of(tmp_path / "cut", "up") == [f"{row}.{column}" for row in range(2) for column in range(8)]
    np.testing.assert_array_equal(store.read_params(tmp_path / "cut")["up"], array)
    np.testing.assert_array_equal(store.read_params(tmp_path / "whole")["up"], array)
    (tmp_path / "cut" / "params" / "up" / "1.5").unlink()
    with pytest.raises(ValueError, match="expected complete parameters"):
        store.read_params(tmp_path / "cut")


MESH = """
import sys
import jax, numpy as np
from jaxspec import mesh
from jaxspec.checkpoint import pretrained, store
from jaxspec.models.placement import Placement

alone = pretrained.load(sys.argv[1])
placement = Placement(mesh.make(data=4, model=2))
spread = pretrained.load(sys.argv[1], placement=placement)
everywhere = store.read_params(sys.argv[1], sharding=placement.sharding())
for one, part, copy in zip(*map(jax.tree.leaves, (alone.params, spread.params, everywhere)), strict=True):
    assert len(one.devices()) == 1 and len(part.devices()) == len(copy.devices()) == 8
    np.testing.assert_array_equal(one, part)
    np.testing.assert_array_equal(one, copy)
shards = lambda leaf: {shard.data.shape for shard in leaf.addressable_shards}
assert shards(spread.params["table_0"]) == {(256, 48)} and shards(everywhere["table_0"]) == {(512, 48)}
assert shards(spread.params["layer_0"]["mlp"]["up"]["kernel"]) == {(48, 40)}
assert shards(spread.params["layer_0"]["attention"]["out"]["kernel"]) == {(24, 48)}

lm, prompt = pretrained.language_model(alone), np.arange(12, dtype=np.int32)[None]
logits = lambda params: jax.jit(lm.apply)(params, prompt, lm.init_cache(1, 16), np.zeros(1, np.int32))[0]
np.testing.assert_allclose(logits(spread.params), logits(alone.params), atol=1e-4)

draft = pretrained.load_draft(sys.argv[2], spread, placement)
assert draft.params["table_0"] is spread.params["table_0"]
assert shards(draft.params["norm"]["scale"]) == {(48,)} and len(draft.params["norm"]["scale"].devices()) == 8
smaller = pretrained.load_draft(sys.argv[1], spread, placement)
assert smaller.params["table_0"] is spread.params["table_0"]
assert shards(smaller.params["layer_0"]["mlp"]["up"]["kernel"]) == {(48, 40)}
try:
    pretrained.load(sys.argv[3], placement=placement)
except ValueError as error:
    assert "--pad-to 512" in str(error), error
else:
    raise AssertionError("409 rows are not divided by 2")
"""


def test_parameters_are_restored_onto_a_mesh(tmp_path):
    folder, odd = checkpoints.converted(tmp_path, "llasa", pad_to=128), checkpoints.converted(tmp_path, "llasa")
    model, params, _, _ = pretrained.load(folder)
    settings = families.to_json(smaller.Config(model.shape, shape=model.shape))
    description = DraftDescription("model", settings, model.digest, {"table_0": "table_0"})
    pretrained.save(tmp_path / "draft", description, params)
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", MESH, folder, tmp_path / "draft", odd], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_values_that_are_not_finite_are_reported_for_every_tensor(tmp_path):
    bad = {"w": numbers(4, 4), "v": numbers(300_000, dtype=BFLOAT16), "h": numbers(3, dtype=np.float16), "fine": numbers(2)}
    bad["w"][3, 1], bad["v"][-1], bad["h"][0] = np.nan, -np.inf, np.inf
    with pytest.raises(ValueError, match="finite") as error:
        written(tmp_path / "a", {f"{name}/kernel": tensor(f"model.{name}", array) for name, array in bad.items()})
    assert sorted(line.split(":")[0] for line in str(error.value).split("\n")) == ["model.h", "model.v", "model.w"]
    assert list(tmp_path.iterdir()) == []
    extremes = np.array([np.finfo(np.float16).max, np.finfo(np.float16).min, -0.0], np.float16)
    written(tmp_path / "a", {"a": tensor("a", extremes), "b": tensor("b", np.float32([3e38, -3e38]).astype(BFLOAT16))})


def test_a_disk_that_is_too_small_is_reported_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 27, 27))
    with pytest.raises(OSError, match=r"0\.00 GB free.*free some space"):
        written(tmp_path / "a", {"a": tensor("a", numbers(7))._replace(read=None)})
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    def full(start, stop):
        raise OSError(errno.ENOSPC, "No space left on device")

    def slow(start, stop):
        time.sleep(0.3)
        return numbers(7)

    params = {f"{i}": tensor(f"{i}", numbers(7)) for i in range(4)} | {"slow": tensor("slow", numbers(7))._replace(read=slow)}
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "a", params | {"full": tensor("full", numbers(7))._replace(read=full)})
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, sys
import numpy as np
from jaxspec.checkpoint import store
from jaxspec.checkpoint.tensors import Tensor
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
array = np.random.default_rng(0).standard_normal((1000, 100)).astype(np.float32)
try:
    with store.creating(sys.argv[1]) as folder:
        store.write_params(folder, {"a": Tensor("a", array.shape, array.dtype, lambda start, stop: array[start:stop])})
except OSError as error:
    print(error)
"""


def test_a_disk_that_refuses_what_is_written_is_an_os_error(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path / "a"], capture_output=True, text=True, check=True)
    assert "too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_written_atomically(tmp_path):
    def stopped():
        with store.creating(tmp_path / "a") as folder:
            (folder / "x").touch()
            assert not (tmp_path / "a").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name, why in [
        ("file", "exists"),
        ("link", "exists"),
        (".", "exists"),
        ("none/a", "none first"),
        ("file/a", "file first"),
    ]:
        with pytest.raises(ValueError, match=why), store.creating(tmp_path / name):
            raise AssertionError("not reached")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_folder_in_the_working_directory_needs_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written("a", {"a": tensor("a", numbers(7))})
    assert store.read_description("a") == {"kind": "test"}
    assert [path.name for path in Path().iterdir()] == ["a"]


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "7", '"format"', "{}", "\udcff", '{"format": 2}', '{"format": "1"}'])
def test_a_damaged_description_is_refused(tmp_path, text):
    (tmp_path / "jaxspec.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"expected .*(jaxspec convert|install a newer)"):
        store.read_description(tmp_path)


@pytest.fixture(scope="module")
def llasa(tmp_path_factory):
    return checkpoints.converted(tmp_path_factory.mktemp("checkpoint"), "llasa")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": []}, "shape is"),
        ({"shape": {"width": 8}}, "missing"),
        ({"shape": None}, "shape is None"),
        ({"stop_ids": 5}, "stop_ids is 5"),
        ({"sampling": {"temperature": -1}}, "temperature"),
        ({"sampling": None}, "sampling"),
        ({"tables": []}, "tables"),
        ({"more": 1}, "more"),
    ],
)
def test_a_description_of_something_else_is_refused(llasa, tmp_path, change, message):
    shutil.copytree(llasa, tmp_path / "a")
    path = tmp_path / "a" / "jaxspec.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"expected the description of a language model in .*got .*{message}"):
        pretrained.load(tmp_path / "a")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kind": "codec"}))
    with pytest.raises(ValueError, match="expected the description of a codec in"):
        pretrained.load_codec(tmp_path / "a")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kind": None}))
    with pytest.raises(ValueError, match=r"expected kind model, draft, codec in .*got None"):
        pretrained.load(tmp_path / "a")


def emptied(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def halved(folder):
    for path in folder.rglob("*/[0-9]*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        shutil.rmtree,
        emptied,
        halved,
        lambda folder: (folder / "_METADATA").write_text("{"),
        lambda folder: (folder / "norm.scale" / ".zarray").unlink(),
        lambda folder: (folder / "norm.scale" / "0").unlink(),
    ],
    ids=["missing", "emptied", "halved", "metadata", "shape", "data"],
)
def test_damaged_parameters_are_refused(llasa, tmp_path, damage):
    shutil.copytree(llasa, tmp_path / "a")
    damage(tmp_path / "a" / "params")
    with pytest.raises(ValueError, match=r"expected complete parameters at .*params, got .*: convert the checkpoint again"):
        pretrained.load(tmp_path / "a")


# --- save, load and load_draft ------------------------------------------------------------------------------------------------


def equal(one, other):
    """Whether two trees have equal leaves, bit for bit."""
    one, other = flat(one), flat(other)
    same = [np.asarray(one[path]).tobytes() == np.asarray(other[path]).tobytes() for path in one if path in other]
    return one.keys() == other.keys() and all(same) and all(one[path].dtype == other[path].dtype for path in one)


def edited(folder, copy, **changes):
    """A copy of a folder with other values in its description."""
    shutil.copytree(folder, copy)
    path = copy / "jaxspec.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return copy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_saved_and_loaded_bit_for_bit(llasa, tmp_path, dtype):
    loaded = pretrained.load(llasa, dtype)
    written = pretrained.save(tmp_path / "a", loaded.model, loaded.params, loaded.tokenizer)
    again = pretrained.load(tmp_path / "a")
    assert equal(again.params, loaded.params)
    assert again.model == written
    assert written.parameters == sum(leaf.size for leaf in flat(loaded.params).values())
    assert again.tokenizer.to_str() == loaded.tokenizer.to_str()
    same = (loaded.model.digest, loaded.model.tables) == (written.digest, written.tables)
    assert same == (dtype == "float32")  # as in the checkpoint
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_of_an_earlier_version_loads(llasa, tmp_path):
    edited(llasa, tmp_path / "a", kind="language model")
    values = json.loads((tmp_path / "a" / "jaxspec.json").read_text())
    del values["parameters"]
    (tmp_path / "a" / "jaxspec.json").write_text(json.dumps(values))
    assert equal(pretrained.load(tmp_path / "a").params, pretrained.load(llasa).params)


def test_a_model_that_could_not_be_loaded_is_not_saved(llasa, tmp_path):
    model, params, tokenizer, _ = pretrained.load(llasa)
    nan = params | {"norm": {"scale": params["norm"]["scale"] * np.nan}}
    for arguments, message in (
        ((model, params), "expected a tokenizer"),
        ((model, {**params, "more": np.ones(2)}, tokenizer), r"expected shape None of more, got \(2,\)"),
        ((model, {**params, "table_0": np.ones((2, 48))}, tokenizer), r"expected shape \(409, 48\) of table_0, got \(2, 48\)"),
        ((model, nan, tokenizer), "norm/scale: expected finite values, got NaN"),
        ((DraftDescription("model", {}, ""), params), "expected the digest of the draft's target"),
        ((DraftDescription("eagle9", {}, model.digest), params), "expected a draft of model, .*, got 'eagle9'"),
    ):
        with pytest.raises(ValueError, match=message):
            pretrained.save(tmp_path / "a", *arguments)
        assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def draft(llasa, tmp_path_factory):
    """A draft of one layer that was trained for a target: it shares the target's table, and has numbers of several types."""
    target, folder = pretrained.load(llasa), tmp_path_factory.mktemp("draft") / "draft"
    shape = dataclasses.replace(target.model.shape, layers=1)
    settings = families.to_json(smaller.Config(target.model.shape, shape=shape))
    description = DraftDescription("model", settings, target.model.digest, {"table_0": "table_0"}, "MIT", "a test")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), transformer.init_params(jax.random.key(0), shape))
    params |= {"map": jnp.arange(5, dtype=jnp.int32)}
    written = pretrained.save(folder, description, params)
    assert written.digest.startswith("blake3:")
    assert written.parameters == sum(leaf.size for leaf in flat(params).values()) - params["table_0"].size
    return folder, params


def test_a_draft_uses_the_targets_arrays_and_drafts(llasa, draft):
    folder, params = draft
    assert not [path for path in folder.rglob("*") if "table_0" in path.name]
    target = pretrained.load(llasa)
    before = len(jax.live_arrays())
    loaded = pretrained.load_draft(folder, target)
    ours = flat(loaded.params)
    assert len(jax.live_arrays()) - before == len(ours) - 1  # no second table on the device
    assert loaded.params["table_0"] is target.params["table_0"]
    pointers = [tree["table_0"].unsafe_buffer_pointer() for tree in (loaded.params, target.params)]
    assert pointers[0] == pointers[1]
    assert pretrained.memory_bytes(target.params, loaded.params) == pretrained.memory_bytes(target.params) + sum(
        leaf.nbytes for path, leaf in ours.items() if path != "table_0"
    )
    assert equal(loaded.params, params | {"table_0": target.params["table_0"]})
    assert loaded.drafter(3) is loaded.drafter(3) is not loaded.drafter(2)
    assert loaded.drafter(3) is pretrained.load_draft(folder, target).drafter(3)  # so that a second load does not recompile

    lm, prompt = pretrained.language_model(target), np.array([[313, 5, 7, 330], [320, 5, 0, 0]], np.int32)
    asked = (prompt, np.array([4, 2], np.int32))
    options = {"max_new_tokens": 12, "stop_ids": target.model.stop_ids, "sampling": Sampling(temperature=0)}
    plain = autoregressive(jax.random.key(0), lm, target.params, *asked, **options)
    params = {name: leaf for name, leaf in loaded.params.items() if name != "map"}
    drafted = generate(jax.random.key(0), lm, target.params, loaded.drafter(3), params, verify.exact(), *asked, **options)
    np.testing.assert_array_equal(drafted.tokens, plain.tokens)
    assert drafted.info.drafted.sum() > 0
    assert equal(target.params, pretrained.load(llasa).params)  # not donated


def test_a_draft_computes_in_the_targets_dtype(llasa, draft):
    target = pretrained.load(llasa, "bfloat16")
    loaded = pretrained.load_draft(draft[0], target)
    lm = transformer.language_model(dataclasses.replace(target.model.shape, layers=1))
    assert loaded.drafter(2) is model_draft(lm, 2)
    assert target.model.shape.dtype == "bfloat16"
    params = flat(loaded.params)
    assert {str(leaf.dtype) for path, leaf in params.items() if path != "map"} == {"bfloat16"}
    assert params["map"].dtype == np.int32


def test_a_loaded_draft_is_saved_again(llasa, draft, tmp_path):
    target = pretrained.load(llasa)
    loaded = pretrained.load_draft(draft[0], target)
    pretrained.save(tmp_path / "again", descriptions.read_as(draft[0], DraftDescription), loaded.params)
    assert (tmp_path / "again" / "jaxspec.json").read_text() == (draft[0] / "jaxspec.json").read_text()
    assert equal(pretrained.load_draft(tmp_path / "again", target).params, loaded.params)


def test_a_draft_is_refused_beside_another_target(llasa, draft, tmp_path):
    target = pretrained.load(llasa)
    changed = target.params | {"norm": {"scale": target.params["norm"]["scale"] + 1}}
    other = pretrained.save(tmp_path / "other", target.model, changed, target.tokenizer)
    assert other.digest != target.model.digest
    assert other.tables == target.model.tables
    with pytest.raises(ValueError, match="expected the target") as error:
        pretrained.load_draft(draft[0], pretrained.load(tmp_path / "other"))
    for part in (target.model.digest, other.digest, str(draft[0]), str(tmp_path / "other"), "trained for"):
        assert part in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_smaller_language_model_drafts_too(llasa, tmp_path):
    target = pretrained.load(llasa)
    shape = dataclasses.replace(target.model.shape, layers=1)
    params = {name: leaf for name, leaf in target.params.items() if name not in ("layer_1", "layer_2")}
    pretrained.save(tmp_path / "a", dataclasses.replace(target.model, shape=shape), params, target.tokenizer)
    loaded = pretrained.load_draft(tmp_path / "a", target)
    assert loaded.params["table_0"] is target.params["table_0"]
    assert loaded.params["norm"]["scale"] is not target.params["norm"]["scale"]
    assert loaded.drafter(2) is loaded.drafter(2)


def test_a_folder_of_another_kind_is_refused_in_one_sentence(llasa, draft, tmp_path):
    target, codec = pretrained.load(llasa), tmp_path / "codec"
    shape = dataclasses.asdict(pretrained.CODECS["snac"].Config())
    pretrained.save(codec, CodecDescription("snac", shape, "MIT"), {"a": np.ones(3, np.float32)})
    for function, folder, message in (
        (pretrained.load, draft[0], "expected a language model in .*, got a draft: give the folder of a language model"),
        (pretrained.load, codec, "expected a language model in .*, got a codec: give the folder of a language model"),
        (pretrained.load_codec, llasa, "expected a codec in .*, got a language model: give the folder of a codec"),
        (pretrained.load_codec, draft[0], "expected a codec in .*, got a draft: give the folder of a codec"),
        (lambda folder: pretrained.load_draft(folder, target), codec, "expected a draft in .*, got a codec: give"),
        (pretrained.load, tmp_path / "none", "expected a folder that `jaxspec convert` made at .*none, got no such folder: "),
    ):
        with pytest.raises(ValueError, match=message) as error:
            function(folder)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "eagle9"}, "expected a draft of model, .* in .*got 'eagle9'"),
        ({"settings": {}}, "got 'model' with .*missing.*target"),
        ({"settings": {"target": {"width": 3}}}, "got 'model' with .*missing"),
        ({"settings": 3}, "expected the description of a draft in .*settings is 3"),
        ({"shared": {"table_0": "nowhere"}}, "expected a target with nowhere for"),
        ({"target": 5}, "target is 5"),
        ({"more": 5}, "more"),
    ],
)
def test_a_damaged_draft_is_refused(llasa, draft, tmp_path, changes, message):
    folder = edited(draft[0], tmp_path / "a", **changes)
    with pytest.raises(ValueError, match=message):
        pretrained.load_draft(folder, pretrained.load(llasa))


def test_a_new_family_of_drafts_is_one_row(llasa, draft, tmp_path, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Config:
        vocab: int
        order: int

    def make(config):  # makes a new object at each call, unlike ngram_draft
        return lambda draft_length: Draft(*ngram_draft(draft_length, config.vocab, config.order))

    family = types.SimpleNamespace(Config=Config, drafter=make, feature_layers=lambda config: (1,), max_length=lambda config: 8)
    monkeypatch.setitem(FAMILIES, "table", family)
    target = pretrained.load(llasa)
    description = DraftDescription("table", families.to_json(Config(409, 3)), target.model.digest, {"head": "table_0"})
    pretrained.save(tmp_path / "a", description, {"own": np.ones(2, np.float32), "head": np.zeros(1)})
    loaded = pretrained.load_draft(tmp_path / "a", target)
    assert loaded.drafter(4) is loaded.drafter(4)
    assert loaded.drafter(4) == ngram_draft(4, 409, 3) != loaded.drafter(3)
    assert loaded.params["head"] is target.params["table_0"]
    assert (loaded.feature_layers, loaded.max_length) == ((1,), 8)
    assert pretrained.with_features(target, loaded.feature_layers).model.shape.feature_layers == (1,)
