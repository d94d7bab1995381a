"""Rules for CAM++, from the exported ONNX network or from torch, alone or within a larger checkpoint.

The exporter has folded most batch norms into the convolution before them; those of torch's layout are folded here, so that both
layouts give the same parameters.
"""

import re
from collections.abc import Iterator, Mapping

import numpy as np

from jaxspec.checkpoint.tensors import Tensor
from jaxspec.codec.campplus import Config
from jaxspec.convert.core import Rule, affine, conv, norm, pointwise

_MARK = re.compile(r"(speaker_encoder\.|)xvector\.tdnn\.linear\.weight")
_EPS = 1e-5

# Batch norms and the convolution before each.
_FOLDED = (
    (r"(head\.(?:layer\d+\.\d+\.)?)bn(\d)", r"\1conv\2"),
    (r"(head\.layer\d+\.\d+\.shortcut)\.1", r"\1.0"),
    (r"(xvector\.block\d+\.tdnnd\d+)\.nonlinear2\.batchnorm", r"\1.linear1"),
    (r"(xvector\.(?:tdnn|dense))\.nonlinear\.batchnorm", r"\1.linear"),
    (r"(xvector)\.out_nonlinear\.batchnorm", r"\1.transit3.linear"),
)
_ROLES = ("running_mean", "running_var", "weight", "bias", "epsilon")


def _image(weight: np.ndarray) -> np.ndarray:
    """[out in mels frames] -> [frames mels in out]."""
    return weight.transpose(3, 2, 1, 0)


_LAYER, _TRANSIT = r"xvector\.block(\d+)\.tdnnd(\d+)\.", r"xvector\.transit(\d+)\."

RULES = (
    *affine(r"head\.(conv\d)", "head/{0}", _image),
    *affine(r"head\.(layer\d+)\.(\d+)\.(conv\d)", "head/{0}_{1}/{2}", _image),
    *affine(r"head\.(layer\d+)\.(\d+)\.shortcut\.0", "head/{0}_{1}/shortcut", _image),
    *affine(r"xvector\.tdnn\.linear", "tdnn", conv),
    *norm(_LAYER + r"nonlinear1\.batchnorm", "block{0}_{1}/norm"),
    *affine(_LAYER + r"linear1", "block{0}_{1}/linear1", pointwise),
    Rule(_LAYER + r"cam_layer\.linear_local\.weight", "block{0}_{1}/local/kernel", conv),
    *affine(_LAYER + r"cam_layer\.linear1", "block{0}_{1}/context", pointwise),
    *affine(_LAYER + r"cam_layer\.linear2", "block{0}_{1}/mask", pointwise),
    *norm(_TRANSIT + r"nonlinear\.batchnorm", "transit{0}_norm"),
    *affine(_TRANSIT + r"linear", "transit{0}", pointwise),
    *affine(r"xvector\.dense\.linear", "dense", pointwise),
    Rule(r".*\.num_batches_tracked", None),
    Rule(r"onnx::.*|/.*|[^.:/]*", None),  # constants of the network
)


def own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a speaker encoder, batch norms folded.

    Args:
        tensors: of a checkpoint: ``onnx.tensors`` of campplus.onnx, a state dict of the torch network, or one of several parts,
            in which the encoder's have the prefix "speaker_encoder.", such as Chatterbox's s3gen.safetensors.

    Returns:
        The tensors by name, without the prefix, as ``fold_batch_norm`` gives them; {} where there is no speaker encoder.

    Raises:
        ValueError: a batch norm lacks a tensor.
    """
    marks = [match for name in tensors if (match := _MARK.fullmatch(name))]
    if not marks:
        return {}
    prefix = marks[0][1]
    return fold_batch_norm({name.removeprefix(prefix): item for name, item in tensors.items() if name.startswith(prefix)})


def fold_batch_norm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Folds each batch norm that follows a convolution into it; what is left of any other is its scale and offset.

    Args:
        tensors: by name, in torch's layout.

    Returns:
        The tensors by name: "<convolution>.weight" and ".bias", "<batch norm>.weight" and ".bias" of those left, and all others.

    Raises:
        ValueError: a batch norm lacks a tensor.
    """
    norms = [name.removesuffix(".running_mean") for name in tensors if name.endswith(".running_mean")]
    found = dict(tensors)
    for name in norms:
        parts = {role: found.pop(f"{name}.{role}") for role in _ROLES if f"{name}.{role}" in found}
        pairs = [re.sub(pattern, target, name) for pattern, target in _FOLDED if re.fullmatch(pattern, name)]
        target = pairs[0] if pairs else name
        weight, bias = (found.get(f"{target}.{role}") for role in ("weight", "bias"))
        shape = (weight or parts["running_mean"]).shape[:1]
        if "running_var" not in parts or any(part.shape != shape for role, part in parts.items() if role != "epsilon"):
            got = ", ".join(f"{role} {list(part.shape)}" for role, part in parts.items())
            raise ValueError(f"expected mean and variance {list(shape)} of {name}, got {got}: download the checkpoint again")
        found |= dict(_fold(target, parts, weight, bias))
    return found


def _fold(name: str, parts: Mapping[str, Tensor], weight: Tensor | None, bias: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """The weight and the bias of a convolution and the batch norm after it, or of a batch norm alone.

    Args:
        name: of the convolution or the batch norm.
        parts: of the batch norm, by role.
        weight, bias: of the convolution.
    """

    def scale() -> np.ndarray:
        own, epsilon = (parts[role].all() if role in parts else default for role, default in (("weight", 1), ("epsilon", _EPS)))
        return own / np.sqrt(parts["running_var"].all().astype(np.float64) + epsilon)

    def read_weight(start: int, stop: int) -> np.ndarray:
        rows = scale()[start:stop]
        if weight is not None:
            rows = weight.read(start, stop) * rows.reshape(-1, *(1,) * (len(weight.shape) - 1))
        return rows.astype(np.float32)

    def read_bias(start: int, stop: int) -> np.ndarray:
        own, before = (0 if part is None else part.all() for part in (parts.get("bias"), bias))
        return (own + (before - parts["running_mean"].all()) * scale()).astype(np.float32)[start:stop]

    mean = parts["running_mean"]
    for role, shape, read in (("weight", (weight or mean).shape, read_weight), ("bias", mean.shape, read_bias)):
        yield f"{name}.{role}", Tensor(f"{name}.{role}", shape, np.dtype(np.float32), read)


def config(tensors: Mapping[str, Tensor]) -> tuple[Config, tuple[Rule, ...]]:
    """The configuration of a speaker encoder.

    Args:
        tensors: see ``own``.

    Returns:
        The configuration, and the rules that convert the checkpoint.

    Raises:
        ValueError: a tensor is missing.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors or len(tensors[name].shape) < 3:
            raise ValueError(f"expected a CAM++ speaker encoder, got a checkpoint without {name}: give campplus.onnx")
        return tensors[name].shape

    channels = shape("head.conv1.weight")[0]
    width, features, _ = shape("xvector.tdnn.linear.weight")
    growth, bottleneck, _ = shape("xvector.block1.tdnnd1.cam_layer.linear_local.weight")
    context = shape("xvector.block1.tdnnd1.cam_layer.linear1.weight")[0]
    layers = tuple(
        sum(re.fullmatch(rf"xvector\.block{block}\.tdnnd\d+\.linear1\.weight", name) is not None for name in tensors)
        for block in (1, 2, 3)
    )
    embedding = shape("xvector.dense.linear.weight")[0]
    return Config(8 * features // channels, channels, width, growth, bottleneck, context, layers, embedding), RULES
