"""Rules for hift.pt, the vocoder of CosyVoice 2 and of CosyVoice 3, in which its tensors have the same names."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np

from jaxspec.acoustic.hift import V2, V3, Config
from jaxspec.convert.core import Rule, affine, conv

_HEAD = r"(?:generator\.)?"  # in checkpoints of the training
_WHERE = "give hift.pt of CosyVoice2-0.5B or Fun-CosyVoice3-0.5B"


def _linear(weight: np.ndarray) -> np.ndarray:
    """[out in] -> [1 in out]."""
    return weight.T[None]


def _up(weight: np.ndarray, rate: int, sides: tuple[int, int], causal: bool) -> np.ndarray:
    """An upsampling as a convolution to ``rate`` times the channels, those of each step that a step becomes.

    Args:
        weight: of a transposed convolution [in out taps], or, if ``causal``, of a convolution of repeated steps [out in taps].
        rate: the steps that a step becomes.
        sides: steps before and after the present one that the result sees.
        causal: see ``weight``.

    Returns:
        [taps in rate*out].
    """
    weight = weight.swapaxes(0, 1) if causal else weight
    channels_in, channels, taps = weight.shape
    kernel = np.zeros((sum(sides) + 1, channels_in, rate, channels), weight.dtype)
    for r in range(rate):
        for tap in range(taps):
            # Result r of a step is that many results after the first that the tap adds the step to.
            later = r - (taps - 1) + tap if causal else r + (taps - rate) // 2 - tap
            if causal or later % rate == 0:
                kernel[sides[0] + later // rate, :, r] += weight[:, :, tap]
    return kernel.reshape(len(kernel), channels_in, -1)


def _layer(source: str, target: str, change: Callable[[np.ndarray], np.ndarray] = conv) -> tuple[Rule, Rule]:
    return affine(_HEAD + source, target, change)


def _rules(c: Config) -> tuple[Rule, ...]:
    ups = (
        (
            Rule(
                rf"{_HEAD}ups\.{i}\.weight",
                f"decoder/ups_{i}/kernel",
                functools.partial(_up, rate=rate, sides=c.up_sides(i), causal=c.causal),
            ),
            Rule(rf"{_HEAD}ups\.{i}\.bias", f"decoder/ups_{i}/bias", functools.partial(np.tile, reps=rate)),
        )
        for i, rate in enumerate(c.rates)
    )
    pitch = (_layer(rf"f0_predictor\.condnet\.{2 * i}", f"f0/convs_{i}") for i in range(5))
    block = r"((?:source_)?resblocks)\.(\d+)\."
    return (
        *(rule for rules in (*ups, *pitch) for rule in rules),
        *_layer(r"f0_predictor\.classifier", "f0/out", _linear),
        *_layer(r"m_source\.l_linear", "source/out", _linear),
        *_layer(r"(conv_pre|conv_post)", "decoder/{0}"),
        *_layer(r"source_downs\.(\d+)", "decoder/source_downs_{0}"),
        *_layer(block + r"(convs[12])\.(\d+)", "decoder/{0}_{1}/{2}_{3}"),
        Rule(_HEAD + block + r"(activations[12])\.(\d+)\.alpha", "decoder/{0}_{1}/{2}_{3}/alpha"),
    )


def config(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Config, tuple[Rule, ...]]:
    """The configuration of a checkpoint.

    Args:
        shapes: of each tensor by name, weight norm folded.

    Returns:
        The configuration, and the rules that convert the checkpoint.

    Raises:
        ValueError: a tensor is missing or has other axes, or the version is not supported.
    """
    shapes = {name.removeprefix("generator."): shape for name, shape in shapes.items()}

    def shape(name: str, axes: int = 3) -> tuple[int, ...]:
        if name not in shapes:
            raise ValueError(f"expected a HiFT vocoder, got a checkpoint without {name}: {_WHERE}")
        if len(shapes[name]) != axes:
            raise ValueError(f"expected {axes} axes of {name}, got shape {shapes[name]}: {_WHERE}")
        return shapes[name]

    width, mel_bins, taps = shape("conv_pre.weight")
    versions = {1 + sum(version.first_sides): version for version in (V2, V3)}
    count = sum(name.startswith("ups.") and name.endswith(".weight") for name in shapes)
    if taps not in versions or count != len(Config.rates):
        raise ValueError(
            f"expected a HiFT vocoder with {' or '.join(map(str, versions))} taps of conv_pre and {len(Config.rates)} "
            f"upsamplings, got {taps} and {count}: {_WHERE}"
        )
    up_taps = tuple(shape(f"ups.{i}.weight")[2] for i in range(count))
    blocks = len(Config.taps)
    n_fft = shape("conv_post.weight")[0] - 2
    made = dataclasses.replace(
        versions[taps],
        mel_bins=mel_bins,
        width=width,
        rates=tuple(taps // 2 for taps in up_taps),
        up_taps=up_taps,
        taps=tuple(shape(f"resblocks.{j}.convs1.0.weight")[2] for j in range(blocks)),
        source_taps=tuple(shape(f"source_resblocks.{i}.convs1.0.weight")[2] for i in range(count)),
        n_fft=n_fft,
        hop=n_fft // 4,
        harmonics=shape("m_source.l_linear.weight", 2)[1],
        f0_width=shape("f0_predictor.condnet.0.weight")[0],
    )
    return made, _rules(made)
