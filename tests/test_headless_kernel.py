"""Chapter 10: kernels forked from a process that has the libraries imported."""

import json
import os
import re
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

pytestmark = pytest.mark.skipif(
    not kernel.can_fork(), reason="forked kernels are a matter of Linux"
)
LIBRARIES = kernel.PRELOAD


def environment() -> dict[str, str]:
    """What `run` gives its kernels now: an earlier test may have changed it."""
    return kernel.kernel_environment()


def warmed():
    """The zygote that `run` would use, however long its imports take."""
    made = kernel.warm(environment(), wait=600)
    assert made, "the libraries are imported"
    return made


@pytest.fixture
def zygote():
    """The tests of a worker share it until one of them ends it."""
    return warmed()


@pytest.fixture
def whole_zygote(monkeypatch):
    """One that has imported all that a zygote does where nothing else is asked for."""
    monkeypatch.setattr(kernel, "PRELOAD", LIBRARIES)
    return warmed()


def copied(*arguments, **options):
    """A run whose kernel must be forked: else nothing would be tested."""
    done = run(*arguments, **options)
    assert done.record["kernel"] == "forked", done.record["kernel_reason"]
    return done


@pytest.fixture
def save(workshop):
    def write(*sources, name="mine.ipynb", **metadata):
        made = new_notebook(
            cells=[new_code_cell(source) for source in sources], metadata=metadata
        )
        nbformat.write(made, name)
        return name

    return write


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether a process ends within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (
            not psutil.pid_exists(pid)
            or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        ):
            return True
        time.sleep(0.05)
    return False


RECORD = "from bigmodel_nb.kit.record import record\n"
PARENT = RECORD + "import numpy, os; record('parent', os.getppid())"


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
    zygote = warmed()
    assert run(save(PARENT), out="out2").metrics["parent"] == zygote.process.pid
    kernel.cool()


STATE = [
    (
        "import logging, os, sys, warnings\n"
        "before = {'path': getattr(sys, 'pa' + 'th')[:], 'argv': sys.argv[0], "
        "'flags': str(sys.flags), 'environment': {**getattr(os, 'env' + 'iron')}}"
    ),
    (
        "import matplotlib.pyplot as plt, numpy, pandas, torch, torchvision, "
        "transformers.modeling_utils, sklearn.linear_model, tqdm.auto"
    ),
    """
import gc, json, locale, matplotlib, resource, signal, threading
def name(stream): return type(stream).__name__
def written(handler):
    return name(handler), handler.level, name(getattr(handler, 'stream', None))
def placeless(thing): return str(thing).split(' at ')[0]
loggers = {'root': logging.root, **logging.root.manager.loggerDict}
loggers = {key: each for key, each in loggers.items() if hasattr(each, 'handlers')}
options = [f'display.{name}' for name in ('max_columns', 'width', 'max_rows')]
options.append('mode.copy_on_write')
after = {
    'environment': {**getattr(os, 'env' + 'iron')},
    'path': getattr(sys, 'pa' + 'th')[:],
    'modules': sorted(sys.modules),
    'hooks': sorted(map(placeless, sys.meta_path)),
    'filters': [str(each) for each in warnings.filters],
    'rc': {key: str(each) for key, each in matplotlib.rcParams.items()},
    'backend': matplotlib.get_backend(),
    'interactive': matplotlib.is_interactive(),
    'loggers': {
        key: [each.level, each.propagate, [written(h) for h in each.handlers]]
        for key, each in loggers.items() if each.handlers or each.level
    },
    'threads': sorted(each.name.split('-')[0] for each in threading.enumerate()),
    'collector': [gc.isenabled(), gc.get_threshold()],
    'locale': locale.setlocale(locale.LC_ALL),
    'signals': {
        str(each): placeless(signal.getsignal(each)) for each in signal.valid_signals()
    },
    'torch': [
        torch.get_num_threads(), torch.get_num_interop_threads(),
        str(torch.get_default_dtype()), torch.is_grad_enabled(),
        torch.cuda.is_initialized(),
    ],
    'pandas': {key: str(pandas.get_option(key)) for key in options},
    'numpy': [str(numpy.get_printoptions()), str(numpy.geterr())],
    'bar': tqdm.auto.tqdm.__mro__[1].__module__,
    'limit': sys.getrecursionlimit(),
    'events': {
        key: [each.__qualname__ for each in calls]
        for key, calls in get_ipython().events.callbacks.items()
    },
    'terminals': [each.isatty() for each in (sys.stdin, sys.stdout)],
    'mask': os.umask(0o022),
    'limits': [resource.getrlimit(each) for each in range(10)],
}
json.dump([before, after], open('state.json', 'w'))
""",
    "plt.plot([1, 2])",
    "logging.getLogger('transformers').warning('hello'); logging.warning('root')",
    "warnings.warn('careful'); warnings.warn('old', DeprecationWarning)",
    "pandas.DataFrame([range(25)])",
    "import sys; print('out'); print('err', file=sys.stderr)",
    (
        "import multiprocessing\nwith multiprocessing.get_context('spawn').Pool(1) "
        "as pool: print(pool.map(len, ['ab']))"
    ),
    "for _ in tqdm.auto.tqdm(range(3)): pass",
    (
        "import ipywidgets; box = ipywidgets.IntSlider(3); box.observe(print, "
        "'value'); box.value = 4; box"
    ),
    (
        "torch.set_num_threads(1); torch.manual_seed(1); print(torch.nn.Linear(3, "
        "3)(torch.ones(1, 3)).tolist(), numpy.random.default_rng(0).random())"
    ),
]


