"""Loads a server of `jaxspec serve` at some concurrencies, and prints requests a second, time to first audio, gaps and rtf.

    python scripts/load_test.py --url http://127.0.0.1:8000 --concurrency 1 4 16 32 --json load.json

Run it a second time against a server with --slots 1 for the figures of one request at a time. With --minutes it is a soak: the
resident memory of --pid is printed for each minute.
"""

import argparse
import asyncio
import itertools
import json
import time
from pathlib import Path

import httpx
import numpy as np

from jaxspec.commands.streaming import underruns
from jaxspec.text.held_out import held_out

RATE = 24_000


async def one(client, text, seed, verify):
    """Seconds to each chunk of a request, and the seconds of sound in it; None where it was refused."""
    began, arrivals, durations = time.perf_counter(), [], []
    body = {"input": text, "seed": seed, "response_format": "pcm", **({"verify": verify} if verify else {})}
    async with client.stream("POST", "/v1/audio/speech", json=body) as response:
        if response.status_code != 200:
            return None
        async for part in response.aiter_raw():
            arrivals.append(time.perf_counter() - began)
            durations.append(len(part) / 2 / RATE)
    return arrivals, durations


async def level(client, texts, concurrency, count, seconds, verify):
    """The figures of ``concurrency`` clients that ask one after another, ``count`` requests in all or for some seconds."""
    numbers, results, began = itertools.count(), [], time.perf_counter()

    async def ask():
        while (number := next(numbers)) < count or time.perf_counter() - began < seconds:
            results.append(await one(client, texts[number % len(texts)], number, verify))

    await asyncio.gather(*(ask() for _ in range(concurrency)))
    took, good = time.perf_counter() - began, [result for result in results if result]
    first = [arrivals[0] for arrivals, _ in good]
    gaps = [gap for arrivals, _ in good for gap in np.diff(arrivals)]
    audio_s = sum(sum(durations) for _, durations in good)
    p = lambda values, q: round(float(np.percentile(values, q)), 4) if len(values) else None  # noqa: E731
    return {
        "concurrency": concurrency,
        "requests": len(good),
        "refused": len(results) - len(good),
        "requests_per_s": round(len(good) / took, 3),
        "audio_s_per_s": round(audio_s / took, 3),
        "first_audio_p50_s": p(first, 50),
        "first_audio_p95_s": p(first, 95),
        "gap_p50_s": p(gaps, 50),
        "gap_p95_s": p(gaps, 95),
        "rtf_p50": p([arrivals[-1] / sum(durations) for arrivals, durations in good], 50),
        "underruns_per_request": round(sum(underruns(np.diff(a), d) for a, d in good) / max(len(good), 1), 3),
    }


def resident_mb(pid):
    """The resident memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) // 1024


async def watch(pid, found):
    """Adds the resident memory of a process to ``found``, once a minute."""
    while True:
        found.append(resident_mb(pid))
        await asyncio.sleep(60)


async def main(options):
    """Runs each level."""
    texts = [text for text in held_out() if len(text) < 90]
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    limits = httpx.Limits(max_connections=max(options.concurrency) + 1)
    async with httpx.AsyncClient(base_url=options.url, headers=headers, timeout=600, limits=limits) as client:
        await level(client, texts, 1, 2, 0, options.verify)
        for concurrency in options.concurrency:
            memory: list[int] = []
            watching = asyncio.create_task(watch(options.pid, memory)) if options.pid else None
            figures = await level(client, texts, concurrency, options.requests, options.minutes * 60, options.verify)
            if watching:
                watching.cancel()
                figures["resident_mb"] = [*memory, resident_mb(options.pid)]
            figures["health"] = (await client.get("/health")).json()
            print(json.dumps(figures), flush=True)
            if options.json:
                with options.json.open("a") as file:
                    print(json.dumps({**figures, "label": options.label}), file=file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--requests", type=int, default=48, help="of each level")
    parser.add_argument("--minutes", type=float, default=0, help="go on for so long")
    parser.add_argument("--verify", help="the rule to ask for")
    parser.add_argument("--pid", type=int, help="the server's process")
    parser.add_argument("--label", default="")
    parser.add_argument("--json", type=Path, help="a file to add the figures to")
    asyncio.run(main(parser.parse_args()))
