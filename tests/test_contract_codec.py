"""Every codec, and fakes of those to come, by the contract of ``jaxspec.types.Codec``."""

import dataclasses
import functools
import inspect
from typing import Any, NamedTuple

import codec_fakes
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.codec import builtin, padding, snac, w2v_bert, xcodec2, xcodec2_encoder
from jaxspec.types import Codec

BUILTIN = builtin.Config(voices=3, encoder_width=8, width=16)
SHALLOW = dataclasses.replace(BUILTIN, coarse_blocks=1, fine_blocks=1, hop=64, stride=2, n_fft=128, mel_bins=10)
XCODEC2 = xcodec2.Config(width=64, layers=2, heads=4, head_dim=16, mlp_width=96, quantizer_width=48, hop=16)
NEUCODEC = xcodec2.Config(
    width=64, layers=2, heads=4, head_dim=16, mlp_width=96, quantizer_width=48, hop=24, sample_rate_hz=24_000
)
SNAC = snac.Config(16, decoder_dim=32, decoder_rates=(4, 3, 2), codebook_size=16, codebook_dim=5, encoder_rates=(2, 3, 4))
TWO_BOOKS = snac.Config(latent_width=12, decoder_dim=16, decoder_rates=(8, 5), codebook_size=16, codebook_dim=5, strides=(2, 1))

ENCODER = xcodec2_encoder.Config(w2v_bert.Config(32, 1, 2, 32, 3), 4, (16, 20), 32)
ENCODERS = {
    "xcodec2 with an encoder": xcodec2.Config(32, 1, 2, 16, 32, 16, encoder=ENCODER),
    "neucodec with an encoder": xcodec2.Config(32, 1, 2, 16, 32, 16, 480, 24_000, dataclasses.replace(ENCODER, margin=0)),
}

FRAMES = 31
LENGTHS = np.array([FRAMES, 1, 0, 8], np.int32)
ROWS = len(LENGTHS)
KEYS = jax.random.split(jax.random.key(7), ROWS)


class Case(NamedTuple):
    """A codec with random parameters, and what its decoder takes beside codes."""

    codec: Codec
    params: Any
    books: int
    condition: Any = None


def of_builtin(config):
    def params():
        wave, voice = jnp.zeros((1, 8 * config.samples_per_code)), jnp.zeros(1, jnp.int32)
        return jax.jit(builtin.VoiceCodec(config).init)(jax.random.key(0), wave, voice)["params"]

    return Case(builtin.codec(config), params, 1, np.arange(len(LENGTHS), dtype=np.int32) % config.voices)


def of_decoder(module, config, books, *arguments, scale=1.0):
    def params():
        codes, length = jnp.zeros((1, 1, books)[: 3 - (module is xcodec2)], jnp.int32), jnp.ones(1, jnp.int32)
        variables = jax.jit(module.Decoder(config).init)(jax.random.key(0), codes, length, *arguments)
        made = variables["params"]
        if module is snac and config.encoder_rates:
            made |= jax.jit(module.Encoder(config).init)(jax.random.key(1), jnp.zeros((1, 1)), length)["params"]
        # Scaled down: SNAC at its initial values is loud, where the tanh saturates and rounding grows.
        return jax.tree.map(lambda x: scale * x, nn.meta.unbox(made))

    return Case(module.codec(config), params, books)


def with_encoder(config):
    case = of_decoder(xcodec2, config, 1)

    def params():
        wave, length = jnp.zeros((1, config.encoder.hop)), jnp.full(1, config.encoder.hop)
        encoder = jax.jit(xcodec2_encoder.Encoder(config.encoder).init)(jax.random.key(1), wave, length)
        return case.params() | {"encoder": nn.meta.unbox(encoder["params"])}

    return case._replace(params=params)


def of_fake(codec, seed, taps=1, books=1, condition=None):
    return Case(codec, functools.partial(codec_fakes.params, seed, taps, books), books, condition)


FLOW = codec_fakes.flow_and_vocoder(), 3, 3, 1, codec_fakes.flow_condition(len(LENGTHS))
CASES = {
    "builtin": of_builtin(BUILTIN),
    "xcodec2": of_decoder(xcodec2, XCODEC2, 1),
    "neucodec": of_decoder(xcodec2, NEUCODEC, 1),
    "snac": of_decoder(snac, SNAC, 7, None, scale=0.6),
    "causal": of_fake(codec_fakes.convolutional(4, 0), 0, taps=5, books=2),
    "look-ahead": of_fake(codec_fakes.convolutional(1, 3), 1, taps=5, books=2),
    "recurrent": of_fake(codec_fakes.recurrent(), 2),
    "flow and vocoder": of_fake(*FLOW),
}
ENCODING = {name: case for name, case in CASES.items() if case.codec.encode}
ENCODING |= {name: with_encoder(config) for name, config in ENCODERS.items()}
OF_OTHER_SHAPES = {"builtin, shallow": of_builtin(SHALLOW), "snac of two books": of_decoder(snac, TWO_BOOKS, 3, None, scale=0.6)}


