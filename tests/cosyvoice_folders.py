"""CosyVoice 2 and 3 as they are published, random, small or of their true sizes: language model and codec in one folder."""

import functools

import checkpoints
import numpy as np
import reference_flow
import reference_hift
import reference_s3
import torch

from jaxspec.convert import pipeline

CODES = 6561
SPEAKERS = {"中文女": 1, "anna": 2}
SMALL = {"n_audio_state": 128, "n_audio_head": 2, "n_audio_layer": 2}
TRUE_LLM = {
    "vocab": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "initializer_range": 0.02,
    "max_position_embeddings": 32_768,
}
TRUE_FLOW = {
    2: {"width": 256, "heads": 8, "stages": 12, "blocks": 4, "encoder": 512, "encoder_layers": (6, 4)},
    3: {"width": 1024, "layers": 22, "hidden": 1024},
}


@functools.cache
def models(version, small=True):
    """Flow, vocoder, speech tokenizer and speaker encoder of the reference packages."""
    flow = (reference_flow.version2, reference_flow.version3)[version - 2](codes=CODES, **({} if small else TRUE_FLOW[version]))
    vocoder = reference_hift.made(version == 3, tiny=small, bins=80)
    return flow, vocoder, reference_s3.s3_model(version, **(SMALL if small else {})), reference_s3.campplus_model()


def make(folder, version, small=True):
    """Writes a checkpoint into a new folder."""
    folder.mkdir()
    checkpoints.MAKERS[f"cosyvoice{version}"](folder, **({} if small else TRUE_LLM))
    flow, vocoder, tokenizer, speaker = models(version, small)
    torch.save(flow.state_dict(), folder / "flow.pt")
    torch.save({f"generator.{name}": value for name, value in vocoder.state_dict().items()}, folder / "hift.pt")
    reference_s3.s3_onnx(folder / f"speech_tokenizer_v{version}.onnx", tokenizer, decomposed=version == 3)
    reference_s3.campplus_onnx(folder / "campplus.onnx", speaker)
    torch.save({name: {"embedding": embedding(seed)} for name, seed in SPEAKERS.items()}, folder / "spk2info.pt")
    return folder


def embedding(seed):
    """The embedding of a named speaker, [1 192]."""
    return torch.randn(1, 192, generator=torch.Generator().manual_seed(seed))


def converted(root, version, **options):
    """Makes the checkpoint within a folder and converts it, unless that was done; returns the path."""
    source = root / f"CosyVoice{version}"
    if not source.exists():
        make(source, version)
    dest = root / "-".join(["converted", str(version), *map(str, options)])
    if not dest.exists():
        pipeline.convert(str(source), dest, pipeline.Options(**options))
    return dest


def speech(seconds, rate, seed=0):
    """Something like speech: pulses at a changing pitch through noise-driven resonances, float32 [N] within -1 .. 1."""
    count = int(seconds * rate)
    time = np.arange(count) / rate
    pitch = 120 + 30 * np.sin(2 * np.pi * 0.7 * time)
    voiced = sum(np.sin(2 * np.pi * k * np.cumsum(pitch) / rate) / k for k in range(1, 12))
    noise = np.random.default_rng(seed).standard_normal(count)
    gate = (np.sin(2 * np.pi * 3 * time) > -0.4).astype(np.float64)
    return (0.1 * voiced * gate + 0.01 * noise).astype(np.float32)