def told(cell):
    """What a cell shows, without what differs in any two kernels.

    That is ids, places in memory, speeds, the order of two streams.
    """
    text = json.dumps(
        sorted(
            (
                [each.get("name"), each.get("text"), {**each.get("data", {})}]
                for each in cell.outputs
            ),
            key=str,
        )
    )
    return re.sub(
        r"0x[0-9a-f]+|ipykernel_\d+|[0-9a-f]{32}|\[\d\d:.*?\]|iVBOR[^\"]*", "", text
    )


EARLY = """
import os
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HOME", "/nowhere")
%env MPLBACKEND=module://matplotlib.backends.backend_svg
"""
HEARD = (
    RECORD
    + """
import matplotlib.pyplot, torch, huggingface_hub.constants
backend = matplotlib.get_backend().rpartition("_")[2]
home = huggingface_hub.constants.HF_HOME
record("heard", [torch.get_num_threads(), home, backend])
"""
)


@pytest.mark.parametrize(
    "by", ["its first cell", "a module beside it", "a package beside it"]
)
def test_a_variable_that_a_notebook_sets_is_heard_in_every_run(save, zygote, by):
    if by == "its first cell":
        name = save(EARLY, HEARD)
    else:
        place = Path("early.py" if by == "a module beside it" else "early/__init__.py")
        place.parent.mkdir(exist_ok=True)
        place.write_text(
            EARLY.replace("%env MPLBACKEND=", "os.environ['MPLBACKEND'] = '").rstrip()
            + "'\n"
        )
        name = save("import early", HEARD)
    for number in range(2):
        done = run(name, out=f"out{number}")
        assert done.metrics["heard"] == [1, "/nowhere", "svg"]
        assert (
            done.record["kernel"] == "fresh"
            and "changes environment variables" in done.record["kernel_reason"]
        )


def test_all_rows_of_a_sweep_hear_what_the_notebook_sets(save, monkeypatch):
    from bigmodel_nb.headless.sweep import sweep

    made = nbformat.read(save(EARLY, "n: int = 0  # a number", HEARD), 4)
    made.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(made, "mine.ipynb")
    table = sweep("mine.ipynb", {"n": [1, 2, 3]}, workers=1, out="swept")
    assert (table["status"] == "ok").all() and table["heard"].nunique() == 1
    records = [
        json.loads(path.read_text()) for path in Path("swept").glob("*/metrics.json")
    ]
    assert [each["kernel"] for each in records] == ["fresh"] * 3 and {
        each["metrics"]["heard"][0] for each in records
    } == {1}


