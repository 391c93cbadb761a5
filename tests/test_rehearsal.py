"""The rehearsed GPU does what CUDA documents."""

import copy

import pytest
import torch
from rehearsal import CUDA, Rehearsal, Rehearsed


@pytest.fixture(autouse=True)
def gpu():
    with Rehearsal():
        yield


def test_where_tensors_are():
    x = torch.arange(3.0)
    made = [
        x.to("cuda"),
        x.to(CUDA),
        torch.tensor([1.0, 2.0], device="cuda"),
        torch.zeros(2, device="cuda:0"),
        torch.randn(2, device=CUDA),
        x.to("cuda").new_zeros(2),
        torch.zeros_like(x.to("cuda")),
        x.to("cuda") * 2,
        x.to(x.to("cuda")),
        x.to("cuda").double(),
    ]
    assert all(
        isinstance(t, Rehearsed) and t.is_cuda and t.device == CUDA for t in made
    )
    y = x.to("cuda")
    assert y.to("cuda") is y
    assert y.cpu().device.type == "cpu" and not isinstance(y.to("cpu"), Rehearsed)
    assert y.to("cpu", torch.float64).dtype == torch.float64
    assert y.sum().item() == 3 and y.tolist() == [0, 1, 2]


def test_mixing_is_refused():
    x, y = torch.ones(2, device="cuda"), torch.ones(2)
    for mix in (
        lambda: x + y,
        lambda: y @ x,
        lambda: torch.stack([x, y]),
        lambda: torch.where(y > 0, x, x),
        lambda: x.add_(y),
        lambda: torch.nn.Linear(2, 1)(x),
    ):
        with pytest.raises(RuntimeError, match="on the same device.*cuda:0 and cpu"):
            mix()
    assert (x + torch.tensor(1.0)).tolist() == [2, 2]
    assert x.copy_(torch.zeros(2)).tolist() == [0, 0]
    with pytest.raises(TypeError, match="Tensor.cpu"):
        x.numpy()


def test_indices_of_the_cpu():
    x = torch.arange(4.0, device="cuda")
    assert x[torch.tensor([1, 3])].tolist() == [1, 3]
    assert x[torch.tensor([True, False, False, True])].tolist() == [0, 3]
    x[torch.tensor([0])] = 9
    assert x.tolist() == [9, 1, 2, 3]
    with pytest.raises(RuntimeError, match="indices should be"):
        torch.arange(4.0)[torch.tensor([1], device="cuda")]


def test_generators():
    good = torch.Generator("cuda").manual_seed(3)
    first = torch.randn(2, device="cuda", generator=good)
    again = torch.Generator("cuda").manual_seed(3)
    assert torch.equal(first, torch.randn(2, device="cuda", generator=again))
    with pytest.raises(RuntimeError, match="'cuda' device type for generator"):
        torch.randn(2, device="cuda", generator=torch.Generator())
    with pytest.raises(RuntimeError, match="'cpu' device type for generator"):
        torch.rand(2, generator=good)
    with pytest.raises(RuntimeError, match="'cuda' device type for generator"):
        torch.empty(2, device="cuda").uniform_(generator=torch.Generator())
    assert good.initial_seed() == 3


@pytest.mark.parametrize("own", [True, False])
def test_numbers_of_its_own_or_those_of_the_cpu(own):
    def draws(device):
        torch.manual_seed(4)
        model = torch.nn.Linear(2, 2).to(device)  # its weights are drawn on the CPU
        generator = torch.Generator(device).manual_seed(3)
        named = torch.rand(8, generator=generator, device=device)
        return model.weight.cpu(), named.cpu(), torch.rand(8, device=device).cpu()

    with Rehearsal(own_numbers=own):
        alike = [torch.equal(*pair) for pair in zip(draws("cpu"), draws("cuda"))]
    assert alike == [True, not own, not own]


def test_state_of_the_random_stream():
    torch.cuda.manual_seed_all(1)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.rand(3, device="cuda"))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_is_the_step_of_the_cpu(kind):
    torch.manual_seed(0)
    here = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Flatten()
    )
    there = copy.deepcopy(here).to("cuda")
    x = torch.rand(4, 1, 5, 5)
    for model, input in ((here, x), (there, x.to("cuda"))):
        optimizer = kind(model.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(input).square().mean().backward()
            optimizer.step()
    for name, value in there.state_dict().items():
        assert value.device == CUDA
        assert torch.equal(value.cpu(), here.state_dict()[name])
    here.load_state_dict(there.state_dict())
    assert next(here.parameters()).device.type == "cpu"
    assert next(copy.deepcopy(there).parameters()).device == CUDA


def test_a_module_that_moves_keeps_its_parameters():
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    other.weight = weight = one.weight
    model = torch.nn.Sequential(one, other)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for device in ("cuda", "cpu"):
        model.to(device)
        assert one.weight is other.weight is weight
        assert weight.device.type == device == one.bias.device.type
        before = weight.tolist()
        model(torch.ones(1, 2, device=device)).sum().backward()
        optimizer.step()
        assert weight.tolist() != before


def test_data_is_exchanged():
    x = torch.nn.Parameter(torch.ones(2, device="cuda"))
    x.data = torch.zeros(3, device="cuda").to(torch.bfloat16)
    assert x.tolist() == [0, 0, 0] and x.dtype == torch.bfloat16 and x.is_cuda
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        x.data = torch.zeros(3)


def test_autocast_casts():
    layer = torch.nn.Linear(2, 2).to("cuda")
    x = torch.ones(1, 2, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
        assert torch.is_autocast_enabled("cuda") and y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.is_cuda and layer.weight.grad.dtype == torch.float32
    assert not torch.is_autocast_enabled("cuda") and layer(x).dtype == torch.float32


def test_the_gradient_comes_back_through_a_move():
    x = torch.ones(2, requires_grad=True)
    (x.to("cuda") * 3).cpu().sum().backward()
    assert x.grad.tolist() == [3, 3] and x.grad.device.type == "cpu"


def test_it_ends_as_it_began():
    with Rehearsal():
        pass
    assert torch.zeros(1).device.type == "cpu"
