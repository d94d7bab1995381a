"""The S3 tokenizers against the package s3tokenizer, from random weights in the layouts of the published files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import planned
from reference_s3 import package, s3_model, s3_onnx

from jaxspec.checkpoint.tensors import of_array
from jaxspec.codec import s3
from jaxspec.codec.s3 import Config, abstract_params, num_codes, tokenizer
from jaxspec.convert import onnx
from jaxspec.convert.s3 import RULES, VERSIONS, config, own

SMALL = {"n_audio_state": 128, "n_audio_head": 2, "n_audio_layer": 2}
LENGTHS = np.array([203, 1, 0, 4, 102, 77], np.int32)
BORDER = 1e-4  # of rounding


@pytest.fixture(scope="module")
def reference():
    return s3_model(**SMALL)


def torch_tensors(model, prefix=""):
    return {prefix + name: of_array(name, value.numpy()) for name, value in model.state_dict().items()}


def converted(tensors):
    """The configuration and the parameters of a checkpoint."""
    settings, rules = config(own(tensors))
    return settings, planned(own(tensors), rules, abstract_params(settings))


@pytest.fixture(scope="module")
def ours(reference):
    return converted(torch_tensors(reference))


def frames(count=203, rows=6, seed=0):
    return np.random.default_rng(seed).normal(0, 0.5, (rows, count, 128)).astype(np.float32)


def expected(model, log_mel):
    """The reference's codes of one row, and its coordinates before they are rounded."""
    with torch.inference_mode():
        hidden, count = model.encoder(torch.tensor(log_mel)[None].mT, torch.tensor([len(log_mel)]))
        coordinates = model.quantizer._codebook.project_down(hidden)[0].tanh() * 0.9990000128746033
        assert int(count) == hidden.shape[1]
        return model.quantizer.encode(hidden)[0].numpy(), coordinates.numpy()


def compare(model, settings, params, log_mel, lengths):
    """Codes equal but where a coordinate lies on a border; returns the largest error, the borders and the distinct codes."""
    codes = np.asarray(tokenizer(settings)(params, log_mel, lengths))
    assert (codes.dtype, codes.shape) == (np.int32, (len(lengths), num_codes(log_mel.shape[1])))
    with jax.default_matmul_precision("highest"):
        coordinates = np.asarray(jax.jit(s3.Encoder(settings).apply)({"params": params}, log_mel, lengths))
    error, borders, seen = 0.0, 0, set()
    for row, length in enumerate(lengths):
        count = num_codes(int(length))
        assert not codes[row, count:].any()
        if count:
            theirs, before = expected(model, log_mel[row, :length])
            assert len(theirs) == count
            near = (np.abs(np.abs(before) - 0.5) < BORDER).any(-1)
            np.testing.assert_array_equal(codes[row, :count][~near], theirs[~near])
            error, borders = max(error, np.abs(coordinates[row, :count] - before).max()), borders + near.sum()
            seen |= set(theirs.tolist())
    return error, borders, len(seen)


@pytest.mark.parametrize("version", [2, 3])
def test_codes_are_the_packages(version):
    model = s3_model(version, **SMALL)
    settings, params = converted(torch_tensors(model))
    assert settings == Config(width=128, layers=2, heads=2, mlp_width=512)
    error, borders, seen = compare(model, settings, params, frames(), LENGTHS)
    assert error < 1e-5, error
    assert borders <= 2, f"{borders} codes with a coordinate on a border"
    assert seen > 40


@pytest.mark.slow
def test_codes_of_the_true_size_are_the_packages():
    model = s3_model()
    settings, params = converted(torch_tensors(model))
    assert settings == Config()
    error, borders, seen = compare(model, settings, params, frames(1000, 2), np.array([1000, 611], np.int32))
    assert error < 5e-5, error
    assert borders <= 8, f"{borders} codes with a coordinate on a border"
    assert seen > 50


def test_codes_of_speech_features_are_the_packages(reference, ours):
    """Features of a chirp by the package's own front-end, whose values have other ranges than noise."""
    time = np.arange(16_000, dtype=np.float32) / 16_000
    wave = torch.tensor(0.3 * np.sin(2 * np.pi * (200 + 900 * time) * time) * np.exp(-2 * time))
    log_mel = package("s3tokenizer.utils").log_mel_spectrogram(wave).mT.numpy()[None]
    assert log_mel.shape == (1, 100, 128)
    error, borders, _ = compare(reference, *ours, log_mel, np.array([100], np.int32))
    assert error < 1e-5
    assert not borders


def test_a_row_is_independent_of_padding_and_batch(ours):
    settings, params = ours
    log_mel = frames()
    beyond = np.arange(log_mel.shape[1])[None, :, None] >= LENGTHS[:, None, None]
    codes = np.asarray(tokenizer(settings)(params, log_mel, LENGTHS))
    for garbage in (np.nan, 1e9):
        again = tokenizer(settings)(params, np.where(beyond, np.float32(garbage), log_mel), LENGTHS)
        np.testing.assert_array_equal(again, codes)
    for row, length in enumerate(LENGTHS):
        if length:
            alone = tokenizer(settings)(params, log_mel[row : row + 1, :length], LENGTHS[row : row + 1])
            np.testing.assert_array_equal(alone[0], codes[row, : num_codes(length)])


