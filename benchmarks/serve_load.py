"""Load test of one `hpetr serve` by many clients: responses, latency and memory.

    python benchmarks/serve_load.py [--clients 64] [--seconds 20] [--queue 8] [--batch-size 1] [--checkpoint DIR]

Each client has one connection and sends the next request as soon as it has a response; after a 503 it waits a random
share of `Retry-After`. Server and clients share the machine. Any response other than poses and 503 is a failure and
ends the benchmark with exit code 1.
"""

from __future__ import annotations

import argparse
import http.client
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(args: argparse.Namespace) -> tuple[subprocess.Popen[str], int]:
    """Start a server on a free port, and return the process and the port."""
    command = [sys.executable, "-m", "hpetr", "serve", "--port", "0", "--queue", str(args.queue)]
    command += ["--checkpoint", args.checkpoint] if args.checkpoint else []
    command += ["--batch-size", str(args.batch_size)] if args.batch_size else []
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    line = server.stdout.readline()
    print(line.strip())
    return server, int(line.split("http://")[1].split()[0].rsplit(":", 1)[1])


def metrics(port: int) -> dict[str, float]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def client(port: int, image: bytes, end: float, outcomes: Counter[str], times: list[float]) -> None:
    """Send requests over one connection until the time `end`; `outcomes` and `times` belong to this client."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    while (begin := time.perf_counter()) < end:
        try:
            connection.request("POST", "/v1/predict", image, {"Content-Type": "image/jpeg"})
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException) as error:
            outcomes[type(error).__name__] += 1
            connection.close()
            continue
        outcomes[str(answer.status)] += 1
        if answer.status == 200:
            times.append(time.perf_counter() - begin)
        elif answer.status == 503:
            time.sleep(random.uniform(0, float(answer.headers["Retry-After"])))
    connection.close()


def measure(port: int, image: bytes, clients: int, seconds: float) -> tuple[Counter[str], list[float]]:
    end = time.perf_counter() + seconds
    outcomes: list[Counter[str]] = [Counter() for _ in range(clients)]
    times: list[list[float]] = [[] for _ in range(clients)]
    threads = [
        threading.Thread(target=client, args=(port, image, end, *own)) for own in zip(outcomes, times, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(outcomes, Counter()), sorted(time for own in times for time in own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--queue", type=int, default=8)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--checkpoint")
    parser.add_argument("--image", type=Path, default=ROOT / "examples" / "000000000785.jpg")
    args = parser.parse_args()
    image = args.image.read_bytes()
    server, port = start(args)
    try:
        measure(port, image, 2, 2)  # allocations of the first use do not count as growth
        before = metrics(port)
        outcomes, times = measure(port, image, args.clients, args.seconds)
        after = metrics(port)
    finally:
        server.terminate()
        code = server.wait(120)
    memory = [values["process_resident_memory_bytes"] / 1e6 for values in (before, after)]
    batches, images = (after[name] - before[name] for name in ("hpetr_batch_size_count", "hpetr_batch_size_sum"))
    print(f"{args.clients} clients, {args.seconds:g} s, {len(image) / 1e3:.0f} kB image, queue {args.queue}")
    print(f"answers: {', '.join(f'{count} x {kind}' for kind, count in sorted(outcomes.items()))}")
    print(f"poses: {len(times) / args.seconds:.1f} images per second, {images / max(batches, 1):.2f} a batch")
    if len(times) > 1:
        cuts = [1e3 * cut for cut in statistics.quantiles(times, n=100)]
        print(
            f"latency in ms: median {cuts[49]:.0f}, 90% {cuts[89]:.0f}, 99% {cuts[98]:.0f}, most {1e3 * times[-1]:.0f}"
        )
    print(f"memory of the server: {memory[0]:.0f} MB before, {memory[1]:.0f} MB after; it ended with code {code}")
    if not times or set(outcomes) - {"200", "503"} or code != 0:
        sys.exit(1)


if __name__ == "__main__":
    main()
