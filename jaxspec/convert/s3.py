"""Rules for the S3 tokenizers v2 and v3, from the exported ONNX network or from torch, alone or within a larger checkpoint."""

import re
from collections.abc import Mapping

from jaxspec.checkpoint.tensors import Tensor
from jaxspec.codec.s3 import Config
from jaxspec.convert.core import Rule, affine, conv, depthwise, norm, transpose

VERSIONS = {6: "s3-v2", 12: "s3-v3"}  # by the number of layers
HEAD_DIM = 64

_MARK = re.compile(r"(tokenizer\.|)(?:encoder\.)?blocks\.0\.attn\.fsmn_block\.weight")
_ENCODER = r"(?:encoder\.)?"
_BLOCK = _ENCODER + r"blocks\.(\d+)\."


RULES = (
    *affine(_ENCODER + r"conv1", "conv_0", conv),
    *affine(_ENCODER + r"conv2", "conv_1", conv),
    *norm(_BLOCK + r"attn_ln", "layer_{0}/attention_norm"),
    Rule(_BLOCK + r"attn\.(query|key|value|out)\.weight", "layer_{0}/attention/{1}/kernel", transpose),
    Rule(_BLOCK + r"attn\.(query|value|out)\.bias", "layer_{0}/attention/{1}/bias"),
    Rule(_BLOCK + r"attn\.fsmn_block\.weight", "layer_{0}/attention/memory/kernel", depthwise),
    *norm(_BLOCK + r"mlp_ln", "layer_{0}/mlp_norm"),
    *affine(_BLOCK + r"mlp\.0", "layer_{0}/up"),
    *affine(_BLOCK + r"mlp\.2", "layer_{0}/down"),
    Rule(r"quantizer\.(?:.*\.)?weight", "project_in/kernel", transpose),
    Rule(r"quantizer\.(?:.*\.)?bias", "project_in/bias"),
    Rule(r".*\.epsilon", None),  # in the configuration
    Rule(r"onnx::.*|/.*|[^.:/]*", None),  # constants of the network, and its front-end's window and mel filters
)


def own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a tokenizer.

    Args:
        tensors: of a checkpoint: ``onnx.tensors`` of the published file, a state dict of the torch network, or one of several
            parts, in which the tokenizer's have the prefix "tokenizer.", such as Chatterbox's s3gen.safetensors.

    Returns:
        The tensors by name, without the prefix; {} where there is no tokenizer.
    """
    marks = [match for name in tensors if (match := _MARK.fullmatch(name))]
    if not marks:
        return {}
    prefix = marks[0][1]
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def config(tensors: Mapping[str, Tensor]) -> tuple[Config, tuple[Rule, ...]]:
    """The configuration of a tokenizer.

    Args:
        tensors: see ``own``.

    Returns:
        The configuration, and the rules that convert the checkpoint. The constants of the norms are read where the network says
        them (ONNX), and are 1e-5 otherwise.

    Raises:
        ValueError: a tensor is missing, or the variant is not supported.
    """
    names = {re.sub(f"^{_ENCODER}", "", name): tensor for name, tensor in tensors.items()}
    needed = ("conv1.weight", "blocks.0.mlp.0.weight")
    if missing := [name for name in needed if name not in names or not 2 <= len(names[name].shape) <= 3]:
        raise ValueError(
            f"expected an S3 tokenizer v2 or v3, got a checkpoint without {missing[0]}: give speech_tokenizer_v2.onnx"
        )
    (width, mel_bins, *_), mlp_width = names["conv1.weight"].shape, names["blocks.0.mlp.0.weight"].shape[0]
    if width % HEAD_DIM:
        raise ValueError(f"expected attention features in heads of {HEAD_DIM}, got {width}: give the tokenizer as published")
    layers = sum(re.fullmatch(r"blocks\.\d+\.attn_ln\.weight", name) is not None for name in names)
    norms = _eps(names, "attn_ln"), _eps(names, "mlp_ln")
    return Config(mel_bins, width, layers, width // HEAD_DIM, mlp_width, norms), RULES


def _eps(names: Mapping[str, Tensor], norm: str) -> float:
    """The constant of one of the norms of every layer."""
    pattern = rf"blocks\.\d+\.{norm}\.epsilon"
    found = {float(f"{tensor.all().item():.6g}") for name, tensor in names.items() if re.fullmatch(pattern, name)}
    if len(found) > 1:
        raise ValueError(f"expected one epsilon for the {norm} of all layers, got {sorted(found)}: export the network again")
    return found.pop() if found else 1e-5
