"""The TPU chips that ``jaxspec plan`` compiles for, and devices of chips that are not attached.

Bandwidths and bf16 peak are those of docs.cloud.google.com/tpu/docs (pages v4, v5e, v5p, v6e, tpu7x, read in 2026). Memory is
what the compiler (libtpu 0.0.42) lets a program use, of 32, 16, 95, 32 and 192 GiB; its error for a program that is too large has
it. Clocks are published for v4 (Jouppi et al. 2023, arXiv 2304.01433), v5e and v5p (jax-ml.github.io/scaling-book, chapter 2)
only.
"""

import importlib.util
import os
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

_GIB = 2**30
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at a time
    "TPU_SKIP_MDS_QUERY": "1",  # otherwise libtpu queries the cloud's metadata server,
    "TPU_WORKER_HOSTNAMES": "localhost",  # and logs errors where there is none
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


class Chip(NamedTuple):
    """One chip, all its cores together.

    Attributes:
        memory_bytes: that programs may use.
        bytes_per_s: of HBM.
        bf16_per_s: peak operations per second.
        smallest: the smallest topology.
        devices: how many JAX devices it has; each has its share of memory, bandwidth and peak.
        clock_hz: None where it is not published.
        options: of the topology; megacore makes the two cores of a v4 one device.
        link_bytes_per_s: one way, of one of the four links to other chips (six of a v4, v5p and tpu7x).
    """

    memory_bytes: int
    bytes_per_s: float
    bf16_per_s: float
    smallest: str
    devices: int = 1
    clock_hz: float | None = None
    options: Mapping[str, Any] = MappingProxyType({})
    link_bytes_per_s: float = 50e9

    def device(self) -> "Chip":
        """One of its JAX devices."""
        share = 1 / self.devices
        return self._replace(
            memory_bytes=int(self.memory_bytes * share),
            bytes_per_s=self.bytes_per_s * share,
            bf16_per_s=self.bf16_per_s * share,
            devices=1,
        )


CHIPS = {
    "v4": Chip(int(30.75 * _GIB), 1200e9, 275e12, "v4:2x2x1", clock_hz=1.05e9, options={"chip_config_name": "megacore"}),
    "v5e": Chip(int(15.75 * _GIB), 819e9, 197e12, "v5e:2x2", clock_hz=1.5e9),
    "v5p": Chip(int(95.74 * _GIB), 2765e9, 459e12, "v5p:2x2x1", clock_hz=1.75e9, link_bytes_per_s=100e9),
    "v6e": Chip(int(31.25 * _GIB), 1638e9, 918e12, "v6e:2x2", link_bytes_per_s=100e9),
    "tpu7x": Chip(int(2 * 94.75 * _GIB), 7380e9, 2307e12, "tpu7x:2x2x1", devices=2, link_bytes_per_s=100e9),
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology.

    Args:
        topology: such as v5e:2x2.

    Raises:
        ValueError: there is no such chip, or the layout cannot be parsed.
    """
    name, _, layout = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"[1-9]\d?(x[1-9]\d?){1,2}", layout):
        known = ", ".join(chip.smallest for chip in CHIPS.values())
        raise ValueError(
            f"expected a topology such as {known}, or a larger layout of the same chips, got {topology!r}: choose one"
        )
    return CHIPS[name]


def devices(topology: str) -> list[Any]:
    """The devices of a topology, to compile for only.

    Args:
        topology: such as v5e:2x2.

    Returns:
        Each a ``jax.Device``.

    Raises:
        ValueError: the chips are not built in that layout.
        ImportError: libtpu, which holds the compiler, is not installed.
    """
    chip = chip_of(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("expected the TPU's compiler, the package libtpu, got none: pip install 'jaxspec[tpu-aot]'")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **chip.options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"expected a layout such as {chip.smallest}, got {topology!r}: {error}") from error