@functools.cache
def case(name):
    """A case, its parameters made."""
    lazy = (CASES | ENCODING | OF_OTHER_SHAPES)[name]
    return lazy._replace(params=lazy.params())


every = pytest.mark.parametrize("name", CASES)


def draw(books, seed=0, rows=ROWS, count=FRAMES):
    return np.random.default_rng(seed).integers(0, 16, (rows, count, books), np.int32)


def rows_of(tree, rows):
    return jax.tree.map(lambda x: x[rows], tree)


def span(codec):
    return round(codec.sample_rate_hz / codec.frame_rate_hz)


def encoded_span(codec):
    return round((codec.encode_rate_hz or codec.sample_rate_hz) / codec.frame_rate_hz)


@pytest.mark.parametrize("name", CASES | ENCODING)
def test_it_has_the_names_of_the_contract(name):
    codec = (CASES | ENCODING)[name].codec
    assert list(inspect.signature(codec.decode).parameters) == ["params", "codes", "length", "condition", "key"]
    if codec.encode:
        assert list(inspect.signature(codec.encode).parameters) == ["params", "wave", "length"]
    assert span(codec) == pytest.approx(codec.sample_rate_hz / codec.frame_rate_hz)
    hash(codec)


@every
def test_a_row_is_independent_of_padding_and_batch(name):
    codec, params, books, condition = case(name)
    codes = draw(books)
    waves = np.asarray(codec.decode(params, codes, LENGTHS, condition, KEYS))
    assert waves.dtype == np.float32
    assert waves.shape == (ROWS, FRAMES * span(codec))
    for row, length in enumerate(LENGTHS):
        valid = waves[row, : length * span(codec)]
        assert not waves[row, length * span(codec) :].any()
        if length:
            one = slice(row, row + 1)
            alone = codec.decode(params, codes[one, :length], LENGTHS[one], *rows_of((condition, KEYS), one))
            np.testing.assert_allclose(valid, alone[0], atol=1e-5)
            assert valid.std() > 1e-3


@every
def test_garbage_beyond_a_rows_length_changes_nothing(name):
    codec, params, books, condition = case(name)
    codes, beyond = draw(books), np.arange(FRAMES)[None, :, None] >= LENGTHS[:, None, None]
    clean, *dirty = (
        codec.decode(params, np.where(beyond, garbage, codes).astype(np.int32), LENGTHS, condition, KEYS)
        for garbage in (0, -5, 15, 2**30)
    )
    for wave in dirty:
        np.testing.assert_array_equal(wave, clean)


@pytest.mark.parametrize("name", CASES | OF_OTHER_SHAPES)
def test_context_frames_are_those_that_a_frame_depends_on(name):
    """Of other codes at one frame, the samples of the frames from ``right`` before it to ``left`` after it change, no others."""
    codec, params, books, condition = case(name)
    left, right = codec.context_frames
    middle, rows = FRAMES // 2, len(LENGTHS)
    assert middle > max(left or 0, right or 0)
    codes = np.repeat(draw(books, rows=1), rows, 0)
    other = codes.copy()
    other[:, middle] = draw(books, 1, count=1)[:, 0]
    full = np.full(rows, FRAMES, np.int32)
    first, second = (codec.decode(params, some, full, condition, None) for some in (codes, other))
    changed = np.flatnonzero((first != second).reshape(rows, FRAMES, -1).any((0, 2)))
    assert changed[0] == (0 if right is None else middle - right)
    assert changed[-1] == (FRAMES - 1 if left is None else middle + left)


@pytest.mark.parametrize("name", [name for name in CASES if None not in CASES[name].codec.context_frames])
def test_windows_with_their_context_give_the_whole_wave(name):
    """What a stream relies on: the windows are rows of one batch, and those at the ends of the wave are shorter."""
    codec, params, books, condition = case(name)
    (left, right), size = codec.context_frames, 5
    codes, one = draw(books, rows=1), rows_of(condition, slice(0, 1))
    whole = np.asarray(codec.decode(params, codes, np.array([FRAMES], np.int32), one, None))[0]
    begins = range(0, FRAMES, size)
    windows = [codes[0, max(begin - left, 0) : begin + size + right] for begin in begins]
    repeated = jax.tree.map(lambda x: np.repeat(x, len(windows), 0), one)
    waves = padding.decode_rows(codec, params, windows, repeated)
    parts = [wave[min(begin, left) * span(codec) :][: size * span(codec)] for begin, wave in zip(begins, waves, strict=True)]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].codec.context_frames[1] is not None])
