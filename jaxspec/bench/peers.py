"""Times transformers on the same weights in the same run: plain generation, static cache with torch.compile, assisted generation.

Imports torch when it is called. Of the other files of the library only ``evaluate.naturalness`` does.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxspec import speculate
from jaxspec.bench.cases import Case, Models
from jaxspec.models import int8
from jaxspec.models.transformer import Config
from jaxspec.sampling import Sampling
from jaxspec.synthesis.contract import Requests
from jaxspec.types import Params

_KERNELS = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}


def time_transformers(
    models: Models, batch: int, prompt: int, draft_length: int, repeats: int, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Tokens per second of decoding with transformers and with jaxspec, in interleaved repeats, without synthetic acceptance.

    Args:
        models: random weights that transformers has a class for; assisted generation needs a draft that is a transformer.
        batch: rows.
        prompt: tokens of each prompt.
        draft_length: K, of both.
        repeats: timed repeats, after one that compiles.
        progress: receives a line for each repeat.

    Returns:
        A dict for each method of transformers: its name, what of jaxspec it is compared with, both rates, and their ratio.

    Raises:
        ImportError: torch or transformers is missing.
        ValueError: transformers has no class for the weights.
    """
    models = dataclasses.replace(models, acceptance=None)
    case = Case("exact", draft_length, batch, prompt)
    theirs, failed = _theirs(models, batch, draft_length), dict[str, str]()
    ours = {"autoregressive": _autoregressive(models), "exact": _speculative(models, draft_length)}
    times: dict[str, list[float]] = {name: [] for name in (*ours, *theirs)}
    for repeat in range(repeats + 1):
        asked = models.requests(case, repeat)
        for name, generate in (ours | theirs).items():
            try:
                rate = _rate(generate, asked)
            except Exception as error:  # torch.compile does not work everywhere
                if name in ours or repeat:
                    raise
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
                continue
            if repeat:
                times[name].append(rate)
        theirs = {name: generate for name, generate in theirs.items() if name not in failed}
        progress(f"peers: repeat {repeat} of {repeats}" if repeat else "peers: warmed up")
    for name, why in failed.items():
        progress(f"peers: {name} was not run ({why})")
    rates = {name: statistics.median(some) for name, some in times.items() if some}
    against = {name: "exact" if "assisted" in name else "autoregressive" for name in theirs}
    return [
        {
            "name": name,
            "batch": batch,
            "codes_per_s": rates[name],
            "against": against[name],
            "ours": rates[against[name]],
            "ratio": rates[against[name]] / rates[name],
        }
        for name in theirs
    ]


def _rate(generate: Callable[[Requests, int], int], asked: Requests) -> float:
    """Tokens per second of decoding, without the first one, whose time is mostly the prefill's."""
    start = time.perf_counter()
    first = generate(asked, 1)
    middle = time.perf_counter()
    count = generate(asked, asked.max_new_tokens)
    return (count - first) / max(time.perf_counter() - middle - (middle - start), 1e-9)


def _autoregressive(models: Models) -> Callable[[Requests, int], int]:
    def generate(asked: Requests, count: int) -> int:
        fields = asked._replace(limit=np.full_like(asked.limit, count))._asdict()
        return int(speculate.autoregressive(jax.random.key(0), models.lm(), models.target_params, **fields).length.sum())

    return generate


def _speculative(models: Models, draft_length: int) -> Callable[[Requests, int], int]:
    name, draft = next(iter(models.drafts.items()))
    arguments = models.lm(name), models.target_params, draft.drafter.make(draft_length), draft.drafter.params
    verify = models.verifier("exact")

    def generate(asked: Requests, count: int) -> int:
        fields = asked._replace(limit=np.full_like(asked.limit, count))._asdict()
        return int(speculate.generate(jax.random.key(0), *arguments, verify, **fields).length.sum())

    return generate


def _theirs(models: Models, batch: int, draft_length: int) -> dict[str, Callable[[Requests, int], int]]:
    """The methods of transformers by name."""
    import torch

    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    target = _torch_model(models.target, models.target_params, device)

    def method(**options: Any) -> Callable[[Requests, int], int]:
        def generate(asked: Requests, count: int) -> int:
            prompt = torch.tensor(asked.prompt, dtype=torch.long, device=device)
            one = asked.sampling if isinstance(asked.sampling, Sampling) else asked.sampling[0]
            sampling = {"do_sample": True, "temperature": one.temperature, "top_p": one.top_p, "top_k": 0}
            lengths = {"max_new_tokens": count, "min_new_tokens": count}
            with torch.no_grad():
                made = target.generate(prompt, attention_mask=torch.ones_like(prompt), **lengths, **sampling, **options)
            if device == "cuda":
                torch.cuda.synchronize()
            return made.shape[0] * (made.shape[1] - prompt.shape[1])

        return generate

    methods = {
        "transformers generate": method(),
        "transformers generate, static cache, torch.compile": method(cache_implementation="static"),
    }
    first = next(iter(models.drafts.values()))
    if batch == 1 and first.shape is not None:
        draft = _torch_model(first.shape, first.drafter.params, device)
        draft.generation_config.num_assistant_tokens = draft_length
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        methods["transformers assisted generation"] = method(assistant_model=draft)
    return methods


def _torch_model(config: Config, params: Params, device: str) -> Any:
    """The same weights in the class of transformers."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(
            f"expected torch and transformers for --peer, got no {error.name}: pip install torch transformers"
        ) from error
    if config.head_bias or config.qk_norm or config.rope_scaling:
        raise ValueError(
            "expected weights without head bias, query norm or scaled rope for --peer, got some with: use --preset small"
        )
    kind: Any
    settings: Any
    kind, settings = (
        (transformers.Qwen2ForCausalLM, transformers.Qwen2Config)
        if config.qkv_bias
        else (transformers.LlamaForCausalLM, transformers.LlamaConfig)
    )
    shape = settings(
        vocab_size=config.vocab,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_theta": config.rope_theta, "rope_type": "default"},
        tie_word_embeddings=config.tied,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device("meta"):
        model = kind(shape)
    model = model.to_empty(device=device).to(getattr(torch, config.dtype)).eval()
    state = _state(config, int8.dequantize(params))
    state = {name: torch.tensor(np.asarray(value, np.float32)) for name, value in state.items()}
    model.load_state_dict(state, strict=not config.tied)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(shape).to(device)  # its buffers are not in the state dict
    return model


def _state(config: Config, params: Params) -> Mapping[str, Any]:
    state = {"model.embed_tokens.weight": params["table_0"], "model.norm.weight": params["norm"]["scale"]}
    if not config.tied:
        state["lm_head.weight"] = params["head"]
    for i in range(config.layers):
        layer, name = params[f"layer_{i}"], f"model.layers.{i}"
        for ours, theirs in _KERNELS.items():
            part, leaf = ours.split("/")
            state[f"{name}.{theirs}.weight"] = np.asarray(layer[part][leaf]["kernel"]).T
            if "bias" in layer[part][leaf]:
                state[f"{name}.{theirs}.bias"] = layer[part][leaf]["bias"]
        state[f"{name}.input_layernorm.weight"] = layer["attention_norm"]["scale"]
        state[f"{name}.post_attention_layernorm.weight"] = layer["mlp_norm"]["scale"]
    return state
