"""The C kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer: one access outside a tensor ends them.

    python tests/model/ops/sanitize.py

Needs GCC or clang with its sanitizers. Exit code 0 when every test passed and none of the sanitizers spoke.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = [Path(__file__).with_name(f"test_{name}.py") for name in ("deformable", "separable")]
# These start processes of their own, set another compiler, or reserve more address space than the sanitizer grants.
LEFT_OUT = "process or compiler or compiles or cache or 31"


def main() -> int:
    compiler = os.environ.get("CC", "cc")
    names = [f"-print-file-name=lib{name}.so" for name in ("asan", "ubsan")]
    runtimes = [subprocess.check_output([*shlex.split(compiler), name], text=True).strip() for name in names]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "CC": f"{compiler} -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all",
            "HPETR_CACHE": cache,
            "LD_PRELOAD": " ".join(runtimes),  # as Python itself is not built with them
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own would drown ours
        }
        # -s: a captured report would die with the process
        options = ["-q", "-s", "-p", "no:cacheprovider", "-k", f"not ({LEFT_OUT})"]
        command = [sys.executable, "-m", "pytest", *options, *map(str, TESTS)]
        code = subprocess.run(command, env=environment, check=False).returncode
        libraries = list(Path(cache).glob("*.so"))
        if not (len(libraries) == 1 and b"__asan_init" in libraries[0].read_bytes()):
            print("the kernel was not built with the sanitizers, nothing was tested", file=sys.stderr)
            return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
