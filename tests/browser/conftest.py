"""What the browser tests stand on.

The system's Chromium; on loopback a JupyterLab with a copy of the notebooks, and the
site.
"""

import asyncio
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import nbformat
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Playwright

ROOT = Path(__file__).resolve().parent.parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)
ARTEFACTS = Path(__file__).parent / "artefacts"
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "docmanager-extension/plugin": {"autosave": False},
    # cells out of sight are in the page too
    "notebook-extension/tracker": {"windowingMode": "none"},
}


@dataclass
class Started:
    """A browser, and the event loop in which Playwright runs it."""

    playwright: "Playwright"
    path: str  # of the program
    loop: asyncio.AbstractEventLoop
    browser: "Browser | None" = None

    def living(self) -> "Browser":
        """The browser; where it broke off, a new one, so that one test fails alone."""
        if self.browser is None or not self.browser.is_connected():
            self.browser = self.playwright.chromium.launch(
                executable_path=self.path, args=OPTIONS
            )
        return self.browser


@pytest.fixture(scope="session")
def started():
    """What starts the browser."""
    sync_api = pytest.importorskip(
        "playwright.sync_api",
        reason="Playwright is not installed: pip install playwright",
    )
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip(f"no browser was found on PATH: looked for {', '.join(BROWSERS)}")
    ARTEFACTS.mkdir(exist_ok=True)
    with sync_api.sync_playwright() as playwright:
        made = Started(playwright, found, asyncio.get_running_loop())
        made.living()
        asyncio._set_running_loop(None)
        yield made
        asyncio._set_running_loop(made.loop)
        if made.browser.is_connected():
            made.browser.close()


@pytest.fixture
def chromium(started, loop_of_playwright):
    """The system's Chromium or Chrome."""
    return started.living()


@pytest.fixture(autouse=True)
def loop_of_playwright(started):
    """Playwright's loop counts as running only within a browser test.

    Others in this process run loops of their own.
    """
    asyncio._set_running_loop(started.loop)
    yield
    asyncio._set_running_loop(None)


@dataclass
class Lab:
    """A JupyterLab server."""

    address: str  # http://127.0.0.1:PORT
    token: str
    root: Path  # the folder that it shows
    progress: Path  # where solved exercises are noted

    def ask(self, path: str, method: str = "GET"):
        """The server's answer to a request of its REST interface."""
        request = Request(
            f"{self.address}/api/{path}",
            method=method,
            headers={"Authorization": f"token {self.token}"},
        )
        with urlopen(request, timeout=20) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def write(self, path: str, notebook: nbformat.NotebookNode) -> str:
        """Put a notebook without its outputs into the server's folder; its path.

        So what is seen later was made here.
        """
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, self.root / path)
        return path

    def read(self, path: str) -> nbformat.NotebookNode:
        """A notebook as it lies in the server's folder."""
        return nbformat.read(self.root / path, as_version=4)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def where_it_answers(process: subprocess.Popen, runtime: Path, log: Path) -> dict:
    """What the server wrote of itself, once it has; it may have taken another port."""
    end = time.monotonic() + 90
    while time.monotonic() < end and process.poll() is None:
        for note in runtime.glob("jpserver-*.json"):
            try:
                said = json.loads(note.read_text(encoding="utf-8"))
                urlopen(f"{said['url']}api?token={said['token']}", timeout=5).close()
                return said
            except (OSError, ValueError):  # it listens in a moment
                pass
        time.sleep(0.1)
    raise AssertionError(
        f"JupyterLab did not start: {log.read_text(encoding='utf-8')[-2000:]}"
    )


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """JupyterLab with settings of its own, on a copy of the notebooks, no outputs."""
    from bigmodel_nb.headless.cli import copy_notebooks

    place = tmp_path_factory.mktemp("lab")
    root = place / "notebooks"
    progress = place / "progress"
    runtime = place / "runtime"
    log = place / "log.txt"
    copy_notebooks(root)
    for name, values in SETTINGS.items():
        path = place / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    }
    environment = {
        **os.environ,
        **{name: str(place / folder) for name, folder in folders.items()},
        "BIGMODEL_PROGRESS": str(progress),
    }
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "lab",
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={free_port()}",
        f"--IdentityProvider.token={os.urandom(16).hex()}",
        f"--ServerApp.root_dir={root}",
    ]
    with open(log, "w", encoding="utf-8") as said:
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=said, stderr=subprocess.STDOUT
        )
    try:
        found = where_it_answers(process, runtime, log)
        server = Lab(found["url"].rstrip("/"), found["token"], root, progress)
        for path in root.rglob("*.ipynb"):
            server.write(str(path.relative_to(root)), nbformat.read(path, as_version=4))
        yield server
        server.ask("shutdown", "POST")  # ends its kernels first
        process.wait(timeout=30)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=30)


@pytest.fixture
def page(chromium, lab, request):
    """A tab of its own that reached for nothing but this machine; a picture is kept."""
    context = chromium.new_context(
        viewport={"width": 1280, "height": 900}, reduced_motion="reduce"
    )
    foreign = []

    def note(asked):
        parts = urlsplit(asked.url)
        if parts.scheme not in ("data", "blob") and parts.hostname != "127.0.0.1":
            foreign.append(asked.url)

    context.on("request", note)
    tab = context.new_page()
    yield tab
    name = "".join(
        letter if letter.isalnum() else "-" for letter in request.node.name
    ).strip("-")
    tab.screenshot(path=ARTEFACTS / f"{name}.png")
    context.close()
    for session in lab.ask("sessions"):
        lab.ask(f"sessions/{session['id']}", "DELETE")
    assert not foreign, f"asked for {foreign}"


class Site(NamedTuple):
    """A site on this machine."""

    folder: Path
    address: str  # ends on a slash


class _Quiet(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass


@contextmanager
def serve(folder: Path):
    """`folder` as a site on loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=folder))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Site(folder, f"http://127.0.0.1:{server.server_port}/")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="session")
def serving():
    """What serves a folder: `with serving(folder) as site`."""
    return serve


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The course as a site, built once for all workers and served on loopback."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "course"
    with open(shared / "course.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "index.html").exists():
            made = subprocess.run(
                [sys.executable, str(ROOT / "docs" / "make_site.py"), str(folder)],
                capture_output=True,
                text=True,
            )
            assert made.returncode == 0, made.stdout + made.stderr
    with serve(folder) as served:
        yield served
