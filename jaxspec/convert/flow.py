"""Rules for ``flow.pt``, the flows of CosyVoice 2 and 3."""

import itertools
from collections.abc import Iterator, Mapping

from jaxspec.acoustic.flow import Config
from jaxspec.acoustic.layers import HEAD_DIM
from jaxspec.convert.core import Rule, affine, conv, norm, pointwise, transpose, within

Shapes = Mapping[str, tuple[int, ...]]


def _conv_block(source: str, target: str) -> tuple[Rule, ...]:
    return *affine(rf"{source}\.block\.0", f"{target}/conv", conv), *norm(rf"{source}\.block\.2", f"{target}/norm")


_ESTIMATOR = r"decoder\.estimator\."
_SHARED = (
    Rule(r"input_embedding\.weight", "conditions/vectors"),
    *affine("spk_embed_affine_layer", "conditions/speaker"),
    *affine(_ESTIMATOR + r"(?:time_mlp\.linear_1|time_embed\.time_mlp\.0)", "time/in"),
    *affine(_ESTIMATOR + r"(?:time_mlp\.linear_2|time_embed\.time_mlp\.2)", "time/out"),
)


def _conformer_layer(source: str) -> tuple[Rule, ...]:
    return (
        *affine(source + r"self_attn\.linear_q", "attention/query"),
        *affine(source + r"self_attn\.linear_k", "attention/key"),
        *affine(source + r"self_attn\.linear_v", "attention/value"),
        *affine(source + r"self_attn\.linear_out", "attention/out"),
        Rule(source + r"self_attn\.linear_pos\.weight", "attention/position/kernel", transpose),
        Rule(source + r"self_attn\.pos_bias_u", "attention/content_bias"),
        Rule(source + r"self_attn\.pos_bias_v", "attention/position_bias"),
        *affine(source + r"feed_forward\.w_1", "up"),
        *affine(source + r"feed_forward\.w_2", "down"),
        *norm(source + "norm_mha", "attention_norm"),
        *norm(source + "norm_ff", "mlp_norm"),
    )


def _stage(source: str, name: str, block: str, entry: str = "") -> Iterator[Rule]:
    """A stage of the U-Net.

    Args:
        source: the names of its tensors.
        name: of the stage.
        block: where the number of a transformer block is among the groups of a name.
        entry: which entry of the parameters it fills, if they are stacked.
    """
    source = rf"{_ESTIMATOR}{source}\."
    inside, into = source + r"1\.(\d+)\.", f"block_{block}/"
    residual_and_blocks = (
        *_conv_block(source + r"0\.block1", "conv_in"),
        *_conv_block(source + r"0\.block2", "conv_out"),
        *affine(source + r"0\.res_conv", "shortcut", pointwise),
        *norm(inside + "norm1", into + "attention_norm"),
        *norm(inside + "norm3", into + "mlp_norm"),
        Rule(inside + r"attn1\.to_q\.weight", into + "query/kernel", transpose),
        Rule(inside + r"attn1\.to_k\.weight", into + "key/kernel", transpose),
        Rule(inside + r"attn1\.to_v\.weight", into + "value/kernel", transpose),
        *affine(inside + r"attn1\.to_out\.0", into + "out"),
        *affine(inside + r"ff\.net\.0\.proj", into + "up"),
        *affine(inside + r"ff\.net\.2", into + "down"),
    )
    yield from within(f"estimator/{name}", residual_and_blocks, entry)
    yield from within("time", affine(source + r"0\.mlp\.1", name), entry)