def test_num_codes_is_that_of_the_package(reference):
    for length in range(1, 40):
        assert len(expected(reference, frames(length, 1)[0])[0]) == num_codes(length)
    assert num_codes(0) == 0
    np.testing.assert_array_equal(num_codes(jnp.array([0, 5, 3000])), [0, 2, 750])


def test_equal_configs_give_the_same_object_and_strict_modes_hold(ours):
    settings, params = ours
    assert tokenizer(settings) is tokenizer(dataclasses.replace(settings))
    arguments = jax.device_put((params, frames(40, 2), np.array([40, 9], np.int32)))
    expected = tokenizer(settings)(*arguments)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.transfer_guard("disallow"):
        codes = tokenizer(settings)(*arguments)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_onnx_file_gives_the_same(tmp_path, decomposed):
    """In the layouts of v2, whose norms are one node, and of v3, which the package reads too."""
    model = s3_model(3 if decomposed else 2, **SMALL)
    path = s3_onnx(tmp_path / "a.onnx", model, decomposed=decomposed)
    utils = package("s3tokenizer.utils")
    theirs = utils.onnx2torch_v3(str(path)) if decomposed else utils.onnx2torch(str(path))
    assert theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in theirs.items())
    of_torch, of_onnx = converted(torch_tensors(model)), converted(onnx.tensors(path))
    assert of_torch[0] == of_onnx[0]
    jax.tree.map(np.testing.assert_array_equal, of_torch[1], of_onnx[1])


@pytest.mark.parametrize("decomposed", [False, True])
def test_the_constants_of_the_norms_are_those_of_the_network(tmp_path, reference, decomposed):
    path = s3_onnx(tmp_path / "a.onnx", reference, (1e-6, 2e-5), decomposed, save_as_external_data=True, size_threshold=64)
    settings, params = converted(onnx.tensors(path))
    assert settings.norm_eps == (1e-6, 2e-5)
    for block in reference.encoder.blocks:
        block.attn_ln.eps, block.mlp_ln.eps = 1e-6, 2e-5
    log_mel = 1e-3 * frames(40, 1)
    try:
        error, *_ = compare(reference, settings, params, log_mel, np.array([40], np.int32))
    finally:
        for block in reference.encoder.blocks:
            block.attn_ln.eps = block.mlp_ln.eps = 1e-5
    assert error < 1e-5
    tensors = onnx.tensors(path)
    tensors["blocks.1.mlp_ln.epsilon"] = of_array("", np.array(1e-3, np.float32))
    with pytest.raises(ValueError, match="one epsilon for the mlp_ln of all layers"):
        config(own(tensors))


def test_it_is_found_within_a_larger_checkpoint(reference, ours):
    tensors = torch_tensors(reference, "tokenizer.") | {"flow.a": of_array("flow.a", np.zeros(3, np.float32))}
    tensors |= {f"tokenizer.{name}": of_array(name, np.zeros(3, np.float32)) for name in ("_mel_filters", "window")}
    assert own(tensors).keys() == torch_tensors(reference).keys() | {"_mel_filters", "window"}
    jax.tree.map(np.testing.assert_array_equal, converted(tensors), ours)
    assert own({"flow.a": tensors["flow.a"]}) == {}


def test_the_versions_are_those_published(tmp_path):
    """The keys and shapes of v2 and v3, without their numbers."""
    for version, layers, count, numbers in ((2, 6, 102, 123.7e6), (3, 12, 198, 242.0e6)):
        with torch.device("meta"):
            state = s3_model_on_meta(version)
        assert len(state) == count
        tensors = {name: of_array(name, np.broadcast_to(np.int8(0), tuple(value.shape))) for name, value in state.items()}
        settings, rules = config(own(tensors))
        assert (settings, rules) == (Config(layers=layers), RULES)
        assert VERSIONS[settings.layers] == f"s3-v{version}"
        shapes = jax.tree.leaves(abstract_params(settings))
        assert sum(leaf.size for leaf in shapes) == pytest.approx(numbers, rel=1e-3)
        assert len(shapes) == count


def s3_model_on_meta(version):
    module = package(f"s3tokenizer.model_v{version}")
    kind, settings = (module.S3TokenizerV2, module.ModelConfig) if version == 2 else (module.S3TokenizerV3, module.ModelConfigV3)
    return kind(f"v{version}", settings()).state_dict()


def test_something_else_is_refused(reference):
    tensors = torch_tensors(reference)
    for name in ("encoder.conv1.weight", "encoder.blocks.0.mlp.0.weight"):
        with pytest.raises(ValueError, match=f"without {name.removeprefix('encoder.')}"):
            config({key: value for key, value in tensors.items() if key != name})
    with pytest.raises(ValueError, match="heads of 64, got 100"):
        config(tensors | {"encoder.conv1.weight": of_array("", np.zeros((100, 128, 3), np.float32))})
    del tensors["encoder.blocks.1.attn.fsmn_block.weight"]
    with pytest.raises(ValueError, match=r"layer_1/attention/memory/kernel: expected a tensor, got none"):
        converted(tensors)
