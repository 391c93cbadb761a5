"""Every notebook runs from top to bottom, headlessly, at the quick budget, with the network off, and finds what it claims."""
import pytest
from nbformat.v4 import new_code_cell, new_notebook
import nbformat

from bigmodel_nb.headless.parameters import catalogue
from bigmodel_nb.headless.run import run


def accuracy(metric) -> float:
    return metric["value"] if isinstance(metric, dict) else metric


# What each notebook must find, as conditions on its recorded metrics. Bounds are those of the text, not of one machine.
EXPECTED = {
    "kit/record": lambda m: abs(m["pi"] - 3.14159) < 0.2,
    "kit/plots": lambda m: m["nearest_neighbour_accuracy"] > 0.95 and m["spread_largest_difference"] < 1e-3,
    "kit/core": lambda m: m["digits_accuracy"]["low"] > 0.9 and m["largest_difference_from_scipy"] < 1e-12 and m["wilson_lowest_coverage"] > 0.85,
    "headless/parameters": lambda m: m["let_through_here"] == 0 and m["let_through_by_papermill"] == m["bad_requests"],
    "headless/report": lambda m: m["addresses_fetched"] == 0 and m["formulas_translated"] == 1,
    "headless/run": lambda m: m["statuses"] == ["ok", "failed", "killed"] and abs(m["pi"] - 3.14159) < 0.15,
    "headless/cli": lambda m: m["exit_codes"] == [0, 2, 2, 2, 2, 2],
}


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_notebook_runs_and_finds_what_it_claims(name, tmp_path):
    done = run(name, out=tmp_path / "run")
    assert done.metrics, f"{name} records nothing"
    assert name in EXPECTED, f"{name} has no expectation in EXPECTED"
    assert EXPECTED[name](done.metrics), done.metrics
    assert done.peak_memory < 4096
    assert "<script" not in done.report.read_text(encoding="utf-8")
    outputs = [output for cell in nbformat.read(done.notebook, 4).cells for output in cell.get("outputs", [])]
    assert not [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]


def test_kernels_of_tests_have_no_network(tmp_path):
    cell = "import socket\nfrom bigmodel_nb.kit.record import record\n" \
           "try:\n    socket.create_connection(('192.0.2.1', 80), timeout=1)\nexcept OSError as error:\n    record('said', str(error))"
    nbformat.write(new_notebook(cells=[new_code_cell(cell)]), tmp_path / "reach.ipynb")
    done = run(str(tmp_path / "reach.ipynb"), out=tmp_path / "run")
    assert done.metrics["said"].startswith("the network is off in tests")
