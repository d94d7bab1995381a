"""CAM++ against the package speakerlab, from random weights in torch's layout and as torch exports it to ONNX."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import planned
from reference_s3 import campplus_model, campplus_onnx, package

from jaxspec.checkpoint.tensors import of_array
from jaxspec.codec.campplus import Config, abstract_params, speaker_encoder
from jaxspec.convert import onnx
from jaxspec.convert.campplus import config, own

SMALL = Config(16, 32, 8, 4, 8, 4, (2, 1, 1), 12)
LENGTHS = np.array([460, 3, 199, 4, 201, 400], np.int32)


@pytest.fixture(scope="module")
def reference():
    return campplus_model(small=True)


def torch_tensors(model, prefix=""):
    return {prefix + name: of_array(name, value.numpy()) for name, value in model.state_dict().items()}


def converted(tensors):
    """The configuration and the parameters of a checkpoint."""
    tensors = own(tensors)
    settings, rules = config(tensors)
    return settings, planned(tensors, rules, abstract_params(settings))


@pytest.fixture(scope="module")
def ours(reference):
    return converted(torch_tensors(reference))


def frames(count=460, rows=6, bins=16, seed=0):
    return np.random.default_rng(seed).normal(3, 2, (rows, count, bins)).astype(np.float32)


def expected(model, fbank):
    """The reference's embedding of one row."""
    with torch.no_grad():
        return model(torch.tensor(fbank - fbank.mean(0))[None])[0].numpy()


def test_embeddings_are_the_packages(reference, ours):
    settings, params = ours
    assert settings == SMALL
    fbank = frames()
    embeddings = speaker_encoder(settings)(params, fbank, LENGTHS)
    assert (embeddings.dtype, embeddings.shape) == (jnp.float32, (len(LENGTHS), 12))
    for row, length in enumerate(LENGTHS):
        theirs = expected(reference, fbank[row, :length])
        np.testing.assert_allclose(embeddings[row], theirs, atol=1e-5)
        assert theirs.std() > 0.1


@pytest.mark.slow
def test_embeddings_of_the_true_size_are_the_packages():
    model = campplus_model()
    settings, params = converted(torch_tensors(model))
    assert settings == Config()
    fbank, lengths = frames(460, 2, 80), np.array([460, 333], np.int32)
    embeddings = speaker_encoder(settings)(params, fbank, lengths)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(embeddings[row], expected(model, fbank[row, :length]), atol=1e-5)


