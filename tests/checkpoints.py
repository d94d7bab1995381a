"""Checkpoints in the layouts of the published files: PyTorch's reference classes with random weights."""

import functools
import json

import safetensors.torch
import tokenizers
import torch
import transformers

from jaxspec.models.cosyvoice import V2, V3

CODES = 96  # of the families whose tokenizer says how many there are
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_theta": 500_000.0,
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TEXTS = ["Convert the text to speech:", "The rain has stopped, so we can go.", "user assistant system 12 30", "你好，世界。"]
LLAMA_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLASA_TOKENS = [
    f"<|{what}_{how}_{end}|>"
    for what, how in (("TEXT", "GENERATION"), ("TEXT", "UNDERSTANDING"), ("SPEECH", "GENERATION"), ("SPEECH", "UNDERSTANDING"))
    for end in ("START", "END")
]
NEUTTS_TOKENS = (
    "<|TEXT_REPLACE|> <|TEXT_PROMPT_START|> <|TEXT_PROMPT_END|> <|SPEECH_REPLACE|> <|SPEECH_GENERATION_START|> "
    "<|SPEECH_GENERATION_END|>"
).split()


@functools.cache
def _trained():
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(TEXTS, vocab_size=300, min_frequency=1, show_progress=False)
    return made


def tokenizer(folder, *added):
    """Writes a small tokenizer with these tokens after its own."""
    made = tokenizers.Tokenizer.from_str(_trained().to_str())
    made.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in added])
    made.save(str(folder / "tokenizer.json"))
    return made


def random_model(kind, config, seed=0):
    """A model of transformers whose every weight matters."""
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                value += 0.1 * torch.randn_like(value)
    return model


def llama(vocab, **changes):
    settings = {**SIZES, "vocab_size": vocab, "rope_parameters": LLAMA3, "tie_word_embeddings": True, **changes}
    return random_model(transformers.LlamaForCausalLM, transformers.LlamaConfig(**settings))


def qwen2(vocab, **changes):
    settings = {**SIZES, "vocab_size": vocab, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, **changes}
    return random_model(transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**settings))


def llasa(folder, dtype=torch.float32, shard="10GB", **changes):
    """LLaSA as transformers writes it; returns the model."""
    made = tokenizer(folder, *LLAMA_TOKENS, *LLASA_TOKENS, *(f"<|s_{i}|>" for i in range(CODES)))
    model = llama(made.get_vocab_size(), **changes).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def neutts(folder):
    """NeuTTS-Air; returns the model."""
    made = tokenizer(folder, *NEUTTS_TOKENS, *(f"<|speech_{i}|>" for i in range(CODES)))
    model = qwen2(made.get_vocab_size(), tie_word_embeddings=True)
    model.save_pretrained(folder)
    return model


def orpheus(folder):
    """Orpheus; returns the model."""
    made = tokenizer(folder, *LLAMA_TOKENS, *(f"<custom_token_{i}>" for i in range(10 + 7 * 16)))
    model = llama(made.get_vocab_size())
    model.save_pretrained(folder)
    return model


def cosyvoice(folder, version):
    """``llm.pt`` and its backbone's folder; returns the state dict."""
    backbone = folder / "CosyVoice-BlankEN"
    backbone.mkdir()
    _trained().save_model(str(backbone))
    model = qwen2(700, tie_word_embeddings=True)
    (backbone / "config.json").write_text(json.dumps(model.config.to_dict() | {"architectures": ["Qwen2ForCausalLM"]}))
    torch.manual_seed(1)
    state = {f"llm.model.{name}": value for name, value in model.state_dict().items()}
    state["speech_embedding.weight"] = 0.1 * torch.randn(version.rows, SIZES["hidden_size"])
    state["llm_decoder.weight"] = 0.2 * torch.randn(version.rows, SIZES["hidden_size"])
    if version is V2:
        state["llm_embedding.weight"] = 0.1 * torch.randn(2, SIZES["hidden_size"])
        state["llm_decoder.bias"] = 0.5 * torch.randn(version.rows)
    torch.save(state, folder / "llm.pt")
    return state


def merged_cosyvoice(folder, version, state, text, bias=True):
    """The same weights in one vocabulary, ``text`` being the tokenizer's own tokens; returns that of the first code."""
    codes = [f"<|s_{i}|>" for i in range(6561)]
    if version is V2:
        codes += ["<|eos1|>", "<|eos2|>", "<|eos3|>", "<|sos|>", "<|task_id|>"]
    else:
        codes += ["<|sos|>", "<|eos1|>", "<|task_id|>", "<|fill|>", *(f"<|s_{i}|>" for i in range(6565, V3.rows))]
    text.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in codes])
    text.save(str(folder / "tokenizer.json"))
    first = text.token_to_id("<|s_0|>")
    vocab = -(-text.get_vocab_size() // 128) * 128
    model = qwen2(vocab, tie_word_embeddings=False)
    merged = {name: state[f"llm.model.{name}"] for name in model.state_dict() if name.startswith("model.layers")}
    merged["model.norm.weight"] = state["llm.model.model.norm.weight"]
    embed, head = torch.zeros(vocab, SIZES["hidden_size"]), torch.zeros(vocab, SIZES["hidden_size"])
    embed[:first] = state["llm.model.model.embed_tokens.weight"][:first]
    embed[first : first + version.rows] = state["speech_embedding.weight"]
    head[first : first + version.rows] = state["llm_decoder.weight"]
    if version is V2:
        embed[first + version.rows : first + version.rows + 2] = state["llm_embedding.weight"]
    model.load_state_dict(merged | {"model.embed_tokens.weight": embed, "lm_head.weight": head})
    merged_state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    if version is V2 and bias:
        merged_state["lm_head.bias"] = torch.full((vocab,), -torch.inf)
        merged_state["lm_head.bias"][first : first + version.rows] = state["llm_decoder.bias"]
    model.config.save_pretrained(folder)
    safetensors.torch.save_file(merged_state, folder / "model.safetensors")
    return first
