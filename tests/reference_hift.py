"""The vocoders of CosyVoice 2 and 3 in PyTorch, loaded without the rest of their packages, with random weights."""

import functools
import importlib
import importlib.util
import sys
import types
from unittest import mock

import numpy as np
import pytest
import torch

TINY = {"in_channels": 6, "base_channels": 16}
TRUE = {"in_channels": 80, "base_channels": 512}
_SHAPE = {
    "sampling_rate": 24_000,
    "upsample_rates": [8, 5, 3],
    "upsample_kernel_sizes": [16, 11, 7],
    "source_resblock_kernel_sizes": [7, 7, 11],
    "source_resblock_dilation_sizes": [[1, 3, 5]] * 3,
}
_VLLM = "vllm_omni.model_executor.models"
_CORE = f"{_VLLM}.cosyvoice3.code2wav_core"


def _package(name, folder):
    module = types.ModuleType(name)
    module.__path__ = [folder]
    return module


def _modules(how, packages, stubs, names):
    """Modules of a distribution, or a skip. Nothing of it, nor of the stubs, stays in ``sys.modules``."""
    if (found := importlib.util.find_spec(packages[0])) is None:
        pytest.skip(f"{packages[0]} not installed: {how}")
    (root,) = found.submodule_search_locations
    sys.modules.update(stubs, **{name: _package(name, "/".join([root, *name.split(".")[1:]])) for name in packages})
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        gone = {packages[0], *(name.split(".")[0] for name in stubs)}
        for name in [name for name in sys.modules if name.split(".")[0] in gone]:
            del sys.modules[name]


@functools.cache
def cosyvoice2():
    """The modules of the vocoder, of its predictor of pitch, and of the cross-fade."""
    packages = ["cosyvoice", *(f"cosyvoice.{name}" for name in ("hifigan", "transformer", "utils"))]
    names = ["cosyvoice.hifigan.generator", "cosyvoice.hifigan.f0_predictor", "cosyvoice.utils.common"]
    return _modules("pip install --no-deps cosyvoice2-eu==0.2.8", packages, {}, names)


@functools.cache
def cosyvoice3():
    """The module of the vocoder."""
    packages = ["vllm_omni", "vllm_omni.model_executor", _VLLM, f"{_VLLM}.common", f"{_VLLM}.cosyvoice3", _CORE]
    logger = types.ModuleType("vllm.logger")
    logger.init_logger = lambda name: None
    stubs = {"vllm": types.ModuleType("vllm"), "vllm.logger": logger}
    (module,) = _modules("pip install --no-deps vllm-omni==0.30.0", packages, stubs, [f"{_CORE}.hifigan"])
    return module


def made(causal, sizes, f0_width):
    """A vocoder whose every parameter matters, whose pitch goes from 0 to some 400 Hz and whose wave is seldom clipped."""
    torch.manual_seed(0)
    if causal:
        module = cosyvoice3()
        predictor = module.CausalConvRNNF0Predictor(1, sizes["in_channels"], f0_width)
        with mock.patch.object(torch, "rand", lambda *shape: torch.zeros(1).expand(shape).clone() if shape[1] < 99 else None):
            model = module.CausalHiFTGenerator(**_SHAPE, **sizes, f0_predictor=predictor)
    else:
        generator, pitch, _ = cosyvoice2()
        predictor = pitch.ConvRNNF0Predictor(1, sizes["in_channels"], f0_width)
        model = generator.HiFTGenerator(**_SHAPE, **sizes, f0_predictor=predictor)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("alpha"):
                value.uniform_(0.3, 3)
            elif name.endswith("bias"):
                value.normal_(0, 0.2)
            elif name.endswith("original0"):
                value.uniform_(0.5, 1.5)
                value.mul_(0.4 if "resblocks" in name else 1)
            else:
                value.normal_(0, max(value[0].numel(), 1) ** -0.5)
        predictor.classifier.weight.mul_(150 * f0_width**-0.5)
        predictor.classifier.bias.fill_(120)
        model.m_source.l_linear.weight.mul_(5)
        model.conv_post.bias.sub_(1.5)
    return model.eval()


def wave(model, mel, noise):
    """The wave, source and pitch of mel [B T bins] with the source's noise [N harmonics] given; None for none."""
    causal = not hasattr(model.m_source, "l_sin_gen") or getattr(model.m_source, "causal", False)
    generator = model.m_source.l_sin_gen
    given = torch.tensor(np.zeros((1, 480 * mel.shape[1], 9), np.float32) if noise is None else np.asarray(noise)[None])
    feat = torch.tensor(np.asarray(mel)).mT
    with torch.inference_mode():
        if causal:
            model.m_source.uv = given[:, :, :1]
            generator.sine_waves = given
            speech, source, _ = model.inference(feat)
        else:
            with mock.patch.object(torch, "randn_like", lambda x: given[:, : x.shape[1], : x.shape[2]]):
                speech, source = model.inference(feat)
        return speech.numpy(), source[:, 0].numpy(), model.f0_predictor(feat).numpy()
