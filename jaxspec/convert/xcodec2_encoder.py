"""Rules for the encoder of X-codec2 and NeuCodec, in the original layout and in that of transformers 5."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxspec.codec import w2v_bert
from jaxspec.codec.xcodec2_encoder import Config
from jaxspec.convert.core import Rule, affine, conv, depthwise, norm, pointwise, within

Shapes = Mapping[str, tuple[int, ...]]

# Settings of the conformer that tensor shapes do not show and the encoder assumes.
FIXED = {
    "hidden_act": "swish",
    "layer_norm_eps": 1e-5,
    "position_embeddings_type": "relative_key",
    "left_max_position_embeddings": 64,
    "right_max_position_embeddings": 8,
    "add_adapter": False,
}
_HOP = 320
_PARTS = "snake1", "conv1", "snake2", "conv2"  # of a residual unit


class Layout(NamedTuple):
    """How a checkpoint names the parts of the encoder.

    Attributes:
        semantic: the conformer.
        layers: the most layers of it that are used.
        adapter: its four convolutions.
        first: the acoustic branch's first convolution. snake, last: what follows its blocks.
        unit: (block, unit, place among ``_PARTS``) -> a part of a residual unit.
        block: (block, place) -> the snake and the strided convolution of a block.
        fc, project_in: the linear layers after both branches.
        without: the rule that drops all of it.
    """

    semantic: str
    layers: int
    adapter: tuple[str, ...]
    first: str
    snake: str
    last: str
    unit: Callable[[int, int, int], str]
    block: Callable[[int, int], str]
    fc: str
    project_in: str
    without: Rule

    def is_in(self, shapes: Shapes) -> bool:
        """Whether a checkpoint has an encoder."""
        return f"{self.first}.weight" in shapes


TRANSFORMERS = Layout(
    semantic="semantic_encoder",
    layers=10**3,
    adapter=tuple(f"semantic_adapter.conv{i}" for i in (1, 2, 3, 4)),
    first="acoustic_encoder.conv1",
    snake="acoustic_encoder.snake1",
    last="acoustic_encoder.conv2",
    unit=lambda block, unit, place: f"acoustic_encoder.block.{block}.res_unit{unit + 1}.{_PARTS[place]}",
    block=lambda block, place: f"acoustic_encoder.block.{block}.{_PARTS[place]}",
    fc="fc_encoder",
    project_in="quantizer.project_in",
    without=Rule(r"(acoustic_encoder|semantic_adapter|semantic_encoder|fc_encoder|quantizer\.project_in)\..*", None),
)
ORIGINAL = Layout(
    semantic="semantic_model",
    layers=16,  # of the 24 in the files
    adapter=tuple(
        f"SemanticEncoder_module.{part}" for part in ("initial_conv", "residual_blocks.1", "residual_blocks.3", "final_conv")
    ),
    first="CodecEnc.conv_blocks.0",
    snake="CodecEnc.conv_final_block.0",
    last="CodecEnc.conv_final_block.1",
    unit=lambda block, unit, place: f"CodecEnc.conv_blocks.{block + 1}.block.{unit}.block.{place}",
    block=lambda block, place: f"CodecEnc.conv_blocks.{block + 1}.block.{3 + place}",
    fc="fc_prior",
    project_in="generator.quantizer.project_in",
    without=Rule(r"(CodecEnc|SemanticEncoder_module|semantic_model|fc_prior|generator\.quantizer\.project_in)\..*", None),
)


def config(layout: Layout, shapes: Shapes, settings: Mapping[str, Any] | None, sample_rate_hz: int) -> Config:
    """The configuration of a checkpoint's encoder.

    Args:
        layout: of the checkpoint.
        shapes: of each tensor by name, weight norm folded.
        settings: semantic_model_config in config.json, if any.
        sample_rate_hz: of the decoder's wave, by which X-codec2 and NeuCodec are told apart.

    Raises:
        ValueError: a tensor is missing, or the variant is not supported.
    """
    for key, expected in FIXED.items():
        if (got := (settings or {}).get(key, expected)) != expected:
            raise ValueError(f"expected {key} = {expected} in semantic_model_config, got {got}: give the codec as published")

    def shape(name: str) -> tuple[int, ...]:
        if f"{name}.weight" not in shapes:
            raise ValueError(f"expected the tensor {name}.weight, got none: give all files, or convert without the encoder")
        return shapes[f"{name}.weight"]

    layer = f"{layout.semantic}.encoder.layers"
    width, _ = shape(f"{layout.semantic}.feature_projection.projection")
    mlp_width, _ = shape(f"{layer}.0.ffn1.intermediate_dense")
    _, head_dim = shape(f"{layer}.0.self_attn.distance_embedding")
    *_, taps = shape(f"{layer}.0.conv_module.depthwise_conv")
    layers = sum(f"{layer}.{i}.final_layer_norm.weight" in shapes for i in range(layout.layers))
    strides = []
    while f"{layout.block(len(strides), 1)}.weight" in shapes:
        strides.append(shape(layout.block(len(strides), 1))[2] // 2)
    if math.prod(strides) != _HOP:
        raise ValueError(f"expected strides with the product {_HOP}, got {strides}: give the codec as published")
    semantic = w2v_bert.Config(width, layers, width // head_dim, mlp_width, taps)
    margin = 0 if sample_rate_hz == 24_000 else Config.margin
    return Config(semantic, shape(layout.first)[0], tuple(strides), shape(layout.last)[0], margin)


def rules(layout: Layout, config: Config) -> Iterator[Rule]:
    """The rules that convert the encoder."""
    yield from _conformer(re.escape(layout.semantic), config.semantic.layers)
    for i, name in enumerate(layout.adapter):
        yield from affine(re.escape(name), f"encoder/adapter/conv{i + 1}", conv)
    yield from affine(re.escape(layout.first), "encoder/acoustic/conv1", conv)
    for i in range(len(config.strides)):
        for j in range(3):
            for place, part in enumerate(_PARTS):
                yield from _part(layout.unit(i, j, place), f"encoder/acoustic/block_{i}_unit_{j}/{part}", place % 2 == 0)
        yield from _part(layout.block(i, 0), f"encoder/acoustic/block_{i}_snake", True)
        yield from _part(layout.block(i, 1), f"encoder/acoustic/block_{i}_conv", False)
    yield from _part(layout.snake, "encoder/acoustic/snake1", True)
    yield from _part(layout.last, "encoder/acoustic/conv2", False)
    yield from affine(re.escape(layout.fc), "encoder/fc")
    yield from affine(re.escape(layout.project_in), "encoder/project_in")


def _part(source: str, target: str, snake: bool) -> tuple[Rule, ...]:
    source = re.escape(source)
    if not snake:
        return affine(source, target, conv)
    filters = Rule(rf"{source}\.(upsample|downsample(\.lowpass)?)\.filter", None)  # that every checkpoint has
    return filters, Rule(rf"{source}\.act\.alpha", f"{target}/alpha"), Rule(rf"{source}\.act\.(beta|bias)", f"{target}/beta")


def _conformer(source: str, layers: int) -> Iterator[Rule]:
    target, kept = "encoder/semantic", "|".join(map(str, range(layers)))
    yield from norm(rf"{source}\.feature_projection\.layer_norm", f"{target}/norm")
    yield from affine(rf"{source}\.feature_projection\.projection", f"{target}/project")
    yield Rule(rf"{source}\.masked_spec_embed", None)
    yield Rule(rf"{source}\.encoder\.layers\.(?!(?:{kept})\.)\d+\..*", None)
    yield from within(f"{target}/layers", _layer(rf"{source}\.encoder\.layers\.({kept})"), "[{0}]")


def _layer(source: str) -> Iterator[Rule]:
    for part in ("ffn1", "ffn2"):
        yield from norm(rf"{source}\.{part}_layer_norm", f"{part}_norm")
        yield from affine(rf"{source}\.{part}\.intermediate_dense", f"{part}/up")
        yield from affine(rf"{source}\.{part}\.output_dense", f"{part}/down")
    yield from norm(rf"{source}\.self_attn_layer_norm", "attention_norm")
    for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
        yield from affine(rf"{source}\.self_attn\.linear_{theirs}", f"attention/{ours}")
    yield Rule(rf"{source}\.self_attn\.distance_embedding\.weight", "attention/distance")
    yield from norm(rf"{source}\.conv_module\.layer_norm", "convolution_norm")
    yield Rule(rf"{source}\.conv_module\.pointwise_conv1\.weight", "convolution/up/kernel", pointwise)
    yield Rule(rf"{source}\.conv_module\.depthwise_conv\.weight", "convolution/taps", depthwise)
    yield from norm(rf"{source}\.conv_module\.depthwise_layer_norm", "convolution/norm")
    yield Rule(rf"{source}\.conv_module\.pointwise_conv2\.weight", "convolution/down/kernel", pointwise)
    yield from norm(rf"{source}\.final_layer_norm", "norm")
