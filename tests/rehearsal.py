"""A GPU, rehearsed: tensors that say `cuda:0`, compute on the CPU, and refuse to mix.

Within `with Rehearsal():` each tensor made on or moved to "cuda" is a `Rehearsed`.
An operation between it and a CPU tensor raises CUDA's error, with CUDA's exceptions
to that rule: CPU tensors without dimensions, `copy_`, `to`, and CPU tensors of long or
bool as indices. `.numpy()` and a generator of the wrong device are refused.

What it cannot show: the numerics of CUDA's kernels (they differ from the CPU's in the
last digits, and in what autocast chooses), errors that arrive asynchronously, memory,
streams and graphs. C++ believes in the CPU still: zeros which autograd makes for
missing gradients come without the mark, so that mixing is not looked at within the
backward pass (`_current_graph_task_id`). Code that C++ runs without the dispatcher is
not seen either. `autocast("cuda")` casts as it does on the CPU. A random draw on
"cuda:0" has a stream of its own, whose numbers are not CUDA's, only others than the
CPU's of the same seed. With `Rehearsal(own_numbers=False)` a seed gives what it gives
on the CPU, and without a generator both devices draw from one stream.
"""

from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bigmodel_nb.kit.core import best_dtype

CUDA = torch.device("cuda", 0)
MOVES = {"aten::copy_", "aten::_to_copy"}
INDEXING = {
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
    "aten::_unsafe_index",
}
NEW = {"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"}
Plain = torch._C.DisableTorchFunctionSubclass
CPUGenerator = torch.Generator


class Rehearsed(torch.Tensor):
    """A tensor on the rehearsed GPU; `inner` holds its values, on the CPU."""

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device("cpu"),
            requires_grad=requires_grad,
        )
        self.inner = inner
        return self

    def __repr__(self, **_):
        return f"{self.inner!r} on {CUDA}"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        x = args[0] if args else None
        if func == torch.Tensor.device.__get__:
            return CUDA
        if func == torch.Tensor.is_cuda.__get__:
            return True
        if func == torch.Tensor.is_cpu.__get__:
            return False
        if func == torch.Tensor.data.__set__:
            return take(*args)
        if name == "get_device":
            return 0
        if name == "to" or name == "type_as":
            return move(x, args[1:], kwargs)
        if isinstance(x, Rehearsed):
            if name == "cpu":
                return Down.apply(x)
            if name == "cuda":
                return x
            if name in ("numpy", "__array__"):
                raise TypeError(
                    "can't convert cuda:0 device type tensor to numpy. Use "
                    "Tensor.cpu() to copy the tensor to host memory first."
                )
            if name in ("tolist", "data_ptr", "untyped_storage"):
                with Plain():
                    return getattr(x.inner, name)()
            if name == "__deepcopy__":
                return deep(x, args[1])
            if name in NEW and kwargs.get("device") is None:
                kwargs["device"] = CUDA
        with Plain():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def take(x, value):
    """`x.data = value`."""
    if not (isinstance(x, Rehearsed) and isinstance(value, Rehearsed)):
        raise RuntimeError(
            "Attempted to call `variable.set_data(tensor)`, but `variable` and"
            " `tensor` have incompatible tensor type."
        )
    with Plain():
        torch.Tensor.data.__set__(x, value)
    x.inner = value.inner


class Down(torch.autograd.Function):
    """From the rehearsed GPU to the CPU."""

    @staticmethod
    def forward(ctx, x):
        return x.inner.detach().clone()

    @staticmethod
    def backward(ctx, gradient):
        return Rehearsed(gradient)


class Up(torch.autograd.Function):
    """From the CPU to the rehearsed GPU."""

    @staticmethod
    def forward(ctx, x):
        return Rehearsed(x.detach().clone())

    @staticmethod
    def backward(ctx, gradient):
        return bare(gradient)


def move(x, args, kwargs):
    """`x.to(...)`, whatever of device, dtype and other tensor it is called with."""
    device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
    other = kwargs.pop("other", None)
    for each in (*args, other):
        if isinstance(each, torch.Tensor):
            device, dtype = each.device, each.dtype
        elif isinstance(each, torch.dtype):
            dtype = each
        elif isinstance(each, (str, torch.device, int)) and not isinstance(each, bool):
            device = each
    copy = kwargs.get("copy", False)
    kind = None if device is None else torch.device(device).type
    if kind == "cpu" and isinstance(x, Rehearsed):
        x, copy = Down.apply(x), False
    with Plain():
        if kind == "cuda" and not isinstance(x, Rehearsed):
            x, copy = Up.apply(x), False
        if dtype is None:
            return x.clone() if copy else x
        return TO(x, dtype, copy=copy)


TO, TENSOR, AS_TENSOR = torch.Tensor.to, torch.tensor, torch.as_tensor


