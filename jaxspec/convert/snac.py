"""Rules for SNAC in the names of the package ``snac``."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxspec.codec.snac import Config
from jaxspec.convert.core import Rule, affine, conv, depthwise, is_count, pointwise

Shapes = Mapping[str, tuple[int, ...]]


def _up(weight: np.ndarray) -> np.ndarray:
    """[in out taps] -> [in taps out]."""
    return weight.swapaxes(1, 2)


def _head(weight: np.ndarray) -> np.ndarray:
    """[1 in taps] -> [in taps]."""
    return weight[0]


_QUANTIZER, _MODEL = r"quantizer\.quantizers\.(\d+)\.", r"decoder\.model\."
_BLOCK = _MODEL + r"(\d+)\.block\."
_UNIT = _BLOCK + r"([345])\.block\."
_LAST = _MODEL + r"(?![01]\.)\d+\."
_DOWN = r"encoder\.block\.(\d+)\.block\."
_DOWN_UNIT = _DOWN + r"([012])\.block\."
_DEPTHWISE = r"encoder\.block\.(?!0\.)\d+\."


def _residual(source: str, target: str) -> tuple[Rule, ...]:
    """The rules of a residual unit, in the encoder or in the decoder."""
    return (
        Rule(source + r"0\.alpha", f"{target}/snake_in/alpha", np.ravel),
        *affine(source + "1", f"{target}/depthwise", depthwise),
        Rule(source + r"2\.alpha", f"{target}/snake_out/alpha", np.ravel),
        *affine(source + "3", f"{target}/pointwise", pointwise),
    )


_ENCODER = (
    *affine(r"encoder\.block\.0", "encoder/first", depthwise),
    *_residual(_DOWN_UNIT, "encoder/block_{0}/residual_{1}"),
    Rule(_DOWN + r"3\.alpha", "encoder/block_{0}/snake/alpha", np.ravel),
    *affine(_DOWN + r"4", "encoder/block_{0}/down", conv),
    Rule(_DEPTHWISE + r"weight", "encoder/depthwise/kernel", depthwise),
    Rule(_DEPTHWISE + r"bias", "encoder/depthwise/bias"),
    *affine(_QUANTIZER + r"in_proj", "codebook_{0}/into", pointwise),
)
_WITHOUT_ENCODER = (Rule(r"encoder\..*", None), Rule(_QUANTIZER + r"in_proj\..*", None))

_DECODER = (
    Rule(_QUANTIZER + r"codebook\.weight", "codebook_{0}/vectors"),
    *affine(_QUANTIZER + r"out_proj", "codebook_{0}/out", pointwise),
    *affine(_MODEL + r"0", "depthwise", depthwise),
    *affine(_MODEL + r"1", "pointwise", pointwise),
    Rule(_BLOCK + r"0\.alpha", "block_{0}/snake/alpha", np.ravel),
    *affine(_BLOCK + r"1", "block_{0}/up", _up),
    Rule(_BLOCK + r"2\.linear\.weight", "block_{0}/noise/kernel", pointwise),
    *_residual(_UNIT, "block_{0}/residual_{1}"),
    Rule(_LAST + r"alpha", "snake/alpha", np.ravel),
    Rule(_LAST + r"weight", "head/kernel", _head),
    Rule(_LAST + r"bias", "head/bias"),
)


def config(shapes: Shapes, settings: Mapping[str, Any] | None, encoder: bool = True) -> tuple[Config, tuple[Rule, ...]]:
    """The configuration of a checkpoint.

    Args:
        shapes: of each tensor by name, weight norm folded.
        settings: config.json, for strides and sample rate; without it, those of the 24 kHz checkpoint.
        encoder: whether to convert the encoder, where the checkpoint has one.

    Returns:
        The configuration, and the rules that convert the checkpoint.

    Raises:
        ValueError: a tensor is missing, or the variant is not supported.
    """
    _refuse_unsupported(shapes)
    settings = settings or {}
    latent, _, _ = _shape(shapes, "decoder.model.0.weight")
    width, _, _ = _shape(shapes, "decoder.model.1.weight")
    ups = itertools.takewhile(shapes.__contains__, (f"decoder.model.{i}.block.1.weight" for i in itertools.count(2)))
    size, dim = _shape(shapes, "quantizer.quantizers.0.codebook.weight")
    strides, rate = settings.get("vq_strides", Config.strides), settings.get("sampling_rate", Config.sample_rate_hz)
    strides = tuple(strides) if isinstance(strides, list) else strides
    books = sum(name.endswith(".codebook.weight") for name in shapes)
    downs = itertools.takewhile(shapes.__contains__, (f"encoder.block.{i}.block.4.weight" for i in itertools.count(1)))
    up_rates, down_rates = (tuple(shapes[name][2] // 2 for name in names) for names in (ups, downs))
    first = latent >> len(down_rates), 1, 7
    if down_rates and (math.prod(down_rates), shapes.get("encoder.block.0.weight")) != (math.prod(up_rates), first):
        raise ValueError(f"expected an encoder with the rate and width of the decoder, got rates {down_rates}: use snac_24khz")
    if not is_count(rate):
        raise ValueError(f"expected a whole number as sampling_rate, got {rate!r}: correct config.json")
    if not isinstance(strides, tuple) or len(strides) != books or not all(is_count(i) and not strides[0] % i for i in strides):
        raise ValueError(f"expected {books} vq_strides that divide the first of them, got {strides}: correct config.json")
    made = Config(latent, width, up_rates, size, dim, strides, rate)
    if not encoder or not down_rates:
        return made, (*_DECODER, *_WITHOUT_ENCODER)
    return dataclasses.replace(made, encoder_rates=down_rates), (*_DECODER, *_ENCODER)


def _refuse_unsupported(shapes: Shapes) -> None:
    if any(".to_qkv." in name for name in shapes):
        raise ValueError("expected a SNAC without attention, got one with it (32 or 44 kHz): use snac_24khz")
    if _shape(shapes, "decoder.model.0.weight")[1] != 1:
        raise ValueError("expected a SNAC with depthwise convolutions, got full ones: use snac_24khz")
    if "decoder.model.2.block.2.linear.weight" not in shapes:
        raise ValueError("expected a SNAC with noise blocks, got one without them: use snac_24khz")


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"expected the decoder of a SNAC, got a checkpoint without {name}: give snac_24khz's pytorch_model.bin")
    return shapes[name]