@pytest.mark.parametrize(
    "source",
    [
        "import os; os.environ['A'] = '1'",
        "from os import environ\nenviron.update(A='1')",
        "os.environ.setdefault('A', '1')",
        "os.putenv('A', '1')",
        "%env A=1",
        "%set_env A 1",
        "from dotenv import load_dotenv",
        "%pip install x",
        "!pip install -U x",
        "!uv pip install x",
        "%conda install x",
        "del os.environ['A']",
        "os.unsetenv('A')",
        "x = os.environ",
        "os.environb[b'A'] = b'1'",
        "get_ipython().run_line_magic('env', 'A=1')",
        "get_ipython().run_line_magic('set_env', 'A 1')",
        "get_ipython().magic('%env A=1')",
        "get_ipython().run_line_magic(magic_name='env', line='A=1')",
        "import sys; sys.path.append('/elsewhere')",
        "from sys import path",
        "import site; site.addsitedir('x')",
        "1\n%run /elsewhere/early.py",
        "get_ipython().run_line_magic('run', 'x.py')",
        "exec(open('/elsewhere/early.py').read())",
        "exec(Path('x.py').read_text())",
        "exec(compile(open('x').read(), 'x', 'exec'))",
        "runpy.run_path('x.py')",
        "importlib.util.spec_from_file_location('x', 'x.py')",
        "os.chdir('..')",
        "%cd ..",
    ],
)
def test_what_asks_for_a_fresh_kernel(workshop, source):
    assert kernel.needs_fresh(["1", source], workshop).startswith("code cell 2 ")


@pytest.mark.parametrize(
    "source",
    [
        "1",
        "import torch",
        "import os.path; os.path.join('a')",
        "def run(): exec('1')",
        "os.environ.get('A')",
        "environment = 1",
        "import sys\nif 'google.colab' in sys.modules:\n    %pip install x",
        "pipe = 'installed'",
        "",
    ],
)
def test_what_does_not(workshop, source):
    Path("unused.py").write_text("import os; os.environ['A'] = '1'")
    assert kernel.needs_fresh([source], workshop) == ""


@pytest.mark.parametrize(
    "name, hidden",
    [
        ("statistics.py", "statistics"),
        ("numpy/__init__.py", "numpy"),
        ("psutil.py", "psutil"),
        ("statistics/data.py", ""),
        ("mine.py", ""),
        ("statistics.txt", ""),
    ],
)
def test_a_module_that_hides_a_library_asks_for_a_fresh_kernel(workshop, name, hidden):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("answer = 42")
    assert kernel.needs_fresh(["1"], workshop) == (
        f"{hidden}, beside the notebook, has the name of a library" if hidden else ""
    )


def test_a_module_that_hides_a_library_is_imported_in_every_run(save, zygote):
    Path("statistics.py").write_text("answer = 42")
    name = save(RECORD + "import statistics; record('answer', statistics.answer)")
    assert [run(name, out=f"out{number}").metrics for number in range(2)] == [
        {"answer": 42}
    ] * 2


@pytest.mark.parametrize(
    "name",
    ["startup/00.py", "startup/a.ipy", "ipython_config.py", "ipython_kernel_config.py"],
)
def test_files_that_ipython_starts_with_ask_for_a_fresh_kernel(
    workshop, monkeypatch, name
):
    monkeypatch.setenv("IPYTHONDIR", str(workshop / "of_ipython"))
    assert kernel.needs_fresh(["1"], workshop) == ""
    path = workshop / "of_ipython/profile_default" / name
    path.parent.mkdir(parents=True)
    path.write_text("")
    assert (
        kernel.needs_fresh(["1"], workshop) == "IPython has files to run at its start"
    )


