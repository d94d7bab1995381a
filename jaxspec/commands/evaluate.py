"""The command `evaluate`: quality and speed of the verifiers on the held-out sentences."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxspec.commands.mesh import OnMesh
from jaxspec.commands.outputs import check_writable, make_folder
from jaxspec.common import hosts
from jaxspec.evaluate import requirements
from jaxspec.evaluate.plan import Plan


@dataclasses.dataclass(frozen=True)
class Evaluate(OnMesh, Plan):
    """Compares the verifiers on the held-out sentences: word error rate, speaker similarity, naturalness, acceptance and speedup.

    Needs flite (apt-get install flite) and the extra eval (pip install 'jaxspec[eval]'); mos adds Distill-MOS.
    """

    out_dir: Path = Path("evaluation")
    """The folder for evaluation.json, evaluation.md and evaluation.png."""
    json: bool = False
    """Print the result as JSON on standard output, and the table on standard error."""

    def run(self) -> None:
        """Runs the evaluation, with a progress bar on standard error.

        Raises:
            RuntimeError: flite or a package is missing, or Distill-MOS does not import.
            ValueError: the folder cannot be written to.
        """
        requirements.check(self.recognizer)
        make_folder(self.out_dir)
        check_writable(self.out_dir / "evaluation.json")
        result = compare_with_progress(self)
        from rich.console import Console

        from jaxspec.evaluate import report

        if hosts.is_first():
            report.save(self.out_dir, result)
        report.show(result["rows"], Console(stderr=self.json, width=180))
        if self.json:
            print(json.dumps(result))


def compare_with_progress(plan: Plan) -> dict[str, Any]:
    """Runs ``compare.compare`` with a progress bar on standard error: what is being done, how much of it, and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from jaxspec.evaluate.compare import compare

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # The kinds of work differ in speed, so the time left is estimated from the last five minutes.
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=300) as bar:
        task = bar.add_task("loading", total=None)
        return compare(plan, lambda what, done, total: bar.update(task, description=what, completed=done, total=total))
