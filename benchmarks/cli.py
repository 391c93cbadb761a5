"""How long the command takes to answer where no kernel is started.

Medians over fresh processes, measured in turns. The exit code is 1 where an answer
takes longer than its limit: 0.4 s, and 3 s for `doctor`, which imports torch.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMANDS = {
    "--help": (["--help"], 0.4),
    "list": (["list"], 0.4),
    "show": (["show", "kit/record"], 0.4),
    "run: unknown name": (["run", "turo"], 0.4),
    "run: wrong value": (["run", "kit/record", "-p", "throws", "lots"], 0.4),
    "sweep: wrong value": (["sweep", "kit/record", "-g", "throws=lots"], 0.4),
    "show: a run": (["show", "done"], 0.4),
    "run: no notebook": (["run", "broken.ipynb"], 0.4),
    "run: out is taken": (["run", "kit/record", "--out", "done"], 0.4),
    "run: out is a file": (["run", "kit/record", "--out", "broken.ipynb"], 0.4),
    "run: other language": (["run", "other.ipynb"], 0.4),
    "completion": ([], 0.4),
    "doctor": (["doctor"], 3.0),
}


def seconds(words: list[str], folder: str) -> float:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if not words:  # what a shell asks when the tabulator is pressed
        environment |= {
            "_BIGMODEL_COMPLETE": "complete_bash",
            "COMP_WORDS": "bigmodel show rob",
            "COMP_CWORD": "2",
        }
    program = [
        sys.executable,
        "-c",
        "import sys; sys.argv[0] = 'bigmodel'; "
        "from bigmodel_nb.headless.cli import main; main()",
        *words,
    ]
    start = time.perf_counter()
    subprocess.run(program, cwd=folder, env=environment, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="of each command")
    repeats, slow = parser.parse_args().repeats, []
    with tempfile.TemporaryDirectory() as folder:
        files = {
            "broken.ipynb": "{",
            "other.ipynb": '{"nbformat": 4, "nbformat_minor": 5, "cells": [], '
            '"metadata": {"kernelspec": {"name": "nonesuch", "language": "R"}}}',
            "done/metrics.json": '{"status": "ok", "metrics": {}, "parameters": {}}',
        }
        for name, text in files.items():
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        times = {name: [] for name in COMMANDS}
        for name, (words, _) in COMMANDS.items():
            seconds(words, folder)  # files of the imports are read once
        for _ in range(repeats):
            for name, (words, _) in COMMANDS.items():
                times[name].append(seconds(words, folder))
    for name, (_, limit) in COMMANDS.items():
        middle = statistics.median(times[name])
        print(f"{name:<20} {middle:5.2f} s  (at most {limit} s)")
        slow += [name] * (middle > limit)
    sys.exit(f"too slow: {', '.join(slow)}" if slow else 0)


if __name__ == "__main__":
    main()