def made(function):
    """`torch.tensor` and its like, whose C++ would start CUDA."""

    def call(*args, device=None, **kwargs):
        x = args[0]
        if isinstance(x, Rehearsed) and function is AS_TENSOR:
            return move(x, (), {"device": device, **kwargs})
        if device is None or torch.device(device).type != "cuda":
            x = x.inner if isinstance(x, Rehearsed) else x
            return function(x, *args[1:], device=device, **kwargs)
        wants = kwargs.pop("requires_grad", False)
        x = function(bare(x), *args[1:], **kwargs)
        with torch.no_grad():
            x = move(x, (), {"device": CUDA})
        return x.requires_grad_(wants)

    return call


def deep(x, memo):
    """A deep copy, with its gradient and its class of parameter."""
    if id(x) in memo:
        return memo[id(x)]
    with Plain():
        twin = Rehearsed(x.inner.clone(), x.requires_grad)
        if isinstance(x, torch.nn.Parameter):
            twin = torch.nn.Parameter(twin, x.requires_grad)
        if x.grad is not None:
            twin.grad = x.grad.clone()
    memo[id(x)] = twin
    return twin


class Generator:
    """What `torch.Generator("cuda")` makes: a CPU generator with the GPU's mark."""

    device = CUDA
    own_numbers = True  # whether a seed gives others than it does on the CPU

    def __init__(self):
        self.inner, self.seed = CPUGenerator(), 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def manual_seed(self, seed):
        self.seed = seed
        self.inner.manual_seed(seed ^ 0x5EED if Generator.own_numbers else seed)
        return self

    def initial_seed(self):
        return self.seed


class EitherGenerator(type):
    """`torch.Generator` within a rehearsal: makes, and knows, both kinds."""

    def __call__(cls, device="cpu"):
        return CPUGenerator() if torch.device(device).type == "cpu" else Generator()

    def __instancecheck__(cls, x):
        return isinstance(x, (CPUGenerator, Generator))


class AnyGenerator(metaclass=EitherGenerator):
    pass


def compute(func, args, kwargs):
    """Run one operator of ATen on the values, and mark what belongs on the GPU."""
    kwargs = dict(kwargs)
    flat, _ = pytree.tree_flatten((args, kwargs))
    held = [x for x in flat if isinstance(x, Rehearsed)]
    loose = [
        x
        for x in flat
        if isinstance(x, torch.Tensor) and not isinstance(x, Rehearsed) and x.dim()
    ]
    name, first = func._schema.name, args[0] if args else None
    moves, indexing = name in MOVES, name in INDEXING
    if indexing and isinstance(first, Rehearsed):
        kinds = (torch.long, torch.int, torch.bool, torch.uint8)
        index = {id(i) for i in args[1] if i is not None and i.dtype in kinds}
        loose = [x for x in loose if id(x) not in index]
    backward = torch._C._current_graph_task_id() != -1
    if held and loose and not moves and not backward:
        if indexing:
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the "
                "indexed tensor (cpu)"
            )
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two "
            f"devices, cuda:0 and cpu! (when calling {name})"
        )
    device = kwargs.get("device")
    if backward and name == "aten::_to_copy":  # of a dtype: C++ names its own device
        device = None
    if device is not None:
        on_gpu = torch.device(device).type == "cuda"
    elif name == "aten::copy_":
        on_gpu = isinstance(first, Rehearsed)
    else:
        on_gpu = bool(held)
    check_generator(kwargs.get("generator"), on_gpu)
    a, k = pytree.tree_map(bare, (args, kwargs))
    given = k.get("generator") is not None
    k.pop("pin_memory", None)
    if on_gpu and torch.Tag.nondeterministic_seeded in func.tags and not given:
        out = from_stream(func, a, k)
    else:
        out = func(*a, **k)
    if func._schema.is_mutable and name.endswith("_") and isinstance(first, Rehearsed):
        return first
    if not on_gpu:
        return out
    known = {id(x.inner): x for x in held}
    return pytree.tree_map(
        lambda x: (
            (known[id(x)] if id(x) in known else Rehearsed(x))
            if isinstance(x, torch.Tensor)
            else x
        ),
        out,
    )


def from_stream(func, args, kwargs):
    """Draw from the GPU's stream of random numbers, and leave the CPU's alone."""
    if STREAM.inner is torch.default_generator:
        return func(*args, **kwargs)
    state = torch.get_rng_state()
    try:
        torch.set_rng_state(STREAM.get_state())
        return func(*args, **kwargs)
    finally:
        STREAM.set_state(torch.get_rng_state())
        torch.set_rng_state(state)


def bare(x):
    if isinstance(x, (Rehearsed, Generator)):
        return x.inner
    return torch.device("cpu") if isinstance(x, torch.device) else x


def check_generator(generator, on_gpu):
    if generator is None or (generator.device.type == "cuda") == on_gpu:
        return
    want, came = ("cuda", "cpu") if on_gpu else ("cpu", "cuda")
    raise RuntimeError(
        f"Expected a '{want}' device type for generator but found '{came}'"
    )


STREAM = Generator()  # torch.cuda's default generator


