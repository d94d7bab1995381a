"""Rules for the Llama and Qwen family in the names of transformers; also for the backbone of CosyVoice."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxspec.checkpoint.tensors import Tensor, equal
from jaxspec.checkpoint.tensors import quantized as quantize
from jaxspec.convert.core import Rule, affine, is_count
from jaxspec.models.int8 import SUFFIX
from jaxspec.models.transformer import Config, RopeScaling

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QWEN2 = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "architectures": ["Qwen2ForCausalLM"],
}  # Qwen2-0.5B, for checkpoints without a config.json
ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_SIZES = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size".split()
_KINDS = {
    **dict.fromkeys(("rope_theta", "rms_norm_eps"), (int, float)),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), dict),
    "architectures": list,
}

_LAYER = r"model\.layers\.(\d+)\."


def _linear(source: str, target: str) -> tuple[Rule, Rule, Rule]:
    scale = Rule(rf"{_LAYER}{source}\.weight{SUFFIX}", f"layer_{{0}}/{target}/kernel{SUFFIX}")
    return *affine(_LAYER + source, "layer_{0}/" + target), scale


RULES = (
    *_linear(r"self_attn\.q_proj", "attention/query"),
    *_linear(r"self_attn\.k_proj", "attention/key"),
    *_linear(r"self_attn\.v_proj", "attention/value"),
    *_linear(r"self_attn\.o_proj", "attention/out"),
    Rule(_LAYER + r"self_attn\.q_norm\.weight", "layer_{0}/attention/query_norm/scale"),
    Rule(_LAYER + r"self_attn\.k_norm\.weight", "layer_{0}/attention/key_norm/scale"),
    *_linear(r"mlp\.gate_proj", "mlp/gate"),
    *_linear(r"mlp\.up_proj", "mlp/up"),
    *_linear(r"mlp\.down_proj", "mlp/down"),
    Rule(_LAYER + r"input_layernorm\.weight", "layer_{0}/attention_norm/scale"),
    Rule(_LAYER + r"post_attention_layernorm\.weight", "layer_{0}/mlp_norm/scale"),
    Rule(r"model\.norm\.weight", "norm/scale"),
    Rule(rf"((?:table_\d|head)(?:{SUFFIX})?|head_bias)", "{0}"),  # cut from the embedding and the head by the family
    Rule(rf"{_LAYER}self_attn\.rotary_emb\.inv_freq", None),  # in old versions; computed here
)


def quantized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with each matrix as int8 and, under its name with a suffix, the scales of its output channels, its rows.

    Args:
        tensors: by name; input tables and head as the family cut them.
    """
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if re.fullmatch(rf"{_LAYER}.*_proj\.weight|table_\d|head", name) and len(tensor.shape) == 2:
            made[name], made[name + SUFFIX] = quantize(tensor)
        else:  # ``plan`` reports a matrix of another shape
            made[name] = tensor
    return made


def checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without its nulls.

    Raises:
        ValueError: a setting has the wrong type, or a size is out of range.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    for name, value in settings.items():
        if (name in _SIZES and not is_count(value)) or not isinstance(value, _KINDS.get(name, object)):
            raise ValueError(f"expected a valid {name} in config.json, got {value!r}: download it again")
    return settings


def architecture(settings: Mapping[str, Any], **vocabulary: Any) -> Config:
    """The shape of the transformer that a config.json describes.

    Args:
        settings: ``checked``; of transformers 4 or 5.
        vocabulary: the fields of ``Config`` that the family decides: input_tables, vocab, tied, head_bias, padding, dtype.

    Returns:
        The transformer's configuration.

    Raises:
        ValueError: the architecture or the rotary scaling is not supported, or a setting is missing.
    """
    kind = (settings.get("architectures") or ["none"])[0]
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"expected an architecture among {', '.join(ARCHITECTURES)} in config.json, got {kind}: choose one of these"
        )
    if settings.get("hidden_act", "silu") != "silu" or settings.get("use_sliding_window") or settings.get("mlp_bias"):
        raise ValueError("expected silu, no sliding window and no mlp_bias in config.json, got others: they are not supported")
    try:
        heads, width = settings["num_attention_heads"], settings["hidden_size"]
        theta, scaling = rope(settings)
        return Config(
            width=width,
            layers=settings["num_hidden_layers"],
            heads=heads,
            kv_heads=settings.get("num_key_value_heads") or heads,
            head_dim=settings.get("head_dim") or width // heads,
            mlp_width=settings["intermediate_size"],
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=float(settings.get("rms_norm_eps", 1e-6)),
            qkv_bias=kind == "Qwen2ForCausalLM",
            qk_norm=kind == "Qwen3ForCausalLM",
            **vocabulary,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"expected a complete config.json, got {error} missing or of another type: download it again") from error


