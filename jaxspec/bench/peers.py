"""transformers on the same weights, in the same run: plain generation, static cache with torch.compile, and assisted generation.

The one file of the library that imports torch, and only when it is asked to.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxspec import speculate
from jaxspec.bench.measure import Case, Models
from jaxspec.models.transformer import Config
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
    models: Models, batch: int, prompt: int, draft_length: int, turns: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Codes a second of transformers and of jaxspec, decoding alone, taking turns; acceptance is that of the weights themselves.

    Returns:
        A dict for each of transformers' ways: its name, what of jaxspec it is held against, both rates, and their ratio.

    Raises:
        ImportError: torch or transformers is missing.
        ValueError: weights that transformers has no class for.
    """
    models = dataclasses.replace(models, acceptance=None)
    case = Case("exact", draft_length, batch, prompt)
    theirs, failed = _theirs(models, batch, draft_length)
    ours = {"autoregressive": _autoregressive(models), "exact": _speculative(models, draft_length)}
    times: dict[str, list[float]] = {name: [] for name in (*ours, *theirs)}
    for turn in range(turns + 1):
        asked = models.ask(case, turn)
        for name, generate in (ours | theirs).items():
            try:
                rate = _rate(generate, asked)
            except Exception as error:  # of torch.compile, which does not work everywhere
                if name in ours or turn:
                    raise
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
                continue
            if turn:
                times[name].append(rate)
        theirs = {name: generate for name, generate in theirs.items() if name not in failed}
        say(f"peers: turn {turn} of {turns}" if turn else "peers: warmed up")
    for name, why in failed.items():
        say(f"peers: {name} was not run ({why})")
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
    """Codes a second of decoding: all of them less the first, whose time is mostly the prefill's."""
    start = time.perf_counter()
    first = generate(asked, 1)
    middle = time.perf_counter()
    count = generate(asked, asked.max_new_tokens)
    return (count - first) / max(time.perf_counter() - middle - (middle - start), 1e-9)


def _autoregressive(models: Models) -> Callable[[Requests, int], int]:
    def generate(asked: Requests, count: int) -> int:
        fields = asked._replace(limit=np.full_like(asked.limit, count))._asdict()
        prompt, length = fields.pop("prompt"), fields.pop("prompt_length")
        made = speculate.autoregressive(jax.random.key(0), models.lm(), models.target_params, prompt, length, **fields)
        return int(made.length.sum())

    return generate


def _speculative(models: Models, draft_length: int) -> Callable[[Requests, int], int]:
    def generate(asked: Requests, count: int) -> int:
        fields = asked._replace(limit=np.full_like(asked.limit, count))._asdict()
        prompt, length = fields.pop("prompt"), fields.pop("prompt_length")
        draft, rule = models.drafter(draft_length), models.rule("exact")
        arguments = (models.lm(), models.target_params, draft, models.draft_params, rule, prompt, length)
        return int(speculate.generate(jax.random.key(0), *arguments, **fields).length.sum())

    return generate


def _theirs(models: Models, batch: int, draft_length: int) -> tuple[dict[str, Callable[[Requests, int], int]], dict[str, str]]:
    """transformers' ways to generate, by name, and those that failed."""
    import torch

    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    target, draft = (
        _torch_model(*pair, device) for pair in ((models.target, models.target_params), (models.draft, models.draft_params))
    )
    draft.generation_config.num_assistant_tokens = draft_length
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0

    def way(**more: Any) -> Callable[[Requests, int], int]:
        def generate(asked: Requests, count: int) -> int:
            prompt = torch.tensor(asked.prompt, dtype=torch.long, device=device)
            law = {"do_sample": True, "temperature": asked.sampling.temperature, "top_p": asked.sampling.top_p, "top_k": 0}
            with torch.no_grad():
                made = target.generate(
                    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, min_new_tokens=count, **law, **more
                )
            if device == "cuda":
                torch.cuda.synchronize()
            return made.shape[0] * (made.shape[1] - prompt.shape[1])

        return generate

    ways = {
        "transformers generate": way(),
        "transformers generate, static cache, torch.compile": way(cache_implementation="static"),
    }
    if batch == 1:
        ways["transformers assisted generation"] = way(assistant_model=draft)
    return ways, {}


def _torch_model(config: Config, params: Params, device: str) -> Any:
    """The same weights in transformers' class."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(f"the peer transformers needs {error.name}: pip install torch transformers") from error
    if config.head_bias or config.qk_norm or config.rope_scaling:
        raise ValueError(
            "expected weights without head bias, query norm or scaled rope for the peer, got others: use preset small"
        )
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
    state = {name: torch.tensor(np.asarray(value, np.float32)) for name, value in _state(config, params).items()}
    model.load_state_dict(state, strict=not config.tied)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(shape).to(device)  # its buffers are no weights, and are empty yet
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