def drawn(function):
    """A function that draws, made to know the stand-in for CUDA's generators.

    The binding of C++ accepts no generator but its own, so the stand-in is taken away
    before it and the draw is made on the CPU, with the generator's own numbers.
    """

    def call(*args, **kwargs):
        generator = kwargs.get("generator")
        if generator is None:
            return function(*args, **kwargs)
        method = args and isinstance(args[0], torch.Tensor)
        device = args[0].device if method else kwargs.get("device") or "cpu"
        on_gpu = torch.device(device).type == "cuda"
        check_generator(generator, on_gpu)
        if not on_gpu:
            return function(*args, **kwargs)
        kwargs["generator"] = generator.inner
        if not method:
            kwargs["device"] = "cpu"
            return function(*args, **kwargs).to(CUDA)
        with torch.no_grad():
            plain = [bare(a) for a in args]
            out = function(*plain, **kwargs)
        return args[0] if out is plain[0] else Rehearsed(out)

    return call


AUTOCAST, AUTOCASTS = torch.autocast, torch.is_autocast_enabled


class Autocast(AUTOCAST):
    """`torch.autocast`; C++ takes the rehearsed GPU's tensors for the CPU's."""

    def __init__(self, device_type, dtype=None, enabled=True, cache_enabled=None):
        if device_type == "cuda":
            dtype, device_type = dtype or torch.get_autocast_dtype("cuda"), "cpu"
        super().__init__(device_type, dtype, enabled, cache_enabled)


class Rehearsal(TorchDispatchMode):
    """Within it, "cuda" is there."""

    def __init__(self, own_numbers=True):
        super().__init__()
        self.own_numbers = own_numbers

    def __enter__(self):
        Generator.own_numbers = self.own_numbers
        STREAM.inner = CPUGenerator() if self.own_numbers else torch.default_generator
        if self.own_numbers:
            STREAM.manual_seed(0)
        native = best_dtype("cpu") == torch.bfloat16
        cuda = {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "synchronize": lambda device=None: None,
            "is_bf16_supported": lambda including_emulation=True: native,
            "get_device_name": lambda device=None: "rehearsed",
            "get_device_capability": lambda device=None: (8, 0),
            "get_device_properties": lambda device=None: SimpleNamespace(
                name="rehearsed", total_memory=2**34, major=8, minor=0
            ),
            "get_rng_state": lambda device=None: STREAM.get_state(),
            "set_rng_state": lambda state, device=None: STREAM.set_state(state),
            "get_rng_state_all": lambda: [STREAM.get_state()],
            "set_rng_state_all": lambda states: STREAM.set_state(states[0]),
            "manual_seed": lambda seed: STREAM.manual_seed(seed),
            "manual_seed_all": lambda seed: STREAM.manual_seed(seed),
            "max_memory_allocated": lambda device=None: 0,
            "reset_peak_memory_stats": lambda device=None: None,
            "mem_get_info": lambda device=None: (2**33, 2**34),
        }
        stream = SimpleNamespace(is_capturing=lambda: False)
        accelerator = {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_accelerator": lambda check_available=False: torch.device("cuda"),
            "current_stream": lambda device=None: stream,
            "synchronize": lambda device=None: None,
            "memory_allocated": lambda device=None: 0,
            "max_memory_allocated": lambda device=None: 0,
            "reset_peak_memory_stats": lambda device=None: None,
        }
        swaps = [mock.patch.object(torch.cuda, name, f) for name, f in cuda.items()]
        swaps += [
            mock.patch.object(torch.accelerator, name, f)
            for name, f in accelerator.items()
        ]
        swaps += [
            mock.patch.object(torch, "Generator", AnyGenerator),
            mock.patch.object(torch, "autocast", Autocast),
            mock.patch.object(
                torch,
                "is_autocast_enabled",
                lambda kind="cuda": AUTOCASTS("cpu" if kind == "cuda" else kind),
            ),
        ]
        for name in ("rand", "randn", "randint", "randperm", "multinomial"):
            swaps.append(mock.patch.object(torch, name, drawn(getattr(torch, name))))
        for name in ("bernoulli", "normal"):
            swaps.append(mock.patch.object(torch, name, drawn(getattr(torch, name))))
        for name in ("uniform_", "normal_", "random_", "bernoulli_", "exponential_"):
            method = drawn(getattr(torch.Tensor, name))
            swaps.append(mock.patch.object(torch.Tensor, name, method))
        swaps += [
            mock.patch.object(torch, "tensor", made(TENSOR)),
            mock.patch.object(torch, "as_tensor", made(AS_TENSOR)),
            mock.patch.object(torch.Tensor, "to", lambda x, *a, **k: move(x, a, k)),
            mock.patch.object(torch.Tensor, "cuda", lambda x, *_, **__: x.to(CUDA)),
        ]
        self.swaps = swaps
        for swap in swaps:
            swap.start()
        torch.__future__.set_swap_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *error):
        torch.__future__.set_swap_module_params_on_conversion(False)
        for swap in reversed(self.swaps):
            swap.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})