def test_the_older_rule_of_the_last_segment(reference, ours, monkeypatch):
    """Sums of a partial segment are divided by 100, which changes rows whose steps of 20 ms are no multiple of it."""

    def seg_pooling(layer, x, seg_len=100):
        steps = x.shape[-1]
        padded = torch.nn.functional.pad(x, (0, -steps % seg_len))
        return padded.unflatten(-1, (-1, seg_len)).mean(-1, keepdim=True).expand(-1, -1, -1, seg_len).flatten(-2)[..., :steps]

    settings, params = ours
    older = dataclasses.replace(settings, pad_segments=True)
    fbank = frames()
    embeddings = speaker_encoder(older)(params, fbank, LENGTHS)
    differences = np.abs(embeddings - speaker_encoder(settings)(params, fbank, LENGTHS)).max(-1)
    np.testing.assert_array_equal(differences > 1e-6, -(-LENGTHS // 2) % 100 > 0)
    monkeypatch.setattr(package("speakerlab.models.campplus.layers").CAMLayer, "seg_pooling", seg_pooling)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(embeddings[row], expected(reference, fbank[row, :length]), atol=1e-5)


@pytest.mark.parametrize("pad_segments", [False, True])
def test_a_row_is_independent_of_padding_and_batch(ours, pad_segments):
    settings, params = dataclasses.replace(ours[0], pad_segments=pad_segments), ours[1]
    lengths = np.array([460, 0, 199], np.int32)
    fbank = frames(rows=3)
    encode = speaker_encoder(settings)
    embeddings = encode(params, fbank, lengths)
    assert jnp.isfinite(embeddings).all()
    beyond = np.arange(fbank.shape[1])[None, :, None] >= lengths[:, None, None]
    for garbage in (np.nan, 1e9):
        np.testing.assert_array_equal(encode(params, np.where(beyond, np.float32(garbage), fbank), lengths), embeddings)
    for row, length in enumerate(lengths):
        if length:
            alone = encode(params, fbank[row : row + 1, :length], lengths[row : row + 1])
            np.testing.assert_allclose(alone[0], embeddings[row], atol=1e-5)


def test_the_mean_may_be_subtracted_before(ours):
    settings, params = ours
    fbank = frames(100, 1)
    without = fbank - fbank.mean(1, keepdims=True)
    one, other = (speaker_encoder(settings)(params, x, np.array([100], np.int32)) for x in (fbank, without))
    np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("plain", [False, True])
def test_an_onnx_file_gives_the_same(tmp_path, plain):
    """``plain``: equal tensors, which the file has once."""
    model = campplus_model(small=True, plain=plain)
    of_torch = converted(torch_tensors(model))
    of_onnx = converted(onnx.tensors(campplus_onnx(tmp_path / "a.onnx", model)))
    assert of_torch[0] == of_onnx[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), of_torch[1], of_onnx[1])


def test_the_constant_of_a_norm_is_that_of_the_network(tmp_path):
    model = campplus_model(small=True)
    for module in model.modules():
        if hasattr(module, "running_mean"):
            module.eps = 0.1
    settings, params = converted(onnx.tensors(campplus_onnx(tmp_path / "a.onnx", model)))
    fbank = frames(100, 1)
    embedding = speaker_encoder(settings)(params, fbank, np.array([100], np.int32))[0]
    np.testing.assert_allclose(embedding, expected(model, fbank[0]), atol=1e-5)


def test_it_is_found_within_a_larger_checkpoint(reference, ours):
    tensors = torch_tensors(reference, "speaker_encoder.") | {"flow.a": of_array("flow.a", np.zeros(3, np.float32))}
    jax.tree.map(np.testing.assert_array_equal, converted(tensors), ours)
    assert own({"flow.a": tensors["flow.a"]}) == {}


def test_the_published_size():
    with torch.device("meta"):
        model = package("speakerlab.models.campplus.DTDNN").CAMPPlus(feat_dim=80, embedding_size=192)
    state = model.state_dict()
    assert len(state) == 937
    tensors = {name: of_array(name, np.broadcast_to(np.float32(1), tuple(value.shape))) for name, value in state.items()}
    settings, params = converted(tensors)
    assert settings == Config()
    assert len(jax.tree.leaves(params)) == 24 + 2 + 52 * 9 + 2 + 3 * 2 + 2 + 2  # of which transit 1 and 2 have no bias
    assert speaker_encoder(settings) is speaker_encoder(Config())


def test_strict_modes_of_jax(ours):
    settings, params = ours
    arguments = jax.device_put((params, frames(40, 2), np.array([40, 9], np.int32)))
    expected = speaker_encoder(settings)(*arguments)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.transfer_guard("disallow"):
        embeddings = speaker_encoder(settings)(*arguments)
    assert embeddings.dtype == jnp.float32
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)


def test_something_else_is_refused(reference):
    tensors = own(torch_tensors(reference))
    for name in ("head.conv1.weight", "xvector.dense.linear.weight", "xvector.block1.tdnnd1.cam_layer.linear1.weight"):
        with pytest.raises(ValueError, match=f"without {name}"):
            config({key: value for key, value in tensors.items() if key != name})
    tensors = torch_tensors(reference)
    del tensors["head.bn1.running_var"]
    with pytest.raises(ValueError, match=r"mean and variance \[32\] of head\.bn1"):
        own(tensors)
    tensors = torch_tensors(reference)
    with pytest.raises(ValueError, match=r"mean and variance \[32\] of head\.bn1, got running_mean \[3\]"):
        own(tensors | {"head.bn1.running_mean": of_array("", np.zeros(3, np.float32))})
    for name in [name for name in tensors if name.startswith("head.bn1.")]:
        del tensors[name]
    with pytest.raises(ValueError, match="head/conv1/bias: expected a tensor, got none"):
        converted(tensors)