def test_a_package_is_searched_to_its_end(workshop):
    Path("space/deep/deeper").mkdir(parents=True)
    Path("space/deep/deeper/early.py").write_text(EARLY)
    assert (
        kernel.needs_fresh(["import space.deep.deeper.early"], workshop)
        == "early.py changes environment variables"
    )
    assert kernel.needs_fresh(["space = 1"], workshop) == ""


def test_settings_in_the_callers_folder_are_heard_by_no_run(save, monkeypatch):
    Path("matplotlibrc").write_text("lines.linewidth: 7\n")
    kernel.cool()
    warmed()
    source = (
        RECORD
        + "import matplotlib; record('width', matplotlib.rcParams['lines.linewidth'])"
    )
    done = [
        run(save(first, source), out=f"out{number}")
        for number, first in enumerate(["1", "import os; os.environ['X'] = '1'"])
    ]
    assert [each.record["kernel"] for each in done] == ["forked", "fresh"] and [
        each.metrics for each in done
    ] == [{"width": 1.5}] * 2
    kernel.cool()


@pytest.mark.parametrize(
    "source, expected",
    [
        ("1", False),
        ("import os, sys.path\nfrom json import loads", False),
        ("import numpy", True),
        ("if 1:\n    import os, torch.nn as nn", True),
        ("from bigmodel_nb.kit.record import record", False),
        ("from bigmodel_nb.kit.core import Estimate", True),
        ("%matplotlib inline", True),
        ("%time 1\nprint('import torch')", False),
        ("import os, sys; print('torch', 'numpy')  # import torch", False),
        ("import json  # not torch, numpy", False),
        ("from beside import x", False),
        ("from . import beside\nfrom .beside import x", False),
        ("from beside import x, indeed\nimport heavy", True),
    ],
)
def test_a_notebook_that_names_a_library_is_known(workshop, source, expected):
    Path("beside.py").write_text("import math\n")
    Path("heavy.py").write_text("import pandas as pd\n")
    assert kernel.names_libraries(["x = 1", source], Path()) is expected


def test_a_zygote_imports_what_the_notebook_needs(save, monkeypatch):
    """A full one serves all notebooks, a small one those that import no library."""
    kernel.cool()
    monkeypatch.setattr("bigmodel_nb.headless.run._runs", 1)
    plain = RECORD + "import os, sys; record('seen', 'numpy' in sys.modules)"
    run(save(plain), out="a")
    small = kernel.warm(environment(), 600, libraries=False)
    assert small.libraries == kernel.KERNEL
    assert copied(save(plain), out="b").metrics == {"seen": False}
    assert not kernel.is_warm() and kernel.is_warm(libraries=False)
    run(save(PARENT), out="c")
    large = warmed()
    assert large is not small and gone(small.process.pid)
    assert large.libraries == kernel.PRELOAD and kernel.is_warm(libraries=False)
    assert copied(save(plain), out="d").metrics == {"seen": True}
    assert warmed() is large
    kernel.cool()


def test_why_a_kernel_is_what_it_is(save, zygote, monkeypatch):
    assert (
        run(save("1"), out="a").record["kernel_reason"]
        == "a copy of a process that had the libraries imported"
    )
    kernel.cool()
    monkeypatch.setattr("bigmodel_nb.headless.run._runs", 0)
    sources = ["1", "1", "import numpy"]
    reasons = [
        run(save(source), out=f"b{number}").record["kernel_reason"]
        for number, source in enumerate(sources)
    ]
    assert reasons == [
        "the first run of its process",
        "the libraries were not imported yet",
        "the libraries were not imported yet",
    ]
    monkeypatch.setattr(kernel, "can_fork", lambda: False)
    assert (
        run(save("1"), out="c").record["kernel_reason"]
        == "this system cannot fork kernels"
    )