def test_frames_with_their_right_context_are_final(name):
    """What a stream of a codec that is causal, or looks ahead a little, relies on."""
    codec, params, books, condition = case(name)
    codes, length = draw(books, rows=1).repeat(2, 0), np.array([FRAMES, 20], np.int32)
    whole, begun = np.asarray(codec.decode(params, codes, length, rows_of(condition, [0, 0]), None))
    final = (length[1] - codec.context_frames[1]) * span(codec)
    np.testing.assert_allclose(begun[:final], whole[:final], atol=1e-5)


@pytest.mark.parametrize("name", ENCODING)
def test_codes_are_independent_of_padding_and_batch(name):
    codec, params, *_ = case(name)
    count, per = 7, encoded_span(codec)
    length = np.array([count * per, 3 * per, 0, 2 * per + 1, per - 1], np.int32)
    wave = np.random.default_rng(2).normal(size=(len(length), count * per)).astype(np.float32)
    codes = np.asarray(codec.encode(params, wave, length))
    assert codes.dtype == np.int32
    beyond = np.arange(count * per) >= length[:, None]
    for garbage in (np.nan, 1e9):
        again = codec.encode(params, np.where(beyond, np.float32(garbage), wave), length)
        np.testing.assert_array_equal(again, codes)
    for row, samples in enumerate(length):
        frames = codec.encoded_frames(samples) if codec.encoded_frames else -(-samples // per)
        assert not codes[row, frames:].any()
        if frames and samples:
            alone = np.pad(wave[row, :samples], (0, -samples % per))[None]
            own = codec.encode(params, alone, np.array([samples], np.int32))[0, :frames]
            np.testing.assert_array_equal(codes[row, :frames], own)


@pytest.mark.parametrize("name", ENCODING)
def test_waves_of_a_batch_encode_in_one_call_of_few_shapes(name):
    codec, params, *_ = case(name)
    shapes, per = [], encoded_span(codec)
    counting = codec._replace(encode=lambda *arguments: shapes.append(arguments[1].shape) or codec.encode(*arguments))
    waves = [np.random.default_rng(row).normal(size=per * 2 + row).astype(np.float32) for row in range(3)]
    rows = padding.encode_rows(counting, params, waves)
    assert shapes == [(4, 40 * per)]
    length = np.array([*map(len, waves)], np.int32)
    whole = codec.encode(params, np.stack([np.pad(wave, (0, 3 * per - len(wave))) for wave in waves]), length)
    for row, codes in enumerate(rows):
        frames = codec.encoded_frames(len(waves[row])) if codec.encoded_frames else -(-len(waves[row]) // per)
        assert len(codes) == frames
        np.testing.assert_array_equal(codes, whole[row, :frames])


@every
def test_rows_of_a_batch_decode_in_one_call_of_few_shapes(name):
    codec, params, books, condition = case(name)
    shapes, prefix = [], draw(books, 3, 1, 3)[0]
    counting = codec._replace(decode=lambda *arguments: shapes.append(arguments[1].shape) or codec.decode(*arguments))
    rows = [draw(books, row, 1, count)[0] for row, count in enumerate((9, 0, 20))]
    waves = padding.decode_rows(counting, params, rows, rows_of(condition, slice(0, 3)), prefix=prefix)
    assert shapes == [(4, 40, books)]
    for row, (wave, codes) in enumerate(zip(waves, rows, strict=True)):
        (both,) = padding.decode_rows(
            counting, params, [np.concatenate([prefix, codes])], rows_of(condition, slice(row, row + 1))
        )
        assert len(wave) == len(codes) * span(codec)
        np.testing.assert_allclose(wave, both[3 * span(codec) :], atol=1e-5)
    assert shapes[1:] == 3 * [(1, 40, books)]


@pytest.mark.parametrize("name", CASES | ENCODING)
def test_strict_modes_of_jax(name):
    """With 64 bits, strict dtypes, no promotion of ranks, and arguments that are on the device already."""
    codec, params, books, condition = case(name)
    arguments = (draw(books), LENGTHS, condition, KEYS)
    expected = codec.decode(params, *arguments)
    wave = np.ones((2, 2 * span(codec)), np.float32)
    device = jax.device_put((params, arguments, wave, LENGTHS[:2]))
    strict = jax.enable_x64(True), jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict")
    with strict[0], strict[1], strict[2], jax.transfer_guard("disallow"):
        made = codec.decode(device[0], *device[1])
        codes = codec.encode(device[0], *device[2:]) if codec.encode else None
    assert made.dtype == jnp.float32
    assert codes is None or codes.dtype == jnp.int32
    np.testing.assert_allclose(made, expected, atol=1e-5)
