"""The server beside the engine that it drives: throughput, times of answers and first drafts, and its memory.

    python bench/bench_serve.py                  # about four minutes on two cores
    python bench/bench_serve.py --requests 2000 --only memory

`dgemma serve` runs as a process of its own, this one is its clients. Throughput: the same requests at once through the
server, and through a Scheduler with as many slots in a process of its own, by turns; each side's tokens are counted and
must be the same. On a machine that does other work too, compare the processor time that both take. Times: an open
loop, in which requests arrive by chance (Poisson) at shares of what the engine can do, whether the ones before them are
answered or not; and 1, 4 and 16 clients that each wait for their answer. Beyond the queue's end there must be 429s and
nothing else. Memory: the server's own resident memory over many requests.
Compare ratios, not times.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

ROOT = Path(__file__).resolve().parent.parent
# The project's goal: the server's tokens per second over the engine's own.
GOAL = 0.97
SLOTS, WAITING = 4, 28
STEPS, TOKENS = 12, 64  # of every canvas and answer, so that both sides do the same work
SERVE = "import sys; from dgemma_ext.cli import main; sys.exit(main())"
# The engine by itself: prompts on stdin, a line of JSON per round on stdout.
ENGINE = f"""if True:
    import json, sys, time
    import dgemma_ext as dg
    model = dg.DiffusionGemma.from_pretrained(sys.argv[1], device="cpu")
    scheduler = dg.Scheduler(model, max_batch={SLOTS})
    sampler = dg.SamplerConfig(max_denoising_steps={STEPS}, confidence_threshold=0, trim_canvas=True)
    for line in sys.stdin:
        began = time.perf_counter()
        asked = [
            scheduler.submit([{{"role": "user", "content": text}}], {TOKENS}, sampler=sampler, seed=seed)
            for seed, text in enumerate(json.loads(line))
        ]
        while not scheduler.idle:
            scheduler.step()
        seconds = time.perf_counter() - began
        print(json.dumps([seconds, sum(len(request.token_ids) for request in asked)]), flush=True)
"""


@dataclass(frozen=True)
class Server:
    url: str
    pid: int

    @property
    def megabytes(self) -> float:
        """Its resident memory."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return int(status.split("VmRSS:")[1].split()[0]) / 1024


