"""The flows of CosyVoice 2 and 3 against PyTorch, from random weights in the layout of flow.pt, and on their own."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_flow
import torch
from checkpoints import folded, planned

from jaxspec.acoustic import flow, noise
from jaxspec.checkpoint.tensors import of_array
from jaxspec.common.trees import flatten
from jaxspec.convert import core
from jaxspec.convert.flow import config

MAKERS = {2: reference_flow.version2, 3: reference_flow.version3}
FULL = {
    2: {"width": 256, "heads": 8, "stages": 12, "blocks": 4, "encoder": 512, "encoder_layers": (6, 4), "codes": 6561},
    3: {"width": 1024, "layers": 22, "hidden": 1024, "codes": 6561},
}
COUNTS = {2: (1121, 112_549_360), 3: (330, 332_257_120)}  # tensors and numbers in the published files
MODES = [{"streaming": streaming, "finalize": finalize} for streaming, finalize in itertools.product((False, True), repeat=2)]
N = 64
LENGTH, PROMPT = np.array([61, 40, 9], np.int32), np.array([12, 0, 5], np.int32)


def rows(seed=0):
    """Arguments of three rows, with other codes and numbers in their padding."""
    draw = np.random.default_rng(seed)
    codes = draw.integers(-1, 40, (3, N), np.int32)
    return codes, LENGTH, PROMPT, draw.standard_normal((3, 30, 80), np.float32), 3 * draw.standard_normal((3, 192), np.float32)


def row(arguments, i, cut=False):
    """Those of one row; ``cut``: without its padding."""
    codes, length, prompt, mel, speaker = (x[i : i + 1] for x in arguments)
    steps, frames = (length[0], 2 * prompt[0]) if cut else (N, 30)
    return codes[:, :steps], length, prompt, mel[:, :frames], speaker


def tensors_of(model):
    return folded({name: value.numpy() for name, value in model.state_dict().items()})


def converted(model, **changes):
    """The compiled function and the parameters of a model."""
    tensors = tensors_of(model)
    made, rules = config({name: tensor.shape for name, tensor in tensors.items()})
    return flow.flow(dataclasses.replace(made, **changes)).mel, planned(tensors, rules, flow.abstract_params(made))


@pytest.fixture(scope="module", params=(2, 3))
def version(request):
    return request.param


@pytest.fixture(scope="module")
def reference(version):
    return MAKERS[version]()


@pytest.fixture(scope="module")
def ours(reference):
    return converted(reference)


def expected(model, arguments, i, **mode):
    codes, _, prompt, mel, speaker = (x[0] for x in row(arguments, i, cut=True))
    return reference_flow.mel(model, codes.astype(np.int64), prompt, mel, speaker, **mode)


USUAL = [pytest.param(mode, marks=pytest.mark.slow if mode["streaming"] == mode["finalize"] else ()) for mode in MODES]


@pytest.mark.parametrize("mode", USUAL)
def test_mel_of_a_padded_batch_is_the_references_of_each_row(reference, ours, mode):
    mel, params = ours
    out = np.asarray(mel(params, *rows(), **mode))
    assert out.shape == (3, 2 * N, 80)
    for i, made in enumerate(out):
        end = 2 * LENGTH[i] - (0 if mode["finalize"] else 6)
        np.testing.assert_allclose(made[2 * PROMPT[i] : end], expected(reference, rows(), i, **mode), atol=2e-5)
        assert not made[end:].any()


def test_the_modes_differ(reference):
    made = [expected(reference, rows(), 0, **mode)[:90] for mode in MODES]
    assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.combinations(made, 2))


def test_a_row_alone_is_the_row_in_its_batch(ours):
    mel, params = ours
    together = mel(params, *rows(), streaming=True, finalize=False)
    alone = mel(params, *row(rows(), 1, cut=True), streaming=True, finalize=False)
    np.testing.assert_allclose(together[1, : 2 * LENGTH[1]], alone[0], atol=1e-5)


def test_whole_chunks_of_a_stream_are_final(ours):
    mel, params = ours
    whole = mel(params, *rows(), streaming=True, finalize=True)
    codes, _, prompt, *voice = rows()
    for length, same in ((28, True), (53, True), (40, False)):  # those of whole chunks and three ahead; 37 are no whole chunks
        part = mel(params, codes, np.full(3, length, np.int32), prompt, *voice, streaming=True, finalize=False)
        difference = jnp.abs(part - whole)[0, : 2 * (length - 3)].max()
        assert difference < 1e-5 if same else difference > 1e-2


def test_modes_and_lengths_compile_nothing(ours):
    mel, params = ours
    codes, length, *rest = jax.device_put(rows())
    mel(params, codes, length, *rest, streaming=False, finalize=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "_mel", None)  # is not traced again
        for mode in MODES:
            mel(params, codes, length - 1, *rest, **mode)


def test_a_row_too_short_for_a_frame_is_zeros(ours):
    mel, params = ours
    codes, _, _, *voice = rows()
    out = mel(params, codes, np.array([0, 3, 4], np.int32), np.zeros(3, np.int32), *voice, streaming=False, finalize=False)
    assert not out[:2].any()
    assert np.isfinite(out).all()
    assert out[2, :2].all()


def test_bfloat16_is_close(reference, ours):
    exact = ours[0](ours[1], *rows(), streaming=False, finalize=True)
    mel, params = converted(reference, dtype="bfloat16")
    rounded = mel(params, *rows(), streaming=False, finalize=True)
    assert rounded.dtype == jnp.float32
    assert 1e-4 < jnp.abs(rounded - exact).mean() < 0.03 * jnp.abs(exact).mean()


def test_noise_is_torchs():
    torch.manual_seed(0)
    drawn = torch.randn(1, 80, noise.FRAMES)[0].mT.numpy()
    np.testing.assert_allclose(noise.fixed(noise.FRAMES), drawn, atol=2e-6)
    np.testing.assert_array_equal(noise.fixed(7), noise.fixed(noise.FRAMES + 2)[:7])
    assert not noise.fixed(noise.FRAMES + 2)[-2:].any()


def true_shapes(version):
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in MAKERS[version](**FULL[version]).state_dict().items()}


def test_sizes_come_from_the_shapes(version):
    shapes = true_shapes(version)
    made, rules = config(shapes)
    assert made == {2: flow.Config(), 3: flow.V3}[version]
    assert (len(shapes), sum(map(np.prod, shapes.values()))) == COUNTS[version]
    tensors = {name: of_array(name, np.broadcast_to(np.int8(0), shape)) for name, shape in shapes.items()}
    wanted = {path: leaf.shape for path, leaf in flatten(flow.abstract_params(made)).items()}
    _, dropped = core.plan(tensors, rules, wanted)
    assert dropped == {2: [], 3: ["decoder.estimator.rotary_embed.inv_freq"]}[version]
    assert flow.flow(made) is flow.flow(dataclasses.replace(made))


def test_a_file_of_something_else_is_refused(reference, version):
    for shapes in ({}, {"llm.model.norm.weight": (8,)}, {"input_embedding.weight": (40, 80)}):
        with pytest.raises(ValueError, match="CosyVoice 2 or 3"):
            config(shapes)
    tensors = tensors_of(reference)
    last = {2: "decoder.estimator.final_proj.weight", 3: "decoder.estimator.proj_out.weight"}[version]
    made, rules = config({name: tensor.shape for name, tensor in tensors.items()})
    cut = {name: tensor for name, tensor in tensors.items() if name != last}
    with pytest.raises(ValueError, match="estimator/out/kernel: expected a tensor, got none"):
        planned(cut, rules, flow.abstract_params(made))
    with pytest.raises(ValueError, match="extra: expected one matching rule, got 0"):
        planned(tensors | {"extra": tensors[last]}, rules, flow.abstract_params(made))


def test_what_no_spectrogram_can_be_made_of_is_refused():
    flow.check(7500, 10, 20)
    with pytest.raises(ValueError, match="expected at most 7500 codes"):
        flow.check(7501, 10, 20)
    with pytest.raises(ValueError, match="expected 2 mel frames for each of the prompt's 10 codes, got 21"):
        flow.check(100, 10, 21)


@pytest.mark.slow
def test_mel_of_the_true_size_is_the_references(version):
    model = MAKERS[version](**FULL[version])
    mel, params = converted(model)
    for mode in MODES:
        out = mel(params, *row(rows(), 0), **mode)[0, 2 * PROMPT[0] : 2 * LENGTH[0] - (0 if mode["finalize"] else 6)]
        np.testing.assert_allclose(out, expected(model, rows(), 0, **mode), atol=1e-4)