def test_a_copy_that_cannot_be_made_is_told_with_its_reason(save, zygote, monkeypatch):
    """Between the choice of a zygote and the start of the kernel, things may happen."""
    reasons = []
    for number, change in enumerate(
        [
            lambda patch: patch.setattr(kernel, "_is_ours", lambda _: False),
            lambda patch: (
                patch.setenv("SECOND", "a secret"),
                patch.setenv("FIRST", "1"),
            ),
        ]
    ):
        with monkeypatch.context() as patch:
            patch.setattr(kernel, "warm", lambda *_, **__: zygote)
            patch.setattr(kernel, "is_warm", lambda **_: True)
            change(patch)
            reasons.append(run(save("1"), out=f"out{number}").record["kernel_reason"])
    assert reasons == ["another Python", "another environment: FIRST, SECOND"], (
        "names, not values"
    )


def test_a_zygote_that_answers_too_late_costs_no_kernel(save, zygote, monkeypatch):
    """Asked while it stands still, it forks later: that kernel ends, others go on."""
    waits, process = (
        "import os, time\nwhile not os.path.exists('go'): time.sleep(0.1)",
        psutil.Process(zygote.process.pid),
    )
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            copied,
            save("open('started', 'w').close()", waits, PARENT, name="other.ipynb"),
            out="other",
        )
        while not Path("other/started").exists():
            time.sleep(0.05)
        before = process.children()
        try:
            with monkeypatch.context() as patch:
                patch.setattr(kernel._Forked, "patience", 0.5)
                process.suspend()
                late = run(save(PARENT), out="late").record
            process.resume()
            after = copied(save(PARENT), out="next").metrics["parent"]
            left = [
                child.pid
                for child in process.children()
                if child not in before and not gone(child.pid)
            ]
        finally:
            process.resume()
            Path("other/go").touch()
        assert (late["kernel"], late["kernel_reason"]) == (
            "fresh",
            "the process with the libraries imported made no copy: timed out",
        )
        assert (
            after == running.result().metrics["parent"] == process.pid and not left
        ), "the copy that came too late"


def test_sockets_have_a_place_that_holds_them(tmp_path, monkeypatch):
    import tempfile

    short, long = tmp_path / "s", tmp_path / ("l" * 100)
    short.mkdir(), long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    place = kernel.socket_folder()
    assert len(place) < 90 and not list(long.iterdir()) and not os.listdir(place)
    os.rmdir(place)
    monkeypatch.setattr(
        tempfile, "mkdtemp", lambda **_: (_ for _ in ()).throw(PermissionError("no"))
    )
    assert kernel.socket_folder() is None


def test_what_a_notebook_leaves_to_its_end_is_done(save, zygote):
    source = """
import atexit, threading, time
atexit.register(lambda: open('at exit', 'w').close())
def later():
    time.sleep(1)
    open('by a thread', 'w').close()
threading.Thread(target=later).start()
"""
    copied(save(source), out="out")
    assert Path("out/at exit").exists() and Path("out/by a thread").exists()


def test_each_end_of_a_forked_kernel_is_told_as_it_was(save, zygote):
    ends = {
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": (
            "killed",
            "cell 1: the kernel was ended by signal 9",
        ),
        "import os; os._exit(7)": (
            "killed",
            "cell 1: the kernel was ended with exit code 7",
        ),
        "import sys; sys.exit(3)": ("failed", "cell 1: SystemExit: 3"),
        "import time; time.sleep(60)": (
            "timeout",
            "cell 1: the cell took longer than 2 s",
        ),
    }
    for number, (source, (status, message)) in enumerate(ends.items()):
        with pytest.raises(RunFailed) as caught:
            run(save(source), out=f"out{number}", timeout=2)
        assert (
            caught.value.run.status,
            caught.value.run.error["message"],
            caught.value.run.record["kernel"],
        ) == (status, message, "forked")


def test_a_zygote_that_was_killed_between_two_runs_is_replaced(save, zygote):
    assert run(save(PARENT), out="a").metrics["parent"] == zygote.process.pid
    zygote.process.kill()
    zygote.process.wait()
    assert run(save(PARENT), out="b").status == "ok"
    fresh = warmed()
    assert (
        fresh is not zygote
        and run(save(PARENT), out="c").metrics["parent"] == fresh.process.pid
    )


