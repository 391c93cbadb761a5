"""Chapter 10: kernels forked from a process that has the libraries imported. Every end is provoked for real."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from bigmodel_nb.headless import kernel
from bigmodel_nb.headless.run import RunFailed, run

pytestmark = pytest.mark.skipif(not kernel.can_fork(), reason="forked kernels are a matter of Linux")


def environment() -> dict[str, str]:
    """What `run` gives its kernels now: a test before this one may have changed the process's own."""
    return {**os.environ, "TQDM_DISABLE": "1"}


@pytest.fixture
def zygote():
    """The zygote that `run` would use; the tests of a worker share it until one of them ends it."""
    return kernel.warm(environment())


@pytest.fixture
def save(workshop):
    def write(*sources, name="mine.ipynb", **metadata):
        made = new_notebook(cells=[new_code_cell(source) for source in sources], metadata=metadata)
        nbformat.write(made, name)
        return name

    return write


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether a process ends within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


RECORD = "from bigmodel_nb.kit.record import record\n"
PARENT = RECORD + "import os; record('parent', os.getppid())"


def test_a_run_forks_its_kernel_where_a_zygote_is_ready(save, zygote):
    done = run(save(PARENT, "import sys; record('torch', 'torch' in sys.modules); record('ours', [m for m in sys.modules if m == 'bigmodel_nb.headless'])"),
               out="out")
    assert done.metrics == {"parent": zygote.process.pid, "torch": True, "ours": []}


def test_without_a_zygote_the_kernel_is_an_ordinary_one(save, monkeypatch):
    monkeypatch.setattr("bigmodel_nb.headless.run._runs", 0)
    kernel.cool()
    assert run(save(PARENT), out="out").metrics["parent"] == os.getpid()
    assert not kernel.is_warm(), "one run does not make a zygote"


def test_the_second_run_of_a_process_starts_a_zygote_beside_itself(save, monkeypatch):
    monkeypatch.setattr("bigmodel_nb.headless.run._runs", 0)
    kernel.cool()
    parents = [run(save(PARENT), out=f"out{n}").metrics["parent"] for n in range(2)]
    assert parents == [os.getpid()] * 2 and kernel.is_warm()
    zygote = kernel.warm(environment())
    assert run(save(PARENT), out="out2").metrics["parent"] == zygote.process.pid
    kernel.cool()


def test_a_forked_kernel_is_like_an_ordinary_one(save, zygote):
    source = RECORD + """
import os, random, sys, threading, numpy, torch, matplotlib
record('facts', {'name': __name__, 'argv': sys.argv[1:2], 'path': sys.path[0], 'folder': os.path.basename(os.getcwd()), 
                 'threads': torch.get_num_threads(), 'backend': matplotlib.get_backend(), 'tqdm': os.environ['TQDM_DISABLE'],
                 'leader': os.getsid(0) == os.getpid(), 'input': sys.stdin.read(), 'main': threading.current_thread() is threading.main_thread()})
record('draws', [random.random(), float(numpy.random.rand()), torch.rand(()), torch.initial_seed()])
"""
    forked, other = run(save(source), out="out/a").metrics, run(save(source), out="out/a2").metrics
    kernel.cool()
    command = [sys.executable, "-c", "import sys; from bigmodel_nb.headless.run import run; run('mine.ipynb', out='plain/a')"]
    subprocess.run(command, check=True)
    plain = json.loads(Path("plain/a/metrics.json").read_text())["metrics"]
    assert forked["facts"] == plain["facts"]
    assert all(one != two for one, two in zip(forked["draws"], other["draws"])), "each copy draws its own numbers"


def test_what_one_forked_kernel_does_to_a_library_no_other_sees(save, zygote):
    run(save("import torch, os; torch.marked = True; os.environ['MARKED'] = '1'"), out="a")
    seen = run(save(RECORD + "import torch, os; record('seen', [hasattr(torch, 'marked'), 'MARKED' in os.environ])"), out="b")
    assert seen.metrics["seen"] == [False, False]


def test_the_gpu_is_not_touched_before_the_fork(save, zygote):
    assert run(save(RECORD + "import torch; record('bad', torch.cuda._is_in_bad_fork()); record('touched', torch.cuda.is_initialized())"),
               out="out").metrics == {"bad": False, "touched": False}


def test_a_library_computes_with_all_its_threads_in_a_copy(save, zygote):
    source = RECORD + """
import numpy, torch
torch.set_num_threads(2)
a = torch.randn(600, 600)
record('same', bool(torch.allclose((a @ a), torch.from_numpy(a.numpy() @ a.numpy()), atol=1e-2)))
net = torch.nn.Linear(600, 600); net(a).sum().backward()
"""
    assert run(save(source), out="out", timeout=60).metrics == {"same": True}


def test_what_a_notebook_leaves_to_its_end_is_done(save, zygote):
    source = """
import atexit, threading, time
atexit.register(lambda: open('at exit', 'w').close())
threading.Thread(target=lambda: (time.sleep(1), open('by a thread', 'w').close())).start()
"""
    run(save(source), out="out")
    assert Path("out/at exit").exists() and Path("out/by a thread").exists()


