"""Several hosts that run one command together: which one this is, what the first one tells the others, and how all end.

Every host runs the same program on the same requests, as JAX wants it. The first host reads texts, prints, and writes files; the
others do neither. A host that fails says why through the coordination service of ``jax.distributed``, the first one prints it,
and all end. A host that dies is missed by that service, which aborts the others: each prints a sentence then.
"""

import _thread
import contextlib
import ctypes
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import IO, Any, NoReturn, TypeVar

import jax
from jax._src import distributed  # its client, which JAX does not export, holds what hosts tell each other; Orbax uses it too

T = TypeVar("T")

_ADDRESS = "JAX_COORDINATOR_ADDRESS"  # read by JAX; the next two are read here
_COUNT, _INDEX = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")  # of Cloud TPU on Kubernetes, separated by commas
_JOIN_S = 300  # for all hosts to start
_HEARTBEAT_S = 40  # after which a silent host counts as dead
_POLL_S = 1.0
_GRACE_S = 10.0  # for a host to end in order
_REASON_MS = 3000  # for a host that has failed to say why
_LONG_MS = 2**31 - 1  # for the first host, which may wait for a person
_FAILED = "jaxspec/failed"
_FAULT, _INTERRUPTED = 2, 130  # exit codes
_LATE = f"expected every host to join within {_JOIN_S} s, but one is missing: start the same command on all of them at once"
_DEAD = "expected every host to go on, but one died or cannot be reached: see its own output, and start again on all of them"


class _Hosts:
    """What this process knows of the others."""

    index, count = 0, 1
    told = 0  # values that the first host told
    over = threading.Event()  # no more watching
    failure: str | None = None  # of another host
    sentence = _LATE  # should the service abort this process
    native: IO[bytes]  # what C++ code prints
    stderr: IO[str]


_hosts = _Hosts()


def several() -> bool:
    """Whether there are others."""
    return _hosts.count > 1


def is_first() -> bool:
    """Whether this host prints and writes; true where there is one host."""
    return _hosts.index == 0


def expected() -> bool:
    """Whether the environment names several hosts: JAX's own variables, or Cloud TPU's on Kubernetes."""
    return _ADDRESS in os.environ or any("," in os.environ.get(name, "") for name in _TPU_HOSTS)


def join() -> None:
    """Joins the other hosts, before JAX starts a backend. From then on nothing is printed on hosts but the first.

    Raises:
        ValueError: the environment does not say who the hosts are.
    """
    _catch_native_output()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of no effect but on CPUs
    count, index = (int(os.environ[name]) if name in os.environ else None for name in (_COUNT, _INDEX))
    try:
        jax.distributed.initialize(
            num_processes=count,
            process_id=index,
            initialization_timeout=_JOIN_S,
            heartbeat_timeout_seconds=_HEARTBEAT_S,
        )
    except ValueError as error:
        raise ValueError(
            f"expected --distributed on hosts of Cloud TPU or Slurm, or with {_ADDRESS}, {_COUNT} and {_INDEX} set, got neither "
            f"({error}): leave it out on one host"
        ) from error
    _hosts.index, _hosts.count = distributed.global_state.process_id, distributed.global_state.num_processes
    _hosts.sentence = _DEAD
    if not is_first():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, for the whole run
    threading.Thread(target=_watch, name="hosts", daemon=True).start()


def from_first(make: Callable[[], T]) -> T:
    """What ``make`` gives on the first host, on every host; it is called there only. Call it at the same place on all hosts.

    The value is one that JSON holds.
    """
    if not several():
        return make()
    name = f"jaxspec/told/{_hosts.told}"
    _hosts.told += 1
    if is_first():
        value = make()
        _client().key_value_set(name, json.dumps(value))
        return value
    return json.loads(_client().blocking_key_value_get(name, _LONG_MS))


def wait(name: str) -> None:
    """Waits until every host is at the place of this name."""
    if several():
        _client().wait_at_barrier(f"jaxspec/{name}", _LONG_MS)


def leave() -> None:
    """Waits until every host is done, and leaves them; nothing where there is one host."""
    if several():
        wait("done")
        _hosts.over.set()
        jax.distributed.shutdown()


def end(message: str, code: int) -> NoReturn:
    """Ends the command, on every host, with a message on the first one's standard error.

    Args:
        message: of this host; where it was interrupted because another one had failed, that one's is printed instead.
        code: of the exit; 130 where this host was interrupted.
    """
    if not several():
        print(f"jaxspec: {message}", file=sys.stderr)
        sys.exit(code)
    _hosts.over.set()
    if _hosts.failure and code == _INTERRUPTED:
        message, code = _hosts.failure, _FAULT
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one said something before
        _client().key_value_set(_FAILED, message if is_first() else f"host {_hosts.index}: {message}")
    if is_first():
        print(f"jaxspec: {message}", file=sys.stderr)
    _leave_last(code)


def reason(error: BaseException) -> str:
    """What to say of an error. One of JAX's is mostly another host's: it is waited for, to hear why."""
    if not several() or not isinstance(error, jax.errors.JaxRuntimeError):
        return str(error)
    _hosts.over.set()  # ``_watch`` would interrupt the wait
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        return _client().blocking_key_value_get(_FAILED, _REASON_MS)
    return f"{_DEAD} ({str(error).splitlines()[0]})"


def _client() -> Any:
    return distributed.global_state.client


def _leave_last(code: int) -> NoReturn:
    """Ends this process; the first host, with which the service ends, waits until the others know."""
    sys.stderr.flush()
    sys.stdout.flush()
    if is_first():
        until = time.monotonic() + _GRACE_S
        for index in range(1, _hosts.count):
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                _client().blocking_key_value_get(f"{_FAILED}/{index}", max(1, int(1e3 * (until - time.monotonic()))))
    else:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _client().key_value_set(f"{_FAILED}/{_hosts.index}", "known")
    os._exit(code)


def _watch() -> None:
    """Interrupts this host when another one has failed; one that hangs in a call is ended."""
    while not _hosts.over.wait(_POLL_S):
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _hosts.failure = _client().key_value_try_get(_FAILED)
        if _hosts.failure and not _hosts.over.is_set():
            _thread.interrupt_main()
            if not _hosts.over.wait(_GRACE_S / 2):
                end(_hosts.failure, _FAULT)


def _catch_native_output() -> None:
    """Keeps what C++ code prints apart from what Python prints, and prints a sentence where the service aborts the process."""
    _hosts.native = tempfile.TemporaryFile()  # noqa: SIM115, for the whole run
    sys.stdout, sys.stderr = (open(os.dup(n), "w", buffering=1) for n in (1, 2))  # noqa: SIM115
    _hosts.stderr = sys.stderr
    for number in (1, 2):
        os.dup2(_hosts.native.fileno(), number)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, type(_aborted))
    libc.signal(signal.SIGABRT, _aborted)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(_: int) -> None:
    """Handles SIGABRT, which the service's client raises where it lost a host; Python's own handlers would run too late."""
    _hosts.native.seek(0)
    printed = _hosts.native.read().decode(errors="replace")
    lost = "JAX distributed service detected fatal errors" in printed
    print(f"jaxspec: {_hosts.sentence}" if lost else printed, file=_hosts.stderr, flush=True)
    os._exit(_FAULT if lost else 128 + signal.SIGABRT)
