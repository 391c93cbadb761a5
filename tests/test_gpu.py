"""On a real GPU: the parity of CPU and GPU. Without one each test is skipped."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bigmodel_nb.data.sources import digits, loader
from bigmodel_nb.kit.exercises import _seeded
from bigmodel_nb.models.language import GPT, GPTConfig
from bigmodel_nb.robust.attacks import PGD
from bigmodel_nb.training.loop import fit
from bigmodel_nb.training.objective import MixedPrecision, evaluate, supervised

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def batches():
    x, y = digits()
    return loader(x[:256], y[:256], batch_size=64)


def pair():
    here = net()
    return here, copy.deepcopy(here).to("cuda")


def test_fit_and_evaluate():
    runs, found = [], []
    for model, device in zip(pair(), ("cpu", "cuda")):
        run = fit(model, batches(), epochs=2, device=device)
        runs.append(torch.tensor(run.batch_losses))
        found.append(evaluate(model, batches(), device=device).loss)
    torch.testing.assert_close(*runs, rtol=1e-3, atol=1e-4)
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_attack():
    x, y = digits()
    x, y = x[:64], y[:64]
    here, there = pair()
    attack = PGD(0.1, steps=1)
    one, other = attack(here, x, y), attack(there, x.cuda(), y.cuda())
    assert other.is_cuda
    # a sign of a gradient near zero may differ
    assert (one - other.cpu()).abs().gt(1e-5).double().mean() < 0.01


def test_gpt():
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    here = GPT(config).eval()
    there = copy.deepcopy(here).to("cuda")
    ids = torch.arange(16).view(2, 8)
    torch.testing.assert_close(there(ids.cuda()).cpu(), here(ids), rtol=1e-3, atol=1e-4)


def test_mixed_precision():
    x, y = digits()
    x, y = x[:64], y[:64]
    objective = MixedPrecision(supervised(F.cross_entropy), torch.bfloat16)
    here, there = pair()
    one, other = objective(here, x, y), objective(there, x.cuda(), y.cuda())
    assert other.is_cuda
    torch.testing.assert_close(other.cpu().float(), one.float(), rtol=2e-2, atol=2e-2)


def test_the_cases_of_an_exercise_leave_the_generator_of_the_gpu_as_it_was():
    torch.rand(1, device="cuda")
    torch.cuda.manual_seed(3)
    expected = torch.rand(2, device="cuda")
    torch.cuda.manual_seed(3)
    with _seeded(5):
        first = torch.rand(2, device="cuda")
    assert torch.equal(torch.rand(2, device="cuda"), expected)
    with _seeded(5):
        assert torch.equal(torch.rand(2, device="cuda"), first)