def test_each_end_of_a_forked_kernel_is_told_as_it_was(save, zygote):
    ends = {"import os, signal; os.kill(os.getpid(), signal.SIGKILL)": ("killed", "cell 1: the kernel was ended by signal 9"),
            "import os; os._exit(7)": ("killed", "cell 1: the kernel was ended with exit code 7"),
            "import sys; sys.exit(3)": ("failed", "cell 1: SystemExit: 3"),
            "import time; time.sleep(60)": ("timeout", "cell 1: the cell took longer than 2 s")}
    for number, (source, (status, message)) in enumerate(ends.items()):
        with pytest.raises(RunFailed) as caught:
            run(save(source), out=f"out{number}", timeout=2)
        assert (caught.value.run.status, caught.value.run.error["message"]) == (status, message)


def test_24_kernels_at_once(save, zygote):
    name = save(RECORD + "import os, torch; record('pid', os.getpid()); record('sum', torch.arange(4).sum())")
    with ThreadPoolExecutor(24) as pool:
        runs = list(pool.map(lambda number: run(name, out=f"out{number}"), range(24)))
    assert {each.status for each in runs} == {"ok"} and len({each.metrics["pid"] for each in runs}) == 24
    assert all(each.metrics["sum"] == 6 for each in runs)
    assert all(gone(each.metrics["pid"]) for each in runs)


def test_a_zygote_that_was_killed_between_two_runs_is_replaced(save, zygote):
    assert run(save(PARENT), out="a").metrics["parent"] == zygote.process.pid
    zygote.process.kill()
    zygote.process.wait()
    assert run(save(PARENT), out="b").status == "ok"
    fresh = kernel.warm(environment())
    assert fresh is not zygote and run(save(PARENT), out="c").metrics["parent"] == fresh.process.pid


def test_a_zygote_that_dies_with_the_request_falls_back(save, zygote, monkeypatch):
    monkeypatch.setattr(kernel.Zygote, "fork", lambda *_: (_ for _ in ()).throw(ConnectionError("the zygote ended")))
    assert run(save(PARENT), out="out").metrics["parent"] == os.getpid()


def test_a_zygote_that_is_killed_during_a_run_takes_the_kernel_along(save, zygote):
    threading.Timer(3, zygote.process.kill).start()
    with pytest.raises(RunFailed) as caught:
        run(save("import os; open('pid', 'w').write(str(os.getpid()))", "import time; time.sleep(60)"), out="out")
    assert caught.value.run.status == "killed" and caught.value.run.seconds < 20
    assert gone(int(Path("out/pid").read_text()))


def test_threads_that_ask_at_once_get_one_zygote():
    kernel.cool()
    with ThreadPoolExecutor(8) as pool:
        made = {id(each) for each in pool.map(lambda _: kernel.warm(environment()), range(8))}
    assert len(made) == 1
    alive = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    assert len([child for child in alive if "kernel import serve" in " ".join(child.cmdline())]) == 1
    kernel.cool()


def test_another_environment_gets_another_zygote(zygote):
    other = kernel.warm({**environment(), "OTHER": "1"})
    assert other is not zygote and gone(zygote.process.pid), "the first had no kernel left, so it ends"


def test_a_retired_zygote_serves_its_kernels_to_their_end(save, zygote):
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, save("open('started', 'w').close()", "import time; time.sleep(4)", PARENT), out="out")
        while not Path("out/started").exists():
            time.sleep(0.05)
        kernel.cool()
        assert running.result().metrics["parent"] == zygote.process.pid
    assert gone(zygote.process.pid)


OWNER = """
from bigmodel_nb.headless import kernel
from bigmodel_nb.headless.run import run
import os
kernel.warm({**os.environ, "TQDM_DISABLE": "1"})
run("mine.ipynb", out="out")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "busy and killed"])
def test_no_orphan_survives_the_death_of_its_owner(save, number):
    source = "import os; open('pids', 'w').write(f'{os.getppid()} {os.getpid()}'); import pathlib; pathlib.Path('started').touch()"
    save(source, "while True: pass")
    with subprocess.Popen([sys.executable, "-c", OWNER]) as owner:
        while not Path("out/started").exists():
            assert owner.poll() is None
            time.sleep(0.05)
        parent, pid = map(int, Path("out/pids").read_text().split())
        assert parent != owner.pid and psutil.pid_exists(pid), "a forked kernel"
        os.kill(owner.pid, number)
        owner.kill()
    assert gone(parent) and gone(pid)


def test_a_thread_may_make_the_zygote_and_end(save):
    kernel.cool()
    maker = threading.Thread(target=kernel.warm, args=[environment()])
    maker.start()
    maker.join()
    time.sleep(0.3)
    assert run(save(PARENT), out="out").metrics["parent"] == kernel.warm(environment()).process.pid
    kernel.cool()


def test_plain_papermill_forks_where_a_kernel_specification_says_so(save, monkeypatch):
    import papermill

    folder = Path("share/kernels/warm")
    folder.mkdir(parents=True)
    spec = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "warm", "language": "python",
            "metadata": {"kernel_provisioner": {"provisioner_name": "bigmodel-fork"}}}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(Path("share").absolute()))
    zygote = kernel.warm()
    done = papermill.execute_notebook(save("import os; os.getppid()"), "done.ipynb", kernel_name="warm", progress_bar=False)
    assert done.cells[-1].outputs[0].data["text/plain"] == str(zygote.process.pid)
    kernel.cool()


@pytest.mark.parametrize("command, ours", [([sys.executable, "-m", "ipykernel_launcher", "-f", "x"], True), (["/other/python", "-m", "ipykernel_launcher"], False),
                                           ([sys.executable, "-m", "xeus_python"], False)])
def test_only_the_kernel_of_this_python_is_forked(command, ours):
    assert kernel._is_ours(command) is ours
