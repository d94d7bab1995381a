"""Reads a compiled program as XLA prints it: its loop, the cycles that it is scheduled for, and instructions to avoid in it."""

import math
import re
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


class Op(NamedTuple):
    """One instruction of a compiled program.

    Attributes:
        name: without the percent sign.
        shape: as XLA writes it.
        code: the opcode.
        inside: the text in its parentheses: operands, or the value of a constant.
        rest: the attributes after them.
    """

    name: str
    shape: str
    code: str
    inside: str
    rest: str

    def __str__(self) -> str:
        made = re.search(r'op_name="([^"]*)"', self.rest)
        shape = re.sub(r":[^}]*?(S\(\d\))?}", r"\1}", self.shape)  # keeps the memory space of the tiling
        return f"{self.name} {shape[:90]}" + (f" ({made[1]})" if made else "")

    @property
    def operands(self) -> list[str]:
        """The names of its operands."""
        return re.findall(r"%([\w.\-]+)", self.inside)

    def calls(self, how: str = "") -> list[str]:
        """The names of the computations that it calls, or of those in the attribute ``how``."""
        found = re.findall(rf"\b{how or _ANY}=\{{?((?:%[\w.\-]+(?:, )?)+)", self.rest)
        return re.findall(r"%([\w.\-]+)", " ".join(found))


class Program(NamedTuple):
    """A compiled program.

    Attributes:
        computations: instructions in the order of the schedule, by the name of their computation.
        entry: the name of the computation that runs first.
        loop: the ``while`` of the entry that carries the most arrays: the decode loop.
    """

    computations: dict[str, list[Op]]
    entry: str
    loop: Op | None

    @property
    def body(self) -> str:
        """The name of the computation that the loop repeats.

        Raises:
            ValueError: the program has no loop.
        """
        if self.loop is None:
            raise ValueError("expected a program with a while loop in its entry, got none")
        return self.loop.calls("body")[0]


class Array(NamedTuple):
    """One array of a shape; see ``identity``."""

    kind: str
    sizes: tuple[int, ...]
    layout: str
    identity: tuple

    @property
    def on_chip(self) -> bool:
        """Whether it is in on-chip memory and not in HBM: VMEM, or CMEM of a v4."""
        return bool(re.search(r"S\([13]\)", self.layout))


_HEAD = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_OP = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)$")
_ANY = "(?:calls|body|condition|to_apply|branch_computations|called_computations|true_computation|false_computation)"


def parse(text: str) -> Program:
    """Parses a compiled program, ``compiled.as_text()``."""
    computations: dict[str, list[Op]] = {}
    entry, ops = "", []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            ops = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif found := _OP.match(line):
            ops.append(Op(*found.groups()))
    whiles = [op for op in computations[entry] if op.code == "while"]
    return Program(computations, entry, max(whiles, key=lambda op: op.shape.count("["), default=None))


def _within(program: Program, start: str, fusions: bool) -> Iterator[list[Op]]:
    """The computations reachable from one, with or without the insides of fusions, whose intermediates stay in registers."""
    seen, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            yield program.computations[name]
            todo += [other for op in program.computations[name] if fusions or op.code != "fusion" for other in op.calls()]


def identity(kind: str, sizes: tuple[int, ...]) -> tuple:
    """The type and the sizes of an array, independent of the order that a layout or a reshape gives them."""
    return kind, *sorted(size for size in sizes if size > 1)


def arrays(shape: str) -> list[Array]:
    """The arrays of a shape, or of a tuple of shapes; sizes that are not static are found by ``_dynamic``."""
    found = re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", shape)
    sizes = [tuple(int(size) for size in text.split(",") if size) for _, text, _ in found]
    return [Array(kind, size, layout, identity(kind, size)) for (kind, _, layout), size in zip(found, sizes, strict=True)]


def nbytes(array: Array) -> int:
    """The bytes of an array without padding."""
    return math.prod(array.sizes) * _BYTES.get(array.kind, 4)


def identity_bytes(of: tuple) -> int:
    """The bytes of an array of an identity.

    >>> identity_bytes(identity("bf16", (1, 8, 128)))
    2048
    """
    return math.prod(of[1:]) * _BYTES.get(of[0], 4)


