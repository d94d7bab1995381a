"""Rules for X-codec2 and NeuCodec, in the original layout and in that of transformers 5."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxspec.codec.xcodec2 import EPS, LEVELS, Config
from jaxspec.convert import xcodec2_encoder
from jaxspec.convert.core import Rule, affine, conv, is_count, norm, transpose

# Settings that tensor shapes do not show and the decoder assumes.
FIXED = {"hidden_act": "silu", "rms_norm_eps": EPS, "quantization_levels": list(LEVELS)}

# Rows of the head (n_fft + 2) -> samples per code, sample rate in Hz.
HEADS = {1282: (320, 16_000), 1922: (480, 24_000)}


def _outside_attention(root: str, layers: str, norms: tuple[str, str]) -> tuple[Rule, ...]:
    """The part whose names agree in the two layouts under ``root``: convolutions, MLPs, and the norms of the layers."""
    layer = rf"{root}\.{layers}\.(\d+)"
    return (
        *affine(rf"{root}\.embed", "embed", conv),
        *norm(rf"{root}\.(prior|post)_net\.(\d)\.(norm\d)", "{0}_{1}/{2}"),
        *affine(rf"{root}\.(prior|post)_net\.(\d)\.(conv\d)", "{0}_{1}/{2}", conv),
        Rule(rf"{layer}\.{norms[0]}\.weight", "layer_{0}/attention_norm/scale"),
        Rule(rf"{layer}\.{norms[1]}\.weight", "layer_{0}/mlp_norm/scale"),
        Rule(rf"{layer}\.mlp\.fc1\.weight", "layer_{0}/mlp/up/kernel", transpose),
        Rule(rf"{layer}\.mlp\.fc2\.weight", "layer_{0}/mlp/down/kernel", transpose),
    )


RULES_ORIGINAL = (
    *affine(r"generator\.quantizer\.project_out", "project_out"),
    *affine("fc_post_a", "fc"),
    *_outside_attention(r"generator\.backbone", "transformers", ("att_norm", "ffn_norm")),
    Rule(
        r"generator\.backbone\.transformers\.(\d+)\.att\.c_attn\.weight",
        ("layer_{0}/attention/query/kernel", "layer_{0}/attention/key/kernel", "layer_{0}/attention/value/kernel"),
        transpose,
    ),
    Rule(r"generator\.backbone\.transformers\.(\d+)\.att\.c_proj\.weight", "layer_{0}/attention/out/kernel", transpose),
    *norm(r"generator\.backbone\.final_layer_norm", "norm"),
    *affine(r"generator\.head\.out", "head"),
    Rule(r"generator\.head\.istft\.window", None),
    Rule(r"(fc_post_s|SemanticDecoder(_module)?)\..*", None),  # used in training only
)

# Query and key hold the dimensions of a head in another order than the original, the same in both, so q k is unchanged.
RULES_TRANSFORMERS = (
    *affine(r"quantizer\.project_out", "project_out"),
    *affine(r"acoustic_decoder\.fc", "fc"),
    *_outside_attention(r"acoustic_decoder", "layers", ("input_layernorm", "post_attention_layernorm")),
    Rule(r"acoustic_decoder\.layers\.(\d+)\.self_attn\.q_proj\.weight", "layer_{0}/attention/query/kernel", transpose),
    Rule(r"acoustic_decoder\.layers\.(\d+)\.self_attn\.k_proj\.weight", "layer_{0}/attention/key/kernel", transpose),
    Rule(r"acoustic_decoder\.layers\.(\d+)\.self_attn\.v_proj\.weight", "layer_{0}/attention/value/kernel", transpose),
    Rule(r"acoustic_decoder\.layers\.(\d+)\.self_attn\.o_proj\.weight", "layer_{0}/attention/out/kernel", transpose),
    *norm(r"acoustic_decoder\.norm", "norm"),
    *affine(r"acoustic_decoder\.head\.linear", "head"),
    Rule(r"acoustic_decoder\.(head\.window|rotary_emb\..*)", None),
    Rule(r"quantizer\.quantizer\..*", None),
)


def _shapes(names_and_shapes: Mapping[str, tuple[int, ...]], rules: tuple[Rule, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors in the file, by the path of their parameter."""
    found = {}
    for name, shape in names_and_shapes.items():
        for rule in rules:
            match = re.fullmatch(rule.source, name)
            if match and isinstance(rule.target, str):
                found[rule.target.format(*match.groups())] = shape
    return found


def _rules(names: Iterable[str]) -> tuple[Rule, ...]:
    for head, rules in (
        ("generator.head.out.weight", RULES_ORIGINAL),
        ("acoustic_decoder.head.linear.weight", RULES_TRANSFORMERS),
    ):
        if head in names:
            return rules
    raise ValueError(
        "expected the tensor 'generator.head.out.weight' (original) or 'acoustic_decoder.head.linear.weight' (transformers), "
        "got neither: give all files of a checkpoint of X-codec2 or NeuCodec"
    )


def config(
    names_and_shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any] | None, encoder: bool = True
) -> tuple[Config, tuple[Rule, ...]]:
    """The configuration of a checkpoint.

    Args:
        names_and_shapes: the shape of each tensor of the checkpoint, by name.
        settings: config.json, for the number of heads; without it, the 16 of the published checkpoints.
        encoder: whether to convert the encoder, where the checkpoint has one.

    Returns:
        The configuration, and the rules that convert the checkpoint.

    Raises:
        ValueError: the checkpoint is neither X-codec2 nor NeuCodec, or a variant that is not supported.
    """
    settings = settings or {}
    for key, expected in FIXED.items():
        if settings.get(key, expected) != expected:
            raise ValueError(
                f"expected {key} = {expected} in config.json, got {settings[key]}: give X-codec2 or NeuCodec as published"
            )
    rules = _rules(names_and_shapes)
    shapes = _shapes(names_and_shapes, rules)
    needed = ("project_out/kernel", "layer_0/mlp/up/kernel", "layer_0/attention/out/kernel")
    if missing := [name for name in needed if name not in shapes]:
        raise ValueError(f"expected tensors for {', '.join(missing)}, got none: give all files of the checkpoint")
    rows, width = shapes["head/kernel"]
    if rows not in HEADS:
        raise ValueError(f"expected a head of 1282 rows (X-codec2) or 1922 (NeuCodec), got {rows}: give one of the two")
    heads, features = settings.get("num_attention_heads", Config.heads), shapes["layer_0/attention/out/kernel"][1]
    if not is_count(heads) or features % heads:
        raise ValueError(f"expected attention features in {heads} equal heads, got {features}: give its config.json")
    layers = sum(name.endswith("mlp/up/kernel") for name in shapes)
    mlp_width, quantizer_width = shapes["layer_0/mlp/up/kernel"][0], shapes["project_out/kernel"][0]
    made = Config(width, layers, heads, features // heads, mlp_width, quantizer_width, *HEADS[rows])
    layout = xcodec2_encoder.ORIGINAL if rules is RULES_ORIGINAL else xcodec2_encoder.TRANSFORMERS
    if not encoder or not layout.is_in(names_and_shapes):
        return made, (*rules, layout.without)
    own = xcodec2_encoder.config(layout, names_and_shapes, settings.get("semantic_model_config"), made.sample_rate_hz)
    return dataclasses.replace(made, encoder=own), (*rules, *xcodec2_encoder.rules(layout, own))
