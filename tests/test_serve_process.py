"""`jaxspec serve` as a process: a disk that is full, and SIGTERM while it is busy.

By hand: pytest -m slow -n 0 tests/test_serve_process.py
"""

import concurrent.futures
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

pytestmark = pytest.mark.slow
TEXTS = [f"The rain has stopped, so we can go for a walk along the river. It is {hour} in the morning." for hour in range(5, 11)]


def no_room():
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The process and its address, once it serves; it can write no file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jaxspec.commands.main", "serve", "--port", port, "--slots", 4, "--rules", "autoregressive"]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=no_room
    )
    said = []
    reader = threading.Thread(target=lambda: said.extend(process.stdout))
    reader.start()
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        assert process.poll() is None, "".join(said)
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                break
        except httpx.HTTPError:
            pass
        time.sleep(1)
    yield process, url, said
    process.kill()
    process.wait()
    reader.join()
    process.stdout.close()


def ask(url, text, began=None):
    body = {"input": text, "seed": 1, "response_format": "pcm"}
    with httpx.stream("POST", f"{url}/v1/audio/speech", json=body, timeout=300) as answer:
        assert answer.status_code == 200
        parts = []
        for part in answer.iter_raw():
            parts.append(part)
            if began:
                began.release()
    return b"".join(parts)


def test_it_serves_on_a_full_disk_and_finishes_what_it_accepted_when_it_is_asked_to_end(server):
    process, url, said = server
    alone = [ask(url, text) for text in TEXTS]
    began = threading.Semaphore(0)
    with concurrent.futures.ThreadPoolExecutor(len(TEXTS)) as pool:
        asked = [pool.submit(ask, url, text, began) for text in TEXTS]
        began.acquire()  # the first sound of one of them
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        with pytest.raises((httpx.HTTPError, AssertionError)):
            ask(url, TEXTS[0])
        together = [one.result() for one in asked]
    assert process.wait(120) == 0, "".join(said)
    for one, other in zip(together, alone, strict=True):
        assert len(one) == len(other)
        np.testing.assert_allclose(np.frombuffer(one, "<i2"), np.frombuffer(other, "<i2"), atol=4)  # of batches of other sizes
