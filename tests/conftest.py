"""What every test stands on: no network, no hub, one number of threads, real data."""

import os
import signal
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

# On a machine that is busy, any example may take long for once.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
OFFLINE = Path(__file__).parent / "offline"
# In a shell's background Ctrl-C is ignored, also by all that is started there.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# what these tests start inherits it
MARK = os.environ["BIGMODEL_TESTS"] = str(uuid.uuid4())
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(OFFLINE), *filter(None, [os.environ.get("PYTHONPATH")])]
)
os.environ["PYTHONWARNINGS"] = (
    "ignore"  # of kernels that tests start; pytest has its own filter
)
sys.path.insert(0, str(OFFLINE))
import sitecustomize  # noqa: E402, F401  (the interpreter may have loaded another one before)

if Path(sitecustomize.__file__).parent != OFFLINE:
    exec((OFFLINE / "sitecustomize.py").read_text(encoding="utf-8"))

# before nbformat, whose validator compiles grammars of addresses for six seconds
import bigmodel_nb.headless.run  # noqa: E402, F401

ROOT = Path(__file__).resolve().parent.parent


def started_here() -> list[psutil.Process]:
    """The living processes that these tests started, wherever they are in the tree."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = (
                process.environ().get("BIGMODEL_TESTS") == MARK
                and process.status() != psutil.STATUS_ZOMBIE
            )
            helper = "multiprocessing.resource_tracker"  # Python's own
            if ours and helper not in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left():
    """No kernel and no other process of ours survives the tests."""
    yield
    from bigmodel_nb.headless import kernel

    kernel.cool()
    end = time.monotonic() + 15
    while (left := started_here()) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left, (
        f"left behind: {[' '.join(process.cmdline())[:200] for process in left]}"
    )


def pytest_collection_modifyitems(items: list) -> None:
    """Whole notebooks first: at the end no worker waits for a long test of another."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


def pytest_runtest_logreport(report) -> None:
    """A failure is told at once: it is known even if the run is ended early."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        crash = getattr(report.longrepr, "reprcrash", None)
        told = str(crash.message if crash else report.longrepr).strip().splitlines()
        where = f"{report.nodeid} ({report.when})"
        print(f"\nFAILED {where}: {(told or [''])[0]}", file=sys.__stderr__, flush=True)


@pytest.fixture
def real_data() -> Path:
    """The folder of real data sets that BIGMODEL_DATA names."""
    if not os.environ.get("BIGMODEL_DATA"):
        pytest.skip("BIGMODEL_DATA is not set: it names a folder of real data sets")
    folder = Path(os.environ["BIGMODEL_DATA"])
    assert folder.is_dir(), (
        f"BIGMODEL_DATA is {str(folder)!r}, and there is no such folder"
    )
    return folder


@pytest.fixture(scope="module", autouse=True)
def few_libraries(request):
    """For chapter 10, processes that fork kernels import a few small libraries only.

    To import torch and the others takes longer than a hundred kernels that need none.
    """
    from bigmodel_nb.headless import kernel

    few = (*kernel.KERNEL, "numpy")
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name.startswith("test_headless"):
            patch.setattr(kernel, "PRELOAD", few)
        yield


@pytest.fixture
def workshop(tmp_path, monkeypatch) -> Path:
    """An empty folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
