"""The command `plan`: programs compiled for a TPU that is not there."""

import dataclasses
import json
from typing import Literal

import jax

from jaxspec.synthesis.contract import Settings


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compiles the prefill and the loop for a TPU, without one: memory, operations, time, and checks of the program."""

    model: str
    """A shape that is benchmarked (small, llasa-1b, llasa-8b, cosyvoice2), or a folder that `jaxspec convert` made."""
    topology: str
    """Chips and their layout, such as v4:2x2x1, v5e:2x2, v5p:2x2x1, v6e:2x2 or tpu7x:2x2x1; one of them is planned for."""
    draft: str | None = None
    """A folder, or how many of the target's layers; by default the draft that is benchmarked with MODEL."""
    batch: int = 1
    """Rows."""
    cells: int = 2048
    """Of each row's caches: prompt, emitted tokens, and one more than are drafted."""
    prompt_length: int = 256
    """The longest prompt."""
    draft_length: int = Settings.draft_length
    """Codes that are drafted in a round."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of parameters and caches."""
    json: bool = False
    """Print one JSON object as the last line."""

    def run(self) -> None:
        """Compiles."""
        jax.config.update("jax_platforms", "cpu")  # nothing is computed: leave the accelerator, if there is one, alone
        jax.config.update("jax_enable_compilation_cache", False)  # it cannot read what was compiled for another machine
        from jaxspec.bench import plan

        result = plan.plan(plan.Settings(**{name: value for name, value in vars(self).items() if name != "json"}))
        print(plan.card(result))
        if self.json:
            print(json.dumps(result))