RULES_2 = (
    *_SHARED,
    *affine(r"encoder\.(up_|)embed\.out\.0", "conditions/encoder/{0}embed/linear"),
    *norm(r"encoder\.(up_|)embed\.out\.1", "conditions/encoder/{0}embed/norm"),
    *affine(r"encoder\.pre_lookahead_layer\.(conv[12])", "conditions/encoder/look_ahead/{0}", conv),
    *affine(r"encoder\.up_layer\.conv", "conditions/encoder/up", conv),
    *within("conditions/encoder/layers", _conformer_layer(r"encoder\.encoders\.(\d+)\."), "[{0}]"),
    *within("conditions/encoder/up_layers", _conformer_layer(r"encoder\.up_encoders\.(\d+)\."), "[{0}]"),
    *norm(r"encoder\.after_norm", "conditions/encoder/norm"),
    *affine("encoder_proj", "conditions/encoder/out"),
    *_stage(r"down_blocks\.0", "down", "{0}"),
    *_stage(r"mid_blocks\.(\d+)", "middle", "{1}", "[{0}]"),
    *_stage(r"up_blocks\.0", "up", "{0}"),
    *affine(_ESTIMATOR + r"(down|up)_blocks\.0\.2", "estimator/{0}_conv", conv),
    *_conv_block(_ESTIMATOR + "final_block", "estimator/last"),
    *affine(_ESTIMATOR + "final_proj", "estimator/out", pointwise),
)

_LAYER = _ESTIMATOR + r"transformer_blocks\.(\d+)\."
_LAYERS_3 = (
    *affine(_LAYER + r"attn\.to_q", "query"),
    *affine(_LAYER + r"attn\.to_k", "key"),
    *affine(_LAYER + r"attn\.to_v", "value"),
    *affine(_LAYER + r"attn\.to_out\.0", "out"),
    *affine(_LAYER + r"ff\.ff\.0\.0", "up"),
    *affine(_LAYER + r"ff\.ff\.2", "down"),
)
RULES_3 = (
    *_SHARED,
    *affine(r"pre_lookahead_layer\.(conv[12])", "conditions/look_ahead/{0}", conv),
    *affine(_ESTIMATOR + r"input_embed\.proj", "estimator/in"),
    *affine(_ESTIMATOR + r"input_embed\.conv_pos_embed\.(conv[12])\.0", "estimator/{0}", conv),
    Rule(_ESTIMATOR + r"rotary_embed\.inv_freq", None),
    *within("estimator/layers", _LAYERS_3, "[{0}]"),
    *within("time", affine(_LAYER + r"attn_norm\.linear", "layers"), "[{0}]"),
    *affine(_ESTIMATOR + r"norm_out\.linear", "time/norm"),
    *affine(_ESTIMATOR + "proj_out", "estimator/out"),
)


def config(shapes: Shapes) -> tuple[Config, tuple[Rule, ...]]:
    """The configuration of a flow.

    Args:
        shapes: of each tensor of ``flow.pt``, by name.

    Returns:
        The configuration, and the rules that convert the file.

    Raises:
        ValueError: it is the flow of neither CosyVoice 2 nor 3, or a tensor that shows a size is missing.
    """
    name = "decoder.estimator."
    codes, _ = _shape(shapes, "input_embedding.weight", 2)
    if any(key.startswith(name + "transformer_blocks.") for key in shapes):
        width, _ = _shape(shapes, name + "transformer_blocks.0.attn.to_q.weight", 2)
        hidden, _, _ = _shape(shapes, "pre_lookahead_layer.conv1.weight", 3)
        layers = _count(shapes, name + "transformer_blocks.{}.attn.to_q.weight")
        return Config(3, codes, hidden, (0, 0), width, width // HEAD_DIM, layers, 0), RULES_3
    hidden, _, _ = _shape(shapes, "encoder.up_layer.conv.weight", 3)
    attended, width = _shape(shapes, name + "mid_blocks.0.1.0.attn1.to_q.weight", 2)
    encoder = tuple(_count(shapes, f"encoder.{part}encoders.{{}}.norm_ff.weight") for part in ("", "up_"))
    stages, blocks = (_count(shapes, name + f"mid_blocks.{at}.attn1.to_q.weight") for at in ("{}.1.0", "0.1.{}"))
    return Config(2, codes, hidden, (encoder[0], encoder[1]), width, attended // HEAD_DIM, stages, blocks), RULES_2


def _count(shapes: Shapes, name: str) -> int:
    return sum(1 for _ in itertools.takewhile(shapes.__contains__, map(name.format, itertools.count())))


def _shape(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    if len(shapes.get(name, ())) != axes:
        raise ValueError(f"expected the flow of CosyVoice 2 or 3, got a file without {name} of {axes} axes: give its flow.pt")
    return shapes[name]