def test_a_zygote_that_dies_with_the_request_falls_back(save, zygote, monkeypatch):
    monkeypatch.setattr(
        kernel.Zygote,
        "fork",
        lambda *_: (_ for _ in ()).throw(ConnectionError("the zygote ended")),
    )
    done = run(save(PARENT), out="out")
    assert (
        done.metrics["parent"] == os.getpid()
        and done.record["kernel_reason"]
        == "the process with the libraries imported made no copy: the zygote ended"
    )


def test_a_zygote_that_is_killed_during_a_run_takes_the_kernel_along(save, zygote):
    threading.Timer(3, zygote.process.kill).start()
    with pytest.raises(RunFailed) as caught:
        run(
            save(
                "import os; open('pid', 'w').write(str(os.getpid()))",
                "import time; time.sleep(60)",
            ),
            out="out",
        )
    assert caught.value.run.status == "killed" and caught.value.run.seconds < 20
    assert gone(int(Path("out/pid").read_text()))


def test_threads_that_ask_at_once_get_one_zygote():
    kernel.cool()
    with ThreadPoolExecutor(8) as pool:
        made = {id(each) for each in pool.map(lambda _: warmed(), range(8))}
    assert len(made) == 1
    alive = [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE
    ]
    assert (
        len(
            [
                child
                for child in alive
                if "kernel import serve" in " ".join(child.cmdline())
            ]
        )
        == 1
    )
    kernel.cool()


def test_another_environment_gets_another_zygote(zygote):
    other = kernel.warm({**environment(), "OTHER": "1"})
    assert other is not zygote and gone(zygote.process.pid), (
        "the first had no kernel left, so it ends"
    )


def test_a_retired_zygote_serves_its_kernels_to_their_end(save, zygote):
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            run,
            save("open('started', 'w').close()", "import time; time.sleep(4)", PARENT),
            out="out",
        )
        while not Path("out/started").exists():
            time.sleep(0.05)
        kernel.cool()
        assert running.result().metrics["parent"] == zygote.process.pid
    assert gone(zygote.process.pid)


OWNER = """
from bigmodel_nb.headless import kernel
from bigmodel_nb.headless.run import run
import os
kernel.warm()
run("mine.ipynb", out="out")
"""


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "busy and killed"]
)
def test_no_orphan_survives_the_death_of_its_owner(save, number):
    source = (
        "import os; open('pids', 'w').write(f'{os.getppid()} {os.getpid()}'); "
        "import pathlib; pathlib.Path('started').touch()"
    )
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
    maker = threading.Thread(target=warmed)
    maker.start()
    maker.join()
    time.sleep(0.3)
    assert run(save(PARENT), out="out").metrics["parent"] == warmed().process.pid
    kernel.cool()


def test_plain_papermill_forks_where_a_kernel_specification_says_so(save, monkeypatch):
    import papermill

    folder = Path("share/kernels/warm")
    folder.mkdir(parents=True)
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "warm",
        "language": "python",
        "metadata": {"kernel_provisioner": {"provisioner_name": "bigmodel-fork"}},
    }
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(Path("share").absolute()))
    zygote = warmed()
    done = papermill.execute_notebook(
        save("import os; os.getppid()"),
        "done.ipynb",
        kernel_name="warm",
        progress_bar=False,
    )
    assert done.cells[-1].outputs[0].data["text/plain"] == str(zygote.process.pid)
    kernel.cool()


@pytest.mark.parametrize(
    "command, ours",
    [
        ([sys.executable, "-m", "ipykernel_launcher", "-f", "x"], True),
        (["/other/python", "-m", "ipykernel_launcher"], False),
        ([sys.executable, "-m", "xeus_python"], False),
    ],
)
def test_only_the_kernel_of_this_python_is_forked(command, ours):
    assert kernel._is_ours(command) is ours


