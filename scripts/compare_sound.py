"""Times flow and vocoder of CosyVoice beside PyTorch: python scripts/compare_sound.py [--seconds 4] [--repeats 3] [--out FILE].

Both have the true size and the same random weights, and run in turns in one process on the CPU. It needs the packages of
tests/reference-packages.txt.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

import jaxspec
from jaxspec.acoustic import flow, hift
from jaxspec.common.files import write_json
from jaxspec.convert import flow as flow_rules
from jaxspec.convert import hift as hift_rules

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import checkpoints
import reference_flow
import reference_hift

FLOWS = {
    2: lambda: reference_flow.version2(256, 8, 12, 4, 512, (6, 4), 6561),
    3: lambda: reference_flow.version3(1024, 22, 1024, 6561),
}


def params_of(model: Any, table: Any, abstract_params: Callable[[Any], Any]) -> tuple[Any, Any]:
    """The configuration and the parameters of a PyTorch model, by its table of rules."""
    tensors = checkpoints.folded({name: value.numpy() for name, value in model.state_dict().items()})
    config, rules = table.config({name: tensor.shape for name, tensor in tensors.items()})
    return config, jax.device_put(checkpoints.planned(tensors, rules, abstract_params(config)))


def stages(version: int, codes: int) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Ours and PyTorch's, by stage: functions that make ``codes`` codes or twice as many mel frames into the next thing."""
    draw = np.random.default_rng(0)
    ids, none = draw.integers(0, 6561, (1, codes), np.int32), np.zeros(1, np.int32)
    speaker, empty = draw.standard_normal((1, 192), np.float32), np.zeros((1, 0, 80), np.float32)
    model = FLOWS[version]()
    config, params = params_of(model, flow_rules, flow.abstract_params)
    given = jax.device_put((ids, np.array([codes], np.int32), none, empty, speaker))

    def ours_mel() -> Any:
        return jax.block_until_ready(flow.flow(config).mel(params, *given, streaming=False, finalize=True))

    def their_mel() -> Any:
        return reference_flow.mel(model, ids[0].astype(np.int64), 0, empty[0], speaker[0], False, True)

    mel = np.asarray(ours_mel())
    vocoder = reference_hift.made(version == 3, tiny=False)
    shape, weights = params_of(vocoder, hift_rules, hift.abstract_params)
    frames, key = np.array([2 * codes], np.int32), jax.random.split(jax.random.key(0), 1)
    spectrum = jax.device_put((mel, frames, key))

    def ours_wave() -> Any:
        return jax.block_until_ready(hift.vocoder(shape).wave(weights, *spectrum))

    def their_wave() -> Any:
        with torch.inference_mode():
            return vocoder.inference(torch.tensor(mel).mT)

    return {"flow": (ours_mel, their_mel), "vocoder": (ours_wave, their_wave)}


def timed(function: Callable[[], Any]) -> float:
    """The seconds of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    """Times both versions and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for version in (2, 3):
        for name, (ours, theirs) in stages(version, round(25 * arguments.seconds)).items():
            compile_s, _ = timed(ours), timed(theirs)
            pairs = [(timed(ours), timed(theirs)) for _ in range(arguments.repeats)]
            ratios = [mine / other for mine, other in pairs]
            row = {"model": f"cosyvoice{version}", "stage": name, "first_call_s": compile_s}
            row |= {"ratios": ratios, "ratio": statistics.median(ratios)}
            rows.append(row)
            print(
                f"cosyvoice{version} {name}: {row['ratio']:.2f} of PyTorch's time ({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )
    if arguments.out:
        versions = {"jaxspec": jaxspec.__version__, "jax": jax.__version__, "torch": torch.__version__}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out, {"seconds": arguments.seconds, "threads": torch.get_num_threads(), **versions, "rows": rows})


if __name__ == "__main__":
    main()
