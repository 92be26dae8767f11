"""Time of an image on an idle and on a busy machine, by how the threads of OpenMP wait for one another.

    python benchmarks/busy_machine.py [--settings default shipped passive ...] [--rounds 8] [--images 5] [--load 2]
        [--threads 2] [--image examples/000000000785.jpg]

Every setting has a process of its own with the bundled model. They measure in turn, a few images each, so that whatever
else the machine does hits all alike; first as the machine is, then with `--load` processes that compute all the time.
`shipped` is what the command line sets (`hpetr.cli.environment`), `default` OpenMP's own choice: threads without work
spin for some milliseconds before they sleep, which takes the cores from those that have work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from hpetr.cli.environment import WAITING

EXAMPLE = Path(__file__).parents[1] / "examples" / "000000000785.jpg"
SETTINGS = {
    "default": {},
    "shipped": WAITING,
    "passive": {"OMP_WAIT_POLICY": "passive"},
    **{f"spin {count}": {"GOMP_SPINCOUNT": str(count)} for count in (100, 1_000, 10_000, 100_000)},
}


def work(args: argparse.Namespace) -> None:
    """Measure some images for each line on standard input."""
    import torch

    from hpetr import PosePredictor
    from hpetr.inference.precision import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(args.threads)
    predictor = PosePredictor(device="cpu")
    for _ in range(3):
        predictor(args.image)
    for _ in sys.stdin:
        times = []
        for _ in range(args.images):
            start = time.perf_counter()
            predictor(args.image)
            times.append(time.perf_counter() - start)
        print(json.dumps(times), flush=True)


def start(name: str, args: argparse.Namespace) -> subprocess.Popen:
    kept = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    kept.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, __file__, "--work", "--images", str(args.images), "--threads", str(args.threads)]
    return subprocess.Popen(
        [*command, "--image", str(args.image)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=kept | SETTINGS[name],
    )


def ask(process: subprocess.Popen) -> list[float]:
    assert process.stdin
    assert process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["default", "shipped", "passive"])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--load", type=int, default=os.cpu_count())
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--image", type=Path, default=EXAMPLE)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args)
        return
    processes = {name: start(name, args) for name in args.settings}
    for process in processes.values():
        ask(process)
    average = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"{os.cpu_count()} cores, {args.threads} threads, load average before {average:.1f}; ms an image")
    print(f"{'':28}{'least':>8}{'median':>8}{'9 of 10':>8}{'most':>8}")
    for load in dict.fromkeys((0, args.load)):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(load)]
        times: dict[str, list[float]] = {name: [] for name in processes}
        try:
            for _ in range(args.rounds):
                for name, process in processes.items():
                    times[name] += ask(process)
        finally:
            for other in busy:
                other.kill()
        for name, values in times.items():
            ninth = statistics.quantiles(values, n=10)[-1]
            row = (min(values), statistics.median(values), ninth, max(values))
            print(
                f"{f'{load} other programs, {name}':28}" + "".join(f"{1e3 * value:>8.0f}" for value in row), flush=True
            )
    for process in processes.values():
        process.communicate()


if __name__ == "__main__":
    main()