def test_a_sweep_and_a_fresh_kernel_look_at_the_same_files(workshop):
    """What may change a result makes a new run; a variable needs a fresh kernel."""
    import hashlib

    from nbformat.v4 import new_code_cell, new_notebook

    from bigmodel_nb.headless.kernel import code_beside
    from bigmodel_nb.headless.sweep import _program

    for path, text in {
        "one.py": "import two",
        "two.py": "from deep.inner import leaf",
        "deep/inner/leaf.py": "x = 1",
        "deep/other.py": "",
        "unused.py": "",
        "notes/plain.py": "",
    }.items():
        (workshop / path).parent.mkdir(parents=True, exist_ok=True)
        (workshop / path).write_text(text)
    source = "import one\n# one of the notes"
    nbformat.write(new_notebook(cells=[new_code_cell(source)]), workshop / "mine.ipynb")
    seen = {
        str(path.relative_to(workshop)): text
        for path, text in code_beside([source], workshop)
    }
    assert set(seen) == {"one.py", "two.py", "deep/inner/leaf.py", "deep/other.py"}
    assert _program(workshop / "mine.ipynb")[-1] == {
        name: hashlib.sha256(text).hexdigest() for name, text in sorted(seen.items())
    }
    for path in (*seen, "unused.py", "notes/plain.py"):
        before = (workshop / path).read_text()
        (workshop / path).write_text(f"{before}\nimport os\nos.environ['X'] = '1'")
        assert bool(kernel.needs_fresh([source], workshop)) == (path in seen), path
        (workshop / path).write_text(before)


# Of a zygote that has imported all


def test_a_run_forks_its_kernel_where_a_zygote_is_ready(save, whole_zygote):
    done = copied(
        save(
            PARENT,
            (
                "import sys; record('torch', 'torch' in sys.modules); "
                "record('ours', [m for m in sys.modules if m == "
                "'bigmodel_nb.headless'])"
            ),
        ),
        out="out",
    )
    assert done.metrics == {
        "parent": whole_zygote.process.pid,
        "torch": True,
        "ours": [],
    }


def test_a_forked_kernel_is_like_an_ordinary_one(save, whole_zygote):
    source = (
        RECORD
        + """
import os, random, sys, threading, numpy, torch, matplotlib
record('facts', {
    'name': __name__,
    'argv': sys.argv[1:2],
    'path': getattr(sys, 'pa' + 'th')[0],
    'folder': os.path.basename(os.getcwd()),
    'threads': torch.get_num_threads(),
    'backend': matplotlib.get_backend(),
    'spin': os.environ.get('GOMP_SPINCOUNT'),
    'leader': os.getsid(0) == os.getpid(),
    'input': sys.stdin.read(),
    'main': threading.current_thread() is threading.main_thread(),
})
draws = random.random(), float(numpy.random.rand()), torch.rand(())
record('draws', [*draws, torch.initial_seed()])
"""
    )
    forked, other = (
        copied(save(source), out="out/a").metrics,
        copied(save(source), out="out/a2").metrics,
    )
    kernel.cool()
    command = [
        sys.executable,
        "-c",
        (
            "import sys; from bigmodel_nb.headless.run import run; "
            "run('mine.ipynb', out='plain/a')"
        ),
    ]
    subprocess.run(command, check=True)
    plain = json.loads(Path("plain/a/metrics.json").read_text())["metrics"]
    assert forked["facts"] == plain["facts"]
    assert all(one != two for one, two in zip(forked["draws"], other["draws"])), (
        "each copy draws its own numbers"
    )