def processor_seconds(pid: int) -> float:
    """What a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def server(folder: str, prefix_cache_bytes: int = 1 << 30) -> Iterator[Server]:
    command = [sys.executable, "-c", SERVE, "serve", folder, "--port", "0", "--device", "cpu"]
    command += ["--max-batch", str(SLOTS), "--max-waiting", str(WAITING), "--served-model-name", "bench"]
    command += ["--prefix-cache-bytes", str(prefix_cache_bytes)]
    with tempfile.NamedTemporaryFile("w+") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            while True:
                found = re.search(r'"url": "([^"]+)"', Path(log.name).read_text(encoding="utf-8"))
                if found is not None:
                    with contextlib.suppress(httpx2.TransportError):
                        if httpx2.get(f"{found[1]}/ready").status_code == 200:
                            break
                assert process.poll() is None, "the server has not started"
                time.sleep(0.1)
            yield Server(found[1], process.pid)
        finally:
            process.terminate()
            assert process.wait(60) == 0


@contextlib.contextmanager
def engine(folder: str) -> Iterator[tuple[int, Callable[[list[str]], tuple[float, int]]]]:
    """Its process, and what runs prompts through a Scheduler and gives the seconds and the tokens."""
    command = [sys.executable, "-c", ENGINE, folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        lines, answers = process.stdin, process.stdout

        def run(prompts: list[str]) -> tuple[float, int]:
            print(json.dumps(prompts), file=lines, flush=True)
            seconds, tokens = json.loads(answers.readline())
            return seconds, tokens

        try:
            yield process.pid, run
        finally:
            lines.close()


def body(prompt: str, seed: int, **more: Any) -> dict[str, Any]:
    settings = {"max_denoising_steps": STEPS, "confidence_threshold": 0, **more.pop("diffusion", {})}
    message = {"role": "user", "content": prompt}
    return {"model": "bench", "messages": [message], "seed": seed, "max_tokens": TOKENS, "diffusion": settings, **more}


async def ask(client: httpx2.AsyncClient, asked: dict[str, Any]) -> tuple[int, float, int]:
    """Status, seconds and tokens."""
    began = time.perf_counter()
    response = await client.post("/v1/chat/completions", json=asked)
    tokens = response.json()["usage"]["completion_tokens"] if response.status_code == 200 else 0
    return response.status_code, time.perf_counter() - began, tokens


async def first_draft(client: httpx2.AsyncClient, asked: dict[str, Any]) -> tuple[float, float]:
    """Seconds until the first draft, and until the end."""
    began, first = time.perf_counter(), 0.0
    wanted = asked | {"stream": True, "diffusion": asked["diffusion"] | {"drafts": True}}
    async with client.stream("POST", "/v1/chat/completions", json=wanted) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line == "event: diffusion.draft" and not first:
                first = time.perf_counter() - began
    return first, time.perf_counter() - began


def with_client(url: str, work: Callable[[httpx2.AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
        async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
            return await work(client)

    return asyncio.run(run())


def throughput(folder: str, prompts: list[str], rounds: int) -> float:
    """Prints tokens per second by turns; gives the median ratio."""
    with server(folder, prefix_cache_bytes=0) as served, engine(folder) as (pid, direct):  # the prompts come again

        async def together(client: httpx2.AsyncClient) -> tuple[float, int]:
            began = time.perf_counter()
            answers = await asyncio.gather(*(ask(client, body(prompt, seed)) for seed, prompt in enumerate(prompts)))
            assert {status for status, _, _ in answers} == {200}
            return time.perf_counter() - began, sum(tokens for _, _, tokens in answers)

        sides = [(pid, lambda: direct(prompts)), (served.pid, lambda: with_client(served.url, together))]

        def turn(side: int) -> tuple[float, int, float]:
            process, run = sides[side]
            before = processor_seconds(process)
            seconds, tokens = run()
            return seconds, tokens, processor_seconds(process) - before

        direct(prompts[:SLOTS])
        with_client(served.url, lambda client: ask(client, body(prompts[0], 0)))
        walls, processors = [], []
        for number in range(rounds):
            order = (0, 1) if number % 2 == 0 else (1, 0)
            results = {side: turn(side) for side in order}
            (alone, tokens, alone_processor), (through, same, through_processor) = results[0], results[1]
            assert tokens == same
            walls.append(alone / through)
            processors.append(alone_processor / through_processor)
            print(
                f"  round {number + 1}: engine {tokens / alone:7.1f} tokens/s, server {tokens / through:7.1f}, ratio "
                f"{walls[-1]:.3f}; processor {alone_processor:.2f} and {through_processor:.2f} s, "
                f"ratio {processors[-1]:.3f}",
                flush=True,
            )
    print(f"  median ratio of processor times {statistics.median(processors):.3f}")
    return statistics.median(walls)


def times(folder: str, prompts: list[str]) -> None:
    """Prints times of answers at 1, 4 and 16 clients, and in open loops up to more than the engine can do."""
    rng = random.Random(1)
    with server(folder) as served:

        async def clients(count: int, client: httpx2.AsyncClient) -> list[tuple[float, float]]:
            found: list[tuple[float, float]] = []

            async def one(seed: int) -> None:
                for number in range(max(2, 24 // count)):
                    found.append(await first_draft(client, body(rng.choice(prompts), 100 * seed + number)))

            await asyncio.gather(*(one(seed) for seed in range(count)))
            return found

        for count in (1, 4, 16):
            began = time.perf_counter()
            found = with_client(served.url, lambda client, count=count: clients(count, client))
            seconds = time.perf_counter() - began
            print(
                f"  {count:2} clients: first draft {shown([one[0] for one in found])}; "
                f"answer {shown([one[1] for one in found])}; {len(found) / seconds:5.2f} requests/s",
                flush=True,
            )
        rate = len(found) / seconds  # of a server that always has enough to do

        async def arrivals(share: float, count: int, client: httpx2.AsyncClient) -> list[tuple[int, float, int]]:
            tasks = []
            for seed in range(count):
                tasks.append(asyncio.ensure_future(ask(client, body(rng.choice(prompts), seed))))
                await asyncio.sleep(rng.expovariate(share * rate))
            return list(await asyncio.gather(*tasks))

        for share, count in ((0.5, 24), (0.8, 24), (8.0, 96)):
            answers = with_client(served.url, lambda client, s=share, c=count: arrivals(s, c, client))
            statuses = Counter(status for status, _, _ in answers)
            taken = shown([seconds for status, seconds, _ in answers if status == 200])
            assert set(statuses) <= {200, 429}
            print(
                f"  arrivals at {share:.1f} of its rate: {statuses[200]} answered, {statuses[429]} refused (429); "
                f"answer {taken}",
                flush=True,
            )
        assert statuses[429] > 0, "the queue has no end"
        assert statuses[200] >= SLOTS + WAITING


def shown(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    p50, p95 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.95))
    return f"p50 {p50:6.3f} s, p95 {p95:6.3f} s"


def memory(prompts: list[str], requests: int) -> None:
    """Prints the resident memory of a server over short requests of all kinds, some of which are left in the middle."""
    with server("6x6") as served:

        async def worker(numbers: Iterator[int], client: httpx2.AsyncClient) -> None:
            for number in numbers:
                asked = body(prompts[number % len(prompts)], number, diffusion={"max_denoising_steps": 2})
                if number % 3 == 0:
                    with contextlib.suppress(httpx2.TimeoutException):
                        await client.post("/v1/chat/completions", json=asked, timeout=0.005)
                elif number % 3 == 1:
                    await first_draft(client, asked)
                else:
                    await ask(client, asked)

        async def part(count: int, client: httpx2.AsyncClient) -> None:
            numbers = iter(range(count))
            await asyncio.gather(*(worker(numbers, client) for _ in range(8)))

        after = [served.megabytes]
        for _ in range(8):
            with_client(served.url, lambda client: part(requests // 8, client))
            after.append(served.megabytes)
        print("  MB after each eighth of", requests, "requests:", *(f"{megabytes:.1f}" for megabytes in after))
        print(f"  growth over the second half: {after[-1] - after[4]:+.1f} MB")


def write_model(folder: Path) -> None:
    """A random model whose steps take tens of milliseconds, with canvases of 64 tokens."""
    sys.path.insert(0, str(ROOT / "tests"))
    from checkpoints import make_checkpoint

    make_checkpoint(
        folder, layers=6, hidden=256, intermediate=512, moe_intermediate=128, experts=8, vocabulary=4096, heads=8,
        kv_heads=4, head_dim=64, global_head_dim=64, window=128, canvas=64, max_positions=2048,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["throughput", "times", "memory"], help="one part alone")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default: 5)")
    parser.add_argument("--requests", type=int, default=2000, help="of the memory's part (default: 2000)")
    parser.add_argument("--model", help="a checkpoint in place of the random model")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # which ends the processes below
    rng = random.Random(0)
    prompts = ["".join(rng.choice("123456789.") for _ in range(80)) for _ in range(24)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or temporary
        if options.model is None and options.only != "memory":
            write_model(Path(temporary))
        if options.only in (None, "throughput"):
            print(f"throughput, {len(prompts)} requests, {SLOTS} slots, {STEPS} steps a canvas")
            ratio = throughput(folder, prompts, options.rounds)
            print(f"  median ratio {ratio:.3f}, goal {GOAL}: {'met' if ratio >= GOAL else 'missed'}")
        if options.only in (None, "times"):
            print("times")
            times(folder, prompts)
    if options.only in (None, "memory"):
        print("memory, the bundled 6x6 model")
        memory(["".join(rng.choice("123456.") for _ in range(36)) for _ in range(50)], options.requests)


if __name__ == "__main__":
    main()