def laid_out_bytes(array: Array) -> int:
    """The bytes of an array with the padding of its tiles; 0 where it is not in HBM.

    >>> laid_out_bytes(arrays("bf16[1,2048,8,64]{3,1,2,0:T(8,128)(2,1)}")[0]) == 2 * 2048 * 8 * 128
    True
    """
    order, _, tiles = array.layout.partition(":")
    sizes, tile = list(array.sizes), re.match(r"T\(([\d,]+)\)", tiles)
    for axis, size in zip(re.findall(r"\d+", order), reversed(tile[1].split(",")) if tile else (), strict=False):
        sizes[int(axis)] = -(-sizes[int(axis)] // int(size)) * int(size)
    return 0 if "S(" in tiles else math.prod(sizes) * _BYTES.get(array.kind, 4)


def laid_out_anew(program: Program, caches: set[tuple]) -> list[Array]:
    """The arrays of a megabyte or more, other than caches, that are copied before the loop because it needs another layout."""
    if program.loop is None:
        return []
    ops = {op.name: op for op in program.computations[program.entry]}
    carried = [ops[name] for name in ops[program.loop.operands[0]].operands]
    copies = [arrays(op.shape)[0] for op in carried if op.code == "copy"]
    return [array for array in copies if array.identity not in caches and laid_out_bytes(array) >= 2**20]


def scheduled_cycles(program: Program, name: str) -> int:
    """The cycles that the compiler estimates for a computation and for those that it calls."""
    return sum(_cycles(program, op) for op in program.computations[name])


def _cycles(program: Program, op: Op) -> int:
    own = re.search(r'"estimated_cycles":"(\d+)"', op.rest)
    within = [scheduled_cycles(program, name) for name in op.calls()] if op.code in ("while", "conditional", "call") else []
    if op.code == "while":
        within = [(trips(program, op) or 1) * sum(within)]
    elif op.code == "conditional":
        within = [min(within)]
    return (int(own[1]) if own else 0) + sum(within)


def trips(program: Program, loop: Op) -> int | None:
    """How often a loop that counts up to a constant runs; None for any other loop."""
    condition = program.computations[loop.calls("condition")[0]]
    constants = [op.inside for op in condition if op.code == "constant"]
    counts = {op.code for op in condition} <= {"constant", "parameter", "get-tuple-element", "compare"}
    return int(constants[0]) if counts and len(constants) == 1 and constants[0].isdigit() else None


def longest_loop_cycles(program: Program) -> int:
    """The cycles of the longest loop within the decode loop: of a draft model, its steps after the first."""
    return max((_cycles(program, op) for op in program.computations[program.body] if op.code == "while"), default=0)


_PASSES = set(
    "parameter tuple get-tuple-element bitcast while conditional call copy-done async-done slice-start slice-done custom-call "
    "optimization-barrier".split()
)
_WRITES = {"dynamic-update-slice", "scatter"}
_HOST = re.compile(r"infeed|outfeed|send|recv|callback|host", re.IGNORECASE)


def checks(
    program: Program,
    rows: int,
    vocab: int,
    caches: set[tuple],
    matrices: set[tuple],
    group_size: int = 0,
    int8_as_floats: AbstractSet[tuple] = frozenset(),
) -> dict[str, dict[str, Any]]:
    """Checks the compiled loop.

    Args:
        program: with the loop.
        rows: the batch size.
        vocab: V.
        caches: the ``identity`` of each KV cache, in every type that the compiler may keep it in.
        matrices: the ``identity`` of each matrix of parameters, of its float32 products.
        group_size: the most tokens of a group; gathers of that many tokens are the verifier's look-ups.
        int8_as_floats: the ``identity`` that a copy of each int8 matrix would have as floats.

    Returns:
        The ``verdict`` of each check.
    """
    everything = [op for ops in _within(program, program.body, fusions=True) for op in ops]
    writes, copies = _cache_traffic(program, caches)
    scattered = [op for op in writes if "scatter" in op.rest]
    by_terms = [op for op in everything if op.code == "multiply" and arrays(op.shape)[0].identity in matrices]
    found = {
        "host": ("no transfer to or from the host in the loop", [op for op in everything if _to_host(op)]),
        "caches": (
            f"caches are written in place in the loop, in {len(writes)} writes, none of them a scatter, and never copied",
            copies + scattered or ([] if writes else [program.loop]),
        ),
        "matrices": ("no matrix of parameters multiplied term by term, on the vector unit", by_terms),
        "vocabulary": (
            f"no sort or gather over the {vocab} ids in the loop",
            [op for op in everything if _over_vocabulary(op, rows, vocab, group_size)],
        ),
        "int8": (
            "no int8 matrix kept as floats, neither within the loop nor from one iteration to the next",
            _kept(program, int8_as_floats),
        ),
        "shapes": ("no dynamic shape", [op for ops in program.computations.values() for op in ops if _dynamic(op)]),
    }
    return {name: verdict(what, ops) for name, (what, ops) in found.items()}


def verdict(what: str, ops: list[Op]) -> dict[str, Any]:
    """A check: whether it holds, what it checks, and how many instructions break it, with the first five."""
    return {"holds": not ops, "what": what, "count": len(ops), "found": [str(op) for op in ops[:5]]}


def _target(op: Op) -> str:
    """The opcode, and the target of a custom call."""
    called = re.search(r'custom_call_target="([^"]*)"', op.rest)
    return f"{op.code} {called[1]}" if called else op.code


def _to_host(op: Op) -> bool:
    return bool(_HOST.search(_target(op))) or "S(5)" in op.shape  # memory space 5 is the host's


def _over_vocabulary(op: Op, rows: int, vocab: int, group_size: int) -> bool:
    """Whether an instruction sorts the ids of each row, or gathers as many slices as a row has ids.

    A vocabulary of a few hundred ids is as small as the look-ups of the verifier's groups, [... G], which are left out.
    """
    if "TopK" in _target(op) or op.code == "sort":
        return math.prod(arrays(op.shape)[0].sizes) >= rows * vocab
    piece = re.search(r"slice_sizes=\{([\d,]*)\}", op.rest)
    if op.code != "gather" or not piece:
        return False
    sizes = arrays(op.shape)[0].sizes
    if sizes[-1:] == (group_size,):
        return False
    return math.prod(sizes) >= rows * vocab * math.prod(int(size) for size in piece[1].split(",") if size)


def _kept(program: Program, identities: AbstractSet[tuple]) -> list[Op]:
    """The instructions of the loop that make an array of these, and the loop itself where it carries one."""
    ops = [op for ops in _within(program, program.body, fusions=False) for op in ops if op.code not in _PASSES]
    carried = [program.loop] if program.loop else []
    return [op for op in ops + carried if any(array.identity in identities for array in arrays(op.shape))]


def _dynamic(op: Op) -> bool:
    return bool(re.search(r"\[[^\]]*<=", op.shape) or re.search("set-dimension-size|PadToStatic|SliceToDynamic", _target(op)))


def _cache_traffic(program: Program, caches: set[tuple]) -> tuple[list[Op], list[Op]]:
    """The instructions of the loop that write into a cache in place, and those that copy a cache.

    Moving a cache to on-chip memory before it is used counts as a read, and moving it back after a write there as part of the
    write. An instruction that reads the old value of a cache after it was written in place needs a copy.
    """
    writes, copies = [], []
    for ops in _within(program, program.body, fusions=False):
        shapes = {op.name: arrays(op.shape) for op in ops}
        of_cache = {name for name, arrays in shapes.items() if any(array.identity in caches for array in arrays)}
        for at, op in enumerate(ops):
            if op.name not in of_cache or op.code in _PASSES:
                continue
            if op.code == "copy-start" and shapes[op.name][0].on_chip != shapes[op.name][1].on_chip:
                continue
            inner = [other for name in op.calls("calls") for other in program.computations[name]] if op.code == "fusion" else [op]
            if any(other.code in _WRITES and arrays(other.shape)[0].identity in caches for other in inner):
                writes.append(op)
                old = [name for name in op.operands if name in of_cache]
                copies += [later for later in ops[at + 1 :] if set(old) & set(later.operands)]
            else:
                copies.append(op)
    return writes, copies