def rope(settings: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``.

    Args:
        settings: ``checked``.

    Raises:
        ValueError: theta is missing, or the scaling is not supported.
    """
    rope = settings.get("rope_parameters") or {"rope_theta": settings.get("rope_theta"), **(settings.get("rope_scaling") or {})}
    theta, kind = rope.get("rope_theta") or settings.get("rope_theta"), rope.get("rope_type") or rope.get("type") or "default"
    if theta is None:
        raise ValueError("expected rope_theta in config.json, also within rope_parameters, got none: download it again")
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise ValueError(f"expected rotary positions of type default or llama3, got {kind}: other types are not supported")
    factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    return float(theta), RopeScaling(factor, low, high, int(rope["original_max_position_embeddings"]))


def tie(tensors: dict[str, Tensor], settings: Mapping[str, Any], notes: list[str]) -> tuple[Tensor, Tensor | None]:
    """Takes embedding and head out of ``tensors``, by comparing their values.

    As in transformers 5, a stored head that differs from the embedding is used, whatever ``tie_word_embeddings`` says.

    Args:
        tensors: by name; embedding and head are removed.
        settings: config.json.
        notes: gets a line where config.json and the tensors disagree, or the head is stored twice.

    Returns:
        The embedding, and the head or None where they are tied.

    Raises:
        ValueError: both are missing, or one is and config.json says that they are not tied.
    """
    embed, head, tied = tensors.pop(EMBED, None), tensors.pop(HEAD, None), settings.get("tie_word_embeddings", False)
    if embed is None or head is None:
        only = head if embed is None else embed
        if only is None:
            raise ValueError(f"expected {EMBED} or {HEAD}, got neither: give all files of the checkpoint")
        if not tied:
            missing = EMBED if embed is None else HEAD
            raise ValueError(f"expected {missing}, as config.json does not tie embedding and head, got none: give all files")
        return only, None
    if not tied:
        return embed, head
    if equal(embed, head):
        notes.append(f"{HEAD} equals the embedding, as tie_word_embeddings says: stored once")
        return embed, None
    notes.append(f"{HEAD} differs from {EMBED} although tie_word_embeddings is true: used as it is (transformers 4 ignores it)")
    return embed, head


def cut_layers(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], layers: Sequence[int]) -> tuple[dict, dict, list[str]]:
    """Keeps some layers of a model.

    Args:
        tensors: by name.
        settings: config.json.
        layers: those to keep, in this order.

    Returns:
        The tensors and the config.json of the smaller model, and the names of the tensors that are left out.

    Raises:
        ValueError: the model does not have a layer, or a layer is given twice.
    """
    count = settings.get("num_hidden_layers", 0)
    if len(set(layers)) != len(layers) or not all(0 <= i < count for i in layers):
        raise ValueError(f"expected different layers of 0 to {count - 1}, got {list(layers)}: change --layers")
    kept, dropped = {}, []
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(model\.layers\.)(\d+)(\..*)", name)
        if match and int(match[2]) in layers:
            kept[f"{match[1]}{layers.index(int(match[2]))}{match[3]}"] = tensor
        elif match:
            dropped.append(name)
        else:
            kept[name] = tensor
    return kept, {**settings, "num_hidden_layers": len(layers)}, dropped
