"""The report of a notebook that wants to fetch and to run things, in a real browser."""

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from bigmodel_nb.headless.report import page, to_html

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import nasty  # noqa: E402

ARTEFACTS = Path(__file__).parent / "artefacts"


@pytest.fixture
def stranger():
    """A server that remembers what it was asked for."""
    asked = []

    class Remembers(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Remembers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(network=f"127.0.0.1:{server.server_port}", asked=asked)
    server.shutdown()
    server.server_close()


def addressed(texts, network):
    return [
        text.replace("HOST", f"http://{network}").replace("NETWORK", network)
        for text in texts
    ]


def opened(chromium, path, name=None, **options):
    """What a page asked for, and whether it ran anything, with every link clicked."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, **options)
    tab, requests = context.new_page(), []
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(path.as_uri(), wait_until="commit")
    tab.wait_for_timeout(600)
    ran = tab.evaluate("window.ran")
    if name:
        ARTEFACTS.mkdir(exist_ok=True)
        tab.screenshot(path=ARTEFACTS / name, full_page=True)
    for link in tab.locator(".click").all() if tab.url == path.as_uri() else ():
        link.dispatch_event("click")
    tab.wait_for_timeout(100)
    ran, broken = (
        ran or tab.evaluate("window.ran"),
        tab.evaluate(
            "[...document.images].filter(each => !each.naturalWidth)"
            ".map(each => each.outerHTML.slice(0, 200))"
        ),
    )
    context.close()
    return SimpleNamespace(
        fetched=[
            url for url in requests if not url.startswith(("data:", path.as_uri()))
        ],
        ran=ran,
        broken=broken,
    )


def outputs(network):
    html = addressed([*nasty.FETCHING, *nasty.RUNNING], network)
    data = [{"text/html": each} for each in html]
    data += [{"text/markdown": each} for each in addressed(nasty.MARKDOWN, network)]
    data += [{"text/latex": each} for each in addressed(nasty.MARKDOWN[-4:], network)]
    data += [
        {"image/svg+xml": each}
        for each in addressed(
            [nasty.SVG, nasty.SVG.replace("</script>", "</script>&nbsp;")], network
        )
    ]
    data += [
        {"application/javascript": "window.ran = 50"},
        {"text/javascript": "window.ran = 51"},
    ]
    return [new_output("display_data", each) for each in data]


def test_the_server_would_be_asked_and_the_scripts_would_run(
    chromium, stranger, tmp_path
):
    """Without this, the tests below could not fail."""
    asking = 0
    for index, html in enumerate(addressed(nasty.FETCHING, stranger.network)):
        path = tmp_path / f"{index}.html"
        path.write_text(f"<!DOCTYPE html><main>{html}", encoding="utf-8")
        asking += bool(opened(chromium, path).fetched) if index % 4 == 0 else 0
    assert asking >= len(nasty.FETCHING) // 8, "at least half of those tried"
    path.write_text(f"<!DOCTYPE html>{nasty.RUNNING[0]}")
    assert opened(chromium, path).ran == 1


@pytest.mark.parametrize("look", ["light", "dark"])
def test_a_nasty_notebook_fetches_nothing_and_runs_nothing(
    chromium, stranger, tmp_path, look
):
    prose = [
        new_markdown_cell(each)
        for each in addressed(
            [*nasty.MARKDOWN, *nasty.FETCHING, *nasty.RUNNING], stranger.network
        )
    ]
    made = to_html(
        new_notebook(
            cells=[*prose, new_code_cell("nasty()", outputs=outputs(stranger.network))]
        ),
        {"status": "ok"},
        tmp_path,
    )
    (tmp_path / "report.html").write_text(made, encoding="utf-8")
    seen = opened(
        chromium,
        tmp_path / "report.html",
        f"report-nasty-{look}.png",
        color_scheme=look,
    )
    assert not seen.fetched and not stranger.asked and not seen.ran and not seen.broken
    (tmp_path / "second.html").write_text(
        made.replace("Content-Security-Policy", "x"), encoding="utf-8"
    )
    seen = opened(chromium, tmp_path / "second.html")
    assert not seen.fetched and not stranger.asked and not seen.ran, (
        "the sanitiser stands without the policy"
    )


def test_the_policy_stands_without_the_sanitiser(chromium, stranger, tmp_path):
    beyond = "refresh", "prefetch", "base"  # which a policy in a page does not reach
    for html in addressed(
        [
            each
            for each in [*nasty.FETCHING, *nasty.RUNNING]
            if not any(word in each for word in beyond)
        ],
        stranger.network,
    )[::5]:
        (tmp_path / "page.html").write_text(page("A page", html), encoding="utf-8")
        seen = opened(chromium, tmp_path / "page.html")
        assert not stranger.asked and not seen.ran, html
