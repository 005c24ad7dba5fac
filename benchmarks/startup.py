"""How long ``--help`` takes, beside a Python that does nothing. Bound: 3x + 60 ms.  python benchmarks/startup.py"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 15
BARE = "python -c pass"
COMMANDS = {
    BARE: ["-c", "pass"],
    "launcher.py --help": ["launcher.py", "--help"],
    "launcher.py status --help": ["launcher.py", "status", "--help"],
    "launcher.py": ["launcher.py"],
}


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS + 1):  # interleaved, so that a busy moment hits all of them
        for name, words in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
            seconds[name].append(time.perf_counter() - began)
    bare = statistics.median(seconds[BARE][1:])
    for name, some in seconds.items():
        took = statistics.median(some[1:])  # the first one filled the caches
        within = "" if name == BARE else "  within" if took <= 3 * bare + 0.06 else "  ABOVE"
        print(f"{name:26} {took * 1e3:6.1f} ms  {took / bare:5.2f}x{within}")


if __name__ == "__main__":
    main()