def test_a_copy_is_in_the_same_state_and_shows_the_same(save, whole_zygote):
    """What a kernel knows of itself after the imports, and what its cells show."""
    name = save(*STATE, name="state.ipynb")
    copied(name, out="forked")
    subprocess.run(
        [
            sys.executable,
            "-c",
            "from bigmodel_nb.headless.run import run; run('state.ipynb', out='fresh')",
        ],
        check=True,
        env={**os.environ},
    )  # not what C libraries have set beside it
    assert json.loads(Path("fresh/metrics.json").read_text())["kernel"] == "fresh"
    (before, after), (fresh_before, fresh_after) = (
        json.loads(Path(kind, "state.json").read_text()) for kind in ("forked", "fresh")
    )
    own = {"JPY_PARENT_PID", "PWD", "OLDPWD", "SHLVL", "_", "PYTEST_CURRENT_TEST"}
    for kind, state in (("forked", before), ("fresh", fresh_before)):
        folder = state["environment"]["BIGMODEL_CHECKPOINT"]
        assert folder == str(Path(kind, "checkpoints").absolute()), "each run's own"
    own.add("BIGMODEL_CHECKPOINT")
    for state in (before, after, fresh_before, fresh_after):
        state["environment"] = {
            key: value for key, value in state["environment"].items() if key not in own
        }
    heard = {
        key for key in before["environment"] if key not in fresh_before["environment"]
    }
    assert all(
        fresh_after["environment"].get(key) == before["environment"].pop(key)
        for key in heard
    ), "what the imports set"
    for key in before:
        assert before[key] == fresh_before[key], key
    assert set(fresh_after.pop("modules")) <= set(after.pop("modules")) | {
        "tqdm.contrib"
    }, "nothing is missing"
    filters, fresh_filters = after.pop("filters"), fresh_after.pop("filters")
    assert (
        sorted(filters) == sorted(fresh_filters) and filters[:8] == fresh_filters[:8]
    ), "those of libraries go first"
    for key in after:
        assert after[key] == fresh_after[key], key
    forked, fresh = (
        nbformat.read(Path(kind, "notebook.ipynb"), 4).cells[3:]
        for kind in ("forked", "fresh")
    )
    for one, other in zip(forked, fresh):
        assert told(one) == told(other), one.source


def test_what_one_forked_kernel_does_to_a_library_no_other_sees(save, whole_zygote):
    copied(
        save(
            "import torch, os; torch.marked = True; getattr(os, "
            "'env' + 'iron')['MARKED'] = '1'"
        ),
        out="a",
    )
    seen = copied(
        save(
            RECORD
            + (
                "import torch, os; record('seen', [hasattr(torch, 'marked'), "
                "os.environ.get('MARKED') is not None])"
            )
        ),
        out="b",
    )
    assert seen.metrics["seen"] == [False, False]


def test_the_gpu_is_not_touched_before_the_fork(save, whole_zygote):
    assert copied(
        save(
            RECORD
            + (
                "import torch; record('bad', torch.cuda._is_in_bad_fork()); "
                "record('touched', torch.cuda.is_initialized())"
            )
        ),
        out="out",
    ).metrics == {"bad": False, "touched": False}


def test_a_library_computes_with_all_its_threads_in_a_copy(save, whole_zygote):
    source = (
        RECORD
        + """
import numpy, torch
torch.set_num_threads(2)
a = torch.randn(600, 600)
other = torch.from_numpy(a.numpy() @ a.numpy())
record('same', bool(torch.allclose((a @ a), other, atol=1e-2)))
net = torch.nn.Linear(600, 600); net(a).sum().backward()
"""
    )
    assert copied(save(source), out="out", timeout=60).metrics == {"same": True}


def test_24_kernels_at_once(save, whole_zygote):
    name = save(
        RECORD
        + (
            "import os, torch; record('pid', os.getpid()); record('sum', "
            "torch.arange(4).sum())"
        )
    )
    with ThreadPoolExecutor(24) as pool:
        runs = list(
            pool.map(lambda number: copied(name, out=f"out{number}"), range(24))
        )
    assert {each.status for each in runs} == {"ok"} and len(
        {each.metrics["pid"] for each in runs}
    ) == 24
    assert all(each.metrics["sum"] == 6 for each in runs)
    assert all(gone(each.metrics["pid"]) for each in runs)
