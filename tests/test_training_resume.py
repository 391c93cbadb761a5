"""Chapter 4: a run that is stopped, and the auditor that looks for what it lost."""

import math
import textwrap

import numpy as np
import pytest
import torch

from bigmodel_nb.training.resume import ResumeReport, check_resume, differing


def expect_resume(m):
    assert m["exact_without"] == ["nothing"], (
        "only with every part the run ends where it would have, bit for bit"
    )
    assert all(far > 0 for part, far in m["distances"].items() if part != "nothing"), (
        "each part that is left out shows"
    )
    assert m["fit_sound"] and m["fit_differs"] == 0 and m["fit_kills"] >= 1, (
        "fit, killed and started again, is bit for bit the run that never stopped"
    )
    assert m["forgetful_differs"] > 0, "a forgotten generator is found"
    assert not m["tutorial_sound"], "the tutorial's pattern forgets random states"


LOOP = """
import os, sys, time, torch
from bigmodel_nb.kit.store import Checkpoints


def train(folder, remember=True, seeded=True):
    if seeded:
        torch.manual_seed(0)
    kept = Checkpoints(f"{folder}/kept")
    step, (w, state) = kept.newest() or (0, (torch.zeros(5), torch.get_rng_state()))
    if remember:
        torch.set_rng_state(state)
    for step in range(step, 40):
        w = w + torch.randn(5)
        time.sleep(0.03)
        kept.save(step + 1, (w, torch.get_rng_state()))
    return {"w": w, "sure": 1}


def forgets(folder):
    return train(folder, remember=False)


def unsteady(folder):
    return train(folder, seeded=False)


def fails(folder):
    raise OSError("the data are gone")


def fails_later(folder):
    if os.path.exists(f"{folder}/half"):
        raise EOFError("half a file")
    open(f"{folder}/half", "w").close()
    time.sleep(0.5)
    return torch.ones(1)


def leaves_a_file(folder):
    torch.save({"w": train(folder)["w"]}, f"{folder}/final.pt")


def leaves_nothing(folder):
    pass


def hangs(folder):
    time.sleep(600)
"""
HARD = dict(kills=2, signals=("SIGKILL",))
OFTEN = dict(kills=4, signals=("SIGKILL",))


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("scripts") / "audited_loop.py"
    path.write_text(textwrap.dedent(LOOP))
    return path


def test_a_sound_loop_passes_under_each_signal(script, tmp_path):
    report = check_resume(f"{script}:train", tmp_path / "a", kills=3)
    assert report and not report.differs and not report.unsteady
    assert report.compared == 2 and report.seconds >= 1.2
    assert "Nothing is lost" in str(report) and "bit for bit" in str(report)
    assert {name for name, _ in report.kills} <= {"SIGKILL", "SIGTERM", "SIGINT"}
    assert report.kills


def test_a_forgetful_loop_is_found(script, tmp_path):
    report = check_resume(f"{script}:forgets", tmp_path / "a", **OFTEN)
    assert not report and list(report.differs) == ["w"] and report.differs["w"] > 0
    assert "1 of 2 results differ, most w" in str(report)


def test_an_unsteady_script_is_not_blamed_on_its_checkpoints(script, tmp_path):
    report = check_resume(f"{script}:unsteady", tmp_path / "a", **HARD)
    assert not report and "w" in report.unsteady
    assert "Two runs that nobody stopped differ (in w)" in str(report)


def test_a_script_that_fails(script, tmp_path):
    with pytest.raises(
        RuntimeError, match="fails without being stopped.*data are gone"
    ):
        check_resume(f"{script}:fails", tmp_path / "a", **HARD)
    with pytest.raises(RuntimeError, match="left no file of weights"):
        check_resume(f"{script}:leaves_nothing", tmp_path / "b", **HARD)


def test_a_script_that_hangs_before_its_first_file(script, tmp_path):
    with pytest.raises(RuntimeError, match="it had not (begun|ended) after 5 s"):
        check_resume(f"{script}:hangs", tmp_path / "a", timeout=5, **HARD)


def test_a_script_that_does_not_start_again(script, tmp_path):
    report = check_resume(f"{script}:fails_later", tmp_path / "a", **HARD)
    assert not report and "EOFError: half a file" in report.error
    assert "did not start again" in str(report)


def test_files_are_compared_and_a_module_is_imported(script, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(script.parent))
    report = check_resume("audited_loop:leaves_a_file", tmp_path / "a", **HARD)
    assert report and report.compared == 1


def test_bad_arguments(script, tmp_path):
    with pytest.raises(ValueError, match='"module:function"'):
        check_resume("train", tmp_path / "a")
    with pytest.raises(ValueError, match="no other process finds"):
        check_resume(lambda folder: None, tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        check_resume(f"{tmp_path}/none.py:train", tmp_path / "a")
    for kills in (0, True, 1.5):
        with pytest.raises(ValueError, match="kills is"):
            check_resume(f"{script}:train", tmp_path / "a", kills=kills)
    with pytest.raises(ValueError, match="signals is"):
        check_resume(f"{script}:train", tmp_path / "a", signals=("SIGNONE",))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis").touch()
    with pytest.raises(ValueError, match="which holds something"):
        check_resume(f"{script}:train", tmp_path / "full")


def test_differing():
    nan, zero = torch.tensor([math.nan]), torch.tensor(0.0)
    assert differing({"a": nan, "z": [zero]}, {"a": nan.clone(), "z": [zero]}) == {}
    assert differing([zero], [-zero]) == {"[0]": 0.0}, "the sign of zero is a bit"
    assert differing({"a": torch.ones(2)}, {"a": torch.tensor([1.0, 3.0])}) == {"a": 2}
    assert differing({"a": 1}, {"b": 1}) == {"a": math.inf, "b": math.inf}
    assert differing(torch.ones(2), torch.ones(3)) == {"result": math.inf}
    assert differing("a", "b") == {"result": math.inf}
    assert differing(np.ones(1), np.ones(1, "f4")) == {"result": 0.0}
    assert not ResumeReport({}, {}, [], 1.0, "failed", went_on=1)
    assert ResumeReport({}, {}, [], 1.0, went_on=1)
    idle = ResumeReport({}, {}, [("SIGKILL", 1.0)], 1.0)
    assert not idle and "Nothing was tested" in str(idle)
