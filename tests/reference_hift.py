"""The vocoders of CosyVoice 2 and 3 in PyTorch, loaded without the rest of their packages, with random weights."""

import contextlib
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


@functools.cache
def made(causal, tiny=True):
    """A vocoder whose every parameter matters, whose pitch goes from 0 to some 400 Hz and whose wave is seldom clipped."""
    torch.manual_seed(0)
    sizes, f0_width = (TINY, 16) if tiny else (TRUE, 512)
    if causal:
        module = cosyvoice3()
        predictor = module.CausalConvRNNF0Predictor(1, sizes["in_channels"], f0_width)
        real = torch.rand
        # Without the five minutes of noise, which the tests give.
        with mock.patch.object(torch, "rand", lambda *shape: real(shape) if max(shape) < 99 else torch.zeros(1).expand(shape)):
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
        predictor.classifier.weight.mul_(600 * f0_width**-0.5)
        predictor.classifier.bias.fill_(120)
        model.m_source.l_linear.weight.mul_(5)
        model.conv_post.bias.sub_(1.5)
    return model.eval()


@contextlib.contextmanager
def noise_of(model, noise):
    """Makes the source's noise [N 9] what is given; None is none."""
    generator, zeros = model.m_source.l_sin_gen, torch.zeros(1).expand(1, 10**6, 9)
    given = zeros if noise is None else torch.tensor(np.array(noise))[None]
    if hasattr(generator, "sine_waves"):
        with mock.patch.object(generator, "sine_waves", given), torch.inference_mode():
            yield
    else:
        with mock.patch.object(torch, "randn_like", lambda x: given[:, : x.shape[1], : x.shape[2]]), torch.inference_mode():
            yield


@contextlib.contextmanager
def in_float64(model):
    """Makes the sines in float64: in float32 they are off by a tenth of their size after thirty seconds."""
    generator = model.m_source.l_sin_gen
    forward, harmonics = generator.forward, torch.arange(1, 10, dtype=torch.float64)[None, None]

    def exact(f0, *rest, **options):
        sines, *others = forward(f0.double(), *rest, **options)
        return sines.float(), *others

    with (
        mock.patch.object(generator, "forward", exact),
        mock.patch.dict(generator._buffers, harmonic_ids=harmonics),  # patch.object would leave the model without its own
    ):
        yield


def outputs(model, mel, noise=None):
    """The wave [N], source [N] and pitch [T] of mel [T bins], the sines in float64."""
    feat = torch.tensor(np.array(mel)).T[None]
    with noise_of(model, noise), in_float64(model):
        speech, source = model.inference(feat)[:2]
        return speech[0].numpy(), source[0, 0].numpy(), model.f0_predictor(feat)[0].numpy()


def streamed(model, mel, pieces):
    """The wave of mel [T bins] in pieces of these numbers of frames, as CosyVoice2Model.token2wav joins them."""
    _, _, common = cosyvoice2()
    frames, samples = 8, 8 * 480
    feat, out, cache, place = torch.tensor(np.array(mel)).T[None], [], None, 0
    with noise_of(model, None), in_float64(model):
        for i, count in enumerate(pieces):
            new = feat[:, :, place : place + count]
            place += count
            new = new if cache is None else torch.concat([cache[0], new], dim=2)
            speech, source = model.inference(new, torch.zeros(1, 1, 0) if cache is None else cache[1])
            if cache is not None:
                speech = common.fade_in_out(speech, cache[2], torch.tensor(np.hamming(2 * samples)))
            cache = new[:, :, -frames:], source[:, :, -samples:], speech[:, -samples:]
            out.append(speech if i == len(pieces) - 1 else speech[:, :-samples])
    return torch.concat(out, dim=1)[0].numpy()
