"""Warm forked kernels against papermill's Python API with the ordinary kernel.

The notebook imports torch. Prints two ratios of medians, measured in turns in one run:
the time of one notebook, and of six notebooks on two workers (threads of this process)
against six runs one after the other.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import nbformat
import papermill
from nbformat.v4 import new_code_cell, new_notebook

from bigmodel_nb.headless import kernel
from bigmodel_nb.headless.run import run

NOTEBOOK = new_notebook(
    cells=[new_code_cell("import torch"), new_code_cell("torch.arange(4).sum().item()")]
)


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def quiet():
    """What a kernel says to this terminal goes nowhere.

    It says, for instance, that its sockets are not encrypted.
    """
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="of each measurement")
    repeats = parser.parse_args().repeats
    folder = Path(tempfile.mkdtemp())
    path, count = folder / "torch.ipynb", iter(range(10**6))
    nbformat.write(NOTEBOOK, path)

    def theirs() -> None:
        with quiet():
            papermill.execute_notebook(
                str(path),
                str(folder / f"{next(count)}.ipynb"),
                kernel_name="python3",
                progress_bar=False,
            )

    def ours() -> None:
        assert run(str(path), out=folder / f"run{next(count)}").status == "ok"

    def six_ours() -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda _: ours(), range(6)))

    def six_theirs() -> None:
        for _ in range(6):
            theirs()

    loading = seconds(lambda: kernel.warm())
    print(f"the zygote's own start, once to a process: {loading:.1f} s")
    for name, slow, fast in (
        ("one notebook", theirs, ours),
        ("six notebooks on two workers", six_theirs, six_ours),
    ):
        slow(), fast()  # the first of each fills the caches
        turns = [(seconds(slow), seconds(fast)) for _ in range(repeats)]
        before, after = (statistics.median(column) for column in zip(*turns))
        print(
            f"{name}: papermill's API {before:.2f} s, forked kernels {after:.2f} s,"
            f" {before / after:.1f} times faster"
        )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
