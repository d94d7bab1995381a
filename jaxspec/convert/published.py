"""Drafters that others published, one function each: from their files to a drafter's config and a table of rules."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxspec.checkpoint.tensors import Tensor, of_array, padded, rows
from jaxspec.convert import cosyvoice, llama
from jaxspec.convert.core import Rule, is_count, transpose
from jaxspec.convert.source import Source
from jaxspec.draft import block, eagle, mtp
from jaxspec.models.card import Model
from jaxspec.models.cosyvoice import VERSIONS


class Reading(NamedTuple):
    """What a drafter's files hold.

    Attributes:
        family: a name in ``jaxspec.draft.families.FAMILIES``.
        config: of the drafter.
        tensors: by the names that the rules know.
        rules: see ``core.Rule``.
        copies: tensors that repeat arrays of the target, by the paths of these; they are compared.
    """

    family: str
    config: Any
    tensors: Mapping[str, Tensor]
    rules: Sequence[Rule]
    copies: Mapping[str, Tensor]


def llasa_plus(opened: Source, model: Model, target: Path) -> Reading:
    """LLaSA+: frozen LLaSA with blocks of multi-token prediction, numbered from 1."""
    tensors, blocks = _layers(opened.tensors, r"mtp_(\d+)_block\.(.*)", first=1)
    own = [
        rule
        for i in range(blocks)
        for rule in (
            Rule(rf"mtp_{i + 1}_local_RMSNorm\.weight", f"input_norm_{i}/scale"),
            Rule(rf"mtp_{i + 1}_proj\.weight", f"project_{i}/kernel", transpose),
            Rule(rf"mtp_{i + 1}_proj\.bias", f"project_{i}/bias"),
        )
    ]
    rules = [*own, *llama.RULES, Rule(r"llm\..*", None)]
    norm = opened.tensors.get("llm.model.norm.weight")
    return Reading("mtp", mtp.Config(model.shape, blocks), tensors, rules, {"norm/scale": norm} if norm else {})


_SPEECHSPEC = (
    *llama.RULES,
    Rule(r"(mask|proposed|markov_previous|markov_following)", "{0}"),
    Rule(r"fc\.weight", "fuse/kernel", transpose),
    Rule(r"hidden_norm\.weight", "fuse_norm/scale"),
    Rule(r"(t2d|d2t|embed_tokens\.weight|(confidence_head|verifier_norm|verifier_lm_head)\..*)", None),
)


def speechspec(opened: Source, model: Model, target: Path) -> Reading:
    """SpeechSpec's DFlash and DSpark, as vllm-project/speculators writes them, in CosyVoice's merged vocabulary."""
    if model.family not in VERSIONS:
        raise ValueError(f"expected a target of {', '.join(VERSIONS)} for SpeechSpec's drafters, got {model.family}: convert it")
    tensors, layers = _layers(opened.tensors, r"layers\.(\d+)\.(.*)")
    first, count = cosyvoice.first_merged_code(target), model.shape.vocab - model.shape.padding
    row = _draft_rows(tensors, model, first)
    for theirs, ours in (("lm_head.weight", "head"), ("markov_head.markov_w2.weight", "markov_following")):
        if theirs in tensors:
            tensors[ours] = _picked(tensors.pop(theirs), row)
    if previous := tensors.pop("markov_head.markov_w1.weight", None):
        tensors["markov_previous"] = padded(rows(previous, first, first + count), model.shape.vocab)
    if _lacks(row, model):
        tensors["proposed"] = of_array("d2t", (row >= 0).astype(tensors["head"].dtype))
    config, mask = _block_config(opened.config, model, tensors, layers)
    embed = _tensor(tensors, "embed_tokens.weight")
    tensors["mask"] = rows(embed, mask, mask + 1)._replace(shape=embed.shape[1:], read=lambda *_: embed.read(mask, mask + 1)[0])
    tensors["model.norm.weight"] = tensors.pop("norm.weight")
    return Reading("block", config, tensors, _SPEECHSPEC, {"table_0": rows(embed, first, first + count)})


def _block_config(
    settings: Mapping[str, Any], model: Model, tensors: Mapping[str, Tensor], layers: int
) -> tuple[block.Config, int]:
    """The config of a drafter of speculators, and the id of its mask token."""
    layer, count = settings.get("transformer_layer_config"), model.shape.layers
    if not isinstance(layer, dict):
        raise ValueError(f"expected transformer_layer_config in config.json, got {layer!r}: give the config.json of the drafter")
    layer = llama.checked(layer)
    kinds = set(layer.get("layer_types") or ["full_attention"])
    sliding, window = kinds == {"sliding_attention"}, layer.get("sliding_window", 0)
    from_anchor = bool(settings.get("sample_from_anchor", settings.get("speculators_model_type") == "dspark"))
    reads = settings.get("aux_hidden_state_layer_ids") or [2, count // 2, count - 3]
    size, mask = settings.get("block_size") or 0, settings.get("mask_token_id", -1)
    ids = _tensor(tensors, "embed_tokens.weight").shape[0]
    _check("block_size of 2 or more", size, is_count(size) and size > 1)
    _check(f"mask_token_id below {ids}", mask, type(mask) is int and 0 <= mask < ids)
    _check(f"aux_hidden_state_layer_ids from 1 to {count - 1}", reads, all(i in range(1, count) for i in reads))
    _check("layer_types of one kind", kinds, len(kinds) == 1)
    _check("a sliding_window", window, not sliding or is_count(window))
    _check("markov_head_type vanilla", settings.get("markov_head_type"), settings.get("markov_head_type") in (None, "vanilla"))
    _check_layer(layer, model)
    q, k = (_tensor(tensors, f"model.layers.0.self_attn.{name}_proj.weight").shape[0] for name in "qk")
    head_dim = _tensor(tensors, "model.layers.0.self_attn.q_norm.weight").shape[0]
    config = block.Config(
        model.shape,
        reads=tuple(i - 1 for i in reads),  # theirs count the layers before, ours from 0
        length=size if from_anchor else size - 1,
        layers=layers,
        width=_tensor(tensors, "norm.weight").shape[0],
        heads=q // head_dim,
        kv_heads=k // head_dim,
        head_dim=head_dim,
        mlp_width=_tensor(tensors, "model.layers.0.mlp.gate_proj.weight").shape[0],
        markov_rank=tensors["markov_previous"].shape[1] if "markov_previous" in tensors else 0,
        own_head=True,
        partial_head="proposed" in tensors,
        hint=False,
        bidirectional=not sliding or bool(settings.get("sliding_window_non_causal")),
        from_anchor=from_anchor,
        window=window if sliding else 0,
        qwen3=True,
        rope_theta=_theta(layer),
    )
    return config, mask


_EAGLE = (
    *(
        Rule(rf"midlayer\.self_attn\.{letter}_proj\.weight", f"attention/{name}/kernel", transpose)
        for letter, name in {"q": "query", "k": "key", "v": "value", "o": "out"}.items()
    ),
    Rule(r"midlayer\.mlp\.(gate|up|down)_proj\.weight", "mlp/{0}/kernel", transpose),
    Rule(r"midlayer\.input_layernorm\.weight", "embed_norm/scale"),
    Rule(r"midlayer\.hidden_norm\.weight", "hidden_norm/scale"),
    Rule(r"midlayer\.post_attention_layernorm\.weight", "mlp_norm/scale"),
    Rule(r"norm\.weight", "norm/scale"),
    Rule(r"fc\.weight", "fuse/kernel", transpose),
    Rule(r"(head|proposed)", "{0}"),
    Rule(r"(t2d|d2t|embed_tokens\.weight|midlayer\.self_attn\.rotary_emb\..*)", None),
)
_EAGLE_LENGTH = 6  # of the chains that AngelSlim drafts: depth 5, and the first token


def angelslim_eagle3(opened: Source, model: Model, target: Path) -> Reading:
    """AngelSlim's EAGLE-3, in the vocabulary of CosyVoice 3's speech."""
    tensors, count = dict(opened.tensors), model.shape.layers
    settings = llama.checked(opened.config)
    _check_layer(settings, model)
    _check(f"rope_theta {model.shape.rope_theta}", _theta(settings), _theta(settings) == model.shape.rope_theta)
    row = _draft_rows(tensors, model, 0)
    tensors["head"] = _picked(tensors.pop("lm_head.weight"), row)
    if partial := _lacks(row, model):
        tensors["proposed"] = of_array("d2t", (row >= 0).astype(tensors["head"].dtype))
    reads = (1, count // 2 - 1, count - 4)  # before the third layer, that of the middle and the last but two
    config = eagle.Config(model.shape, reads, _EAGLE_LENGTH, own_head=True, partial_head=partial, bias=False)
    embed = tensors.get("embed_tokens.weight")
    return Reading("eagle", config, tensors, _EAGLE, {"table_0": embed} if embed else {})


READERS: dict[str, Callable[[Source, Model, Path], Reading]] = {
    "llasa-plus": llasa_plus,
    "speechspec": speechspec,
    "angelslim-eagle3": angelslim_eagle3,
}


def _tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"expected the tensor {name}, got none: give all files of the drafter")
    return tensors[name]


def _check(wanted: str, got: object, holds: bool) -> None:
    if not holds:
        raise ValueError(f"expected {wanted} in config.json, got {got!r}: give the drafter as it was published")


def _check_layer(settings: Mapping[str, Any], model: Model) -> None:
    eps, act = settings.get("rms_norm_eps", 1e-6), settings.get("hidden_act", "silu")
    _check(f"rms_norm_eps {model.shape.norm_eps} and hidden_act silu", (eps, act), (eps, act) == (model.shape.norm_eps, "silu"))


def _theta(settings: Mapping[str, Any]) -> float:
    """The base of rotary positions; transformers leaves its default out of the files."""
    theta, scaling = llama.rope({"rope_theta": 10_000.0, **settings})
    _check("rotary positions without scaling", scaling, scaling is None)
    return theta


def _draft_rows(tensors: Mapping[str, Tensor], model: Model, first: int) -> np.ndarray:
    """The row of the drafter's head that scores each of the target's ids: int [V], -1 for none.

    Args:
        tensors: lm_head.weight, and d2t where the head has some ids only: row i scores id i + d2t[i].
        model: the target.
        first: the drafter's id of the target's id 0.
    """
    count = _tensor(tensors, "lm_head.weight").shape[0]
    offset = tensors["d2t"].all() if "d2t" in tensors else np.zeros(count, np.int64)
    _check("a d2t for each row of lm_head.weight", offset.shape, offset.shape == (count,))
    ids = np.arange(count) + offset - first
    inside = (ids >= 0) & (ids < model.shape.vocab - model.shape.padding)
    _check("a draft vocabulary with ids of the target", f"none of {count}", bool(inside.any()))
    row = np.full(model.shape.vocab, -1)
    row[ids[inside]] = np.flatnonzero(inside)
    return row


def _lacks(row: np.ndarray, model: Model) -> bool:
    return bool((row[: model.shape.vocab - model.shape.padding] < 0).any())


def _picked(tensor: Tensor, row: np.ndarray) -> Tensor:
    """Some rows of a tensor; zeros for -1."""

    def read(start: int, stop: int) -> np.ndarray:
        chosen = row[start:stop]
        values = tensor.all()[chosen]
        values[chosen < 0] = 0
        return values

    return tensor._replace(shape=(len(row), *tensor.shape[1:]), read=read)


def _layers(tensors: Mapping[str, Tensor], pattern: str, first: int = 0) -> tuple[dict[str, Tensor], int]:
    """Renames tensors as transformers names those of a model's layers.

    Args:
        tensors: by name.
        pattern: of the layers' names, with a group for the number of the layer and one for what follows.
        first: the number of the first layer.

    Returns:
        All tensors, and how many layers there are.
    """
    matches = {name: re.fullmatch(pattern, name) for name in tensors}
    layers = {int(match[1]) for match in matches.values() if match}
    names = {name: f"model.layers.{int(match[1]) - first}.{match[2]}" if match else name for name, match in matches.items()}
    return {names[name]: tensor for name, tensor in tensors.items()}, len(layers)
