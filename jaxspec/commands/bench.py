"""The command `bench`: times of the speculative loop and its parts."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import jax

from jaxspec.bench import presets
from jaxspec.bench.settings import Settings
from jaxspec.commands.mesh import OnMesh
from jaxspec.common import hosts
from jaxspec.models.transformer import Config


@dataclasses.dataclass(frozen=True)
class Bench(OnMesh, Settings):
    """Times the speculative loop and its parts against the autoregressive loop, and compares them with the device's roofline."""

    out_dir: Path | None = None
    """A folder for bench.json, bench.md and bench.png."""
    trace: Path | None = None
    """A folder for a profile of the whole run, for xprof or Perfetto."""
    json: bool = False
    """Print the result as JSON on standard output, and the table on standard error."""

    def divided(self) -> str | Config:
        """See ``OnMesh``."""
        if self.preset not in presets.PAIRS:
            return self.preset
        return presets.pair(self.preset, min(self.dtypes), self.weights).target

    def run(self) -> None:
        """Runs the benchmark, with its progress on standard error.

        Raises:
            ValueError: a setting is out of its range, or a batch does not fit in the device's memory.
        """
        from jaxspec.bench import report, suite

        with jax.profiler.trace(str(self.trace)) if self.trace else contextlib.nullcontext():
            result = suite.bench(self, lambda line: print(line, file=sys.stderr, flush=True))
        if self.out_dir and hosts.is_first():
            report.save(self.out_dir, result)
        report.show(result, sys.stderr if self.json else sys.stdout)
        if self.json:
            print(json.dumps(result))
