"""The flow of CosyVoice 2 and 3: codes and a voice's prompt to a mel spectrogram, by an ODE (arXiv 2412.10117, 2505.17589).

    codes -> encoder -> mean;  noise -> [x += dt (1.7 v(x, t | mean, speaker, prompt) - 0.7 v(x, t))] * 10 -> mel

A code is two frames. Nothing but the look-ahead of three codes depends on what comes later than a step's limit (see ``layers``),
so that padding does not change a row, and in a stream a whole chunk is not changed by the codes after its look-ahead.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.acoustic import conformer, dit, layers, noise, unet
from jaxspec.codec import padding
from jaxspec.codec.layers import linear
from jaxspec.types import Array, Params

FRAMES_PER_CODE = 2
LOOK_AHEAD = 3  # codes
CHUNK = 25  # codes of a stream that see each other
SPEAKER_WIDTH = 192
_STEPS = 10
_GUIDANCE = 0.7


@dataclasses.dataclass(frozen=True)
class Config:
    """The shape of a flow; the defaults are CosyVoice 2's, and ``V3`` is CosyVoice 3's.

    version: 2, a conformer and a U-Net, or 3, two convolutions and a diffusion transformer.
    codebook_size: the number of codes.
    encoder_width: of the conformer; in version 3 between the two convolutions.
    encoder_layers: of the conformer, before and after the frames are doubled; unused in version 3.
    width, heads: of the estimator of the velocity.
    layers: of the transformer; in version 2 the middle stages of the U-Net.
    blocks: of each stage; unused in version 3.
    dtype: of the networks, "float32" or "bfloat16"; the ODE, the norms' statistics and the softmax are in float32.
    """

    version: int = 2
    codebook_size: int = 6561
    encoder_width: int = 512
    encoder_layers: tuple[int, int] = (6, 4)
    width: int = 256
    heads: int = 8
    layers: int = 12
    blocks: int = 4
    dtype: str = "float32"


V3 = Config(version=3, encoder_width=1024, encoder_layers=(0, 0), width=1024, heads=16, layers=22, blocks=0)


class Mel(Protocol):
    """See ``Flow.mel``."""

    def __call__(
        self,
        params: Params,
        codes: Array,
        length: Array,
        prompt_length: Array,
        prompt_mel: Array,
        speaker: Array,
        /,
        *,
        streaming: bool | Array,
        finalize: bool | Array,
    ) -> Array:
        """Makes mel spectrograms."""
        ...


class Flow(NamedTuple):
    """A flow as a pure function, compiled once for each shape of ``codes`` and ``prompt_mel``.

    Attributes:
        mel: see ``flow``.
    """

    mel: Mel


class Conditions(nn.Module):
    """What the velocity depends on, but for state and time."""

    config: Config

    @nn.compact
    def __call__(self, codes: Array, length: Array, kept: Array, chunk: Array, speaker: Array) -> tuple[Array, Array]:
        """codes [B N], length, kept int32 [B], chunk int32 [], speaker [B 192] -> mean [B 2N 80], speaker [B 80]."""
        c = self.config
        normal = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("codes", None))
        width = c.encoder_width if c.version == 2 else noise.BINS
        vectors: Any = self.param("vectors", normal, (c.codebook_size, width))
        x = vectors[jnp.maximum(codes, 0)]
        if c.version == 2:
            mean = conformer.Encoder(c.encoder_layers, name="encoder")(x, length, kept, chunk)
        else:
            x = jnp.where(padding.valid(length, x.shape[1])[:, :, None], x, 0)
            mean = jnp.repeat(layers.LookAhead(c.encoder_width, name="look_ahead")(x), FRAMES_PER_CODE, axis=1)
        return mean, linear(noise.BINS, None, None, name="speaker")(speaker)


def _networks(c: Config) -> tuple[nn.Module, nn.Module, nn.Module, int]:
    """Conditions, time and estimator, and the width of the sinusoid of a time."""
    if c.version == 2:
        estimator = unet.Estimator(c.width, c.heads, c.layers, c.blocks)
        return Conditions(c), unet.Time(c.width, c.layers), estimator, unet.TIME_WIDTH
    return Conditions(c), dit.Time(c.width, c.layers), dit.Estimator(c.width, c.heads, c.layers), dit.TIME_WIDTH


def _times() -> np.ndarray:
    """1 - cos(pi i / 20) for i = 0 .. 10, in float32 as the models were trained."""
    share = np.arange(_STEPS + 1, dtype=np.float32) / np.float32(_STEPS)
    return 1 - np.cos(share * np.float32(0.5) * np.float32(np.pi))


def _mel(
    config: Config,
    params: Params,
    start: Array,
    codes: Array,
    length: Array,
    prompt_length: Array,
    prompt_mel: Array,
    speaker: Array,
    streaming: Array,
    finalize: Array,
) -> Array:
    """``flow`` with the noise [2N 80] given."""
    conditions, time, estimator, time_width = _networks(config)
    (batch, count), frames = codes.shape, FRAMES_PER_CODE * codes.shape[1]
    kept = jnp.maximum(length - jnp.where(finalize, 0, LOOK_AHEAD), 0)
    chunk = jnp.where(streaming, CHUNK, count)
    params = jax.tree.map(lambda x: x.astype(config.dtype), params)
    speaker = speaker / jnp.maximum(jnp.linalg.norm(speaker, axis=-1, keepdims=True), 1e-12)

    given: Any = conditions.apply({"params": params["conditions"]}, codes, length, kept, chunk, speaker.astype(config.dtype))
    prompt = jnp.pad(prompt_mel[:, :frames], ((0, 0), (0, max(frames - prompt_mel.shape[1], 0)), (0, 0)))
    prompt = jnp.where(padding.valid(FRAMES_PER_CODE * prompt_length, frames)[:, :, None], prompt, 0).astype(config.dtype)
    with_and_without = [jnp.concatenate([x, jnp.zeros_like(x)]) for x in (*given, prompt)]
    limit = jnp.tile(layers.limits(FRAMES_PER_CODE * kept, frames, FRAMES_PER_CODE * chunk), (2, 1))

    times = _times()
    at = time.apply({"params": params["time"]}, jnp.asarray(layers.sinusoid(times[:-1], time_width), config.dtype))

    def euler(x: Array, step: tuple[Any, Array]) -> tuple[Array, None]:
        time, span = step
        state = jnp.tile(x.astype(config.dtype), (2, 1, 1))
        velocity: Any = estimator.apply({"params": params["estimator"]}, state, *with_and_without, time, limit)
        conditioned, free = jnp.split(velocity.astype(jnp.float32), 2)
        return x + span * ((1 + _GUIDANCE) * conditioned - _GUIDANCE * free), None

    x, _ = jax.lax.scan(euler, jnp.broadcast_to(start[None], (batch, *start.shape)), (at, jnp.asarray(np.diff(times))))
    return jnp.where(padding.valid(FRAMES_PER_CODE * kept, frames)[:, :, None], x, 0)


@functools.lru_cache
def flow(config: Config) -> Flow:
    """The flow, compiled; equal configs give the same object.

    ``mel`` takes:
        params: see ``abstract_params``.
        codes: int32 [B N], those of the prompt and then the new ones; negative ones count as 0.
        length: int32 [B], how many are valid, those of the prompt included.
        prompt_length: int32 [B], how many are the prompt's; 0 for none.
        prompt_mel: natural logarithms of mel magnitudes, float32 [B M 80], valid for two frames for each code of the prompt.
        speaker: the speaker's vector, of any norm, float32 [B 192].
        streaming: whether a step sees the chunks up to its own alone, and not the whole row.
        finalize: whether the codes end; else the last three are looked ahead to and make no frames.

    It returns float32 [B 2N 80] like ``prompt_mel`` at 50 Hz, the prompt's frames included and 0 from the row's end on: 2 length,
    without ``finalize`` 2 (length - 3). The noise is that of a frame's place in its row, whatever the batch. Another value of
    ``streaming`` or ``finalize`` compiles nothing, another shape does: pad N and M to few sizes. ``check`` says what is accepted.
    """

    def run(*arguments: Any) -> Array:
        # TF32 and the like would give errors that ten steps amplify.
        with jax.default_matmul_precision("highest"):
            return _mel(config, *arguments)

    compiled = jax.jit(run)

    def mel(params: Params, codes: Array, *rows: Array, streaming: bool | Array, finalize: bool | Array) -> Array:
        start = noise.fixed(FRAMES_PER_CODE * codes.shape[1])
        return compiled(params, start, codes, *rows, streaming, finalize)

    return Flow(mel)


def check(length: int, prompt_length: int, prompt_frames: int) -> None:
    """Refuses a row that no spectrogram can be made of.

    Args:
        length: codes, those of the prompt included.
        prompt_length: codes of the prompt.
        prompt_frames: frames of the prompt's mel spectrogram.

    Raises:
        ValueError: more than 7500 codes (300 s), or a prompt whose codes and frames disagree.
    """
    most = noise.FRAMES // FRAMES_PER_CODE
    if length > most:
        raise ValueError(f"expected at most {most} codes (300 s) with the prompt, got {length}: cut the text or the prompt")
    if prompt_frames != FRAMES_PER_CODE * prompt_length:
        raise ValueError(
            f"expected 2 mel frames for each of the prompt's {prompt_length} codes, got {prompt_frames}: cut both to the shorter"
        )


def abstract_params(config: Config) -> Params:
    """The shape and type of every parameter, as a tree of ShapeDtypeStruct."""
    conditions, time, estimator, time_width = _networks(config)
    one, key = jnp.ones(1, jnp.int32), jax.random.key(0)

    def init() -> Params:
        made = conditions.init(key, one[None], one, one, one[0], jnp.ones((1, SPEAKER_WIDTH)))
        at, times = time.init_with_output(key, jnp.ones((1, time_width)))
        frame, now = jnp.ones((1, 1, noise.BINS)), jax.tree.map(lambda x: x[0], at)
        velocity = estimator.init(key, frame, frame, frame[:, 0], frame, now, one[None])
        return {"conditions": made["params"], "time": times["params"], "estimator": velocity["params"]}

    return nn.meta.unbox(jax.eval_shape(init))
