"""A pretended GPU on a CPU build of PyTorch: torch.cuda answers, its tensors are fake.

`start` is to be called before anything else imports torch. After it, under `FakeTensorMode`,
tensors on 'cuda' have shapes and no content; a number that the host reads from one is 0.0 (1.0 in
fp64), 1 or True, and each read is counted. torch.compile generates the CUDA code of the pretended
card, and the generated wrapper, with its allocations and frees in their order, is executed on fake
tensors; kernels are recorded, not launched. The process must end with `end`: the pretended device
cannot be torn down.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """What torch.cuda says of a GPU."""

    name: str
    capability: tuple[int, int]
    memory: int  # bytes
    processors: int
    shared_memory: int = 232448  # bytes that a block can have


CARDS = {
    "H100": Card("NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB, 132),
    "A100": Card("NVIDIA A100-SXM4-40GB", (8, 0), 40 * GIB, 108, 166912),
    "4090": Card("NVIDIA GeForce RTX 4090", (8, 9), 24 * GIB, 128, 101376),
    "T4": Card("Tesla T4", (7, 5), 15 * GIB, 40, 65536),
}


def build(directory: Path) -> Path:
    """Compile fake_cuda.cpp; returns the library.

    Raises:
        subprocess.CalledProcessError: g++ failed; it has said why.
    """
    torch = Path(find_spec("torch").origin).parent
    library = directory / "fake_cuda.so"
    subprocess.run(
        [
            "g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch}/include", "-o", library,
            Path(__file__).with_name("fake_cuda.cpp"), f"-L{torch}/lib", "-lc10", "-ltorch_cpu",
            f"-Wl,-rpath,{torch}/lib",
        ],
        check=True,
    )  # fmt: skip
    return library


def end() -> None:
    """End the process without tearing the pretended device down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def start(library: Path, card: Card, cuda: str = "13.0", cudnn: int = 91900) -> Recorder:
    """Pretend that this process has a GPU; returns what inductor generates for it from here on.

    Args:
        library: as `build` made it.
        cuda, cudnn: the versions that torch.version.cuda and torch.backends.cudnn name.
    """
    assert "torch" not in sys.modules, "torch must not be imported before"
    ctypes.CDLL(str(library))
    import torch

    torch.set_num_threads(1)
    torch.version.cuda = cuda
    torch.backends.cudnn.version = lambda: cudnn
    recorder = Recorder()
    _answer(torch, card)
    _read_numbers(recorder)
    _move_modules()
    _make_tensors()
    _save_zeros()
    _compile_for(card, recorder)
    return recorder


class _Nothing:
    """Stands for streams, events and device guards: each method does nothing."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def _answer(torch: Any, card: Card) -> None:
    """Have torch.cuda answer for the card."""
    major, minor = card.capability
    properties = SimpleNamespace(
        name=card.name, major=major, minor=minor, total_memory=card.memory,
        multi_processor_count=card.processors, warp_size=32, max_threads_per_block=1024,
        max_threads_per_multi_processor=2048 if major in (8, 9) and minor == 0 else 1536,
        regs_per_multiprocessor=65536, shared_memory_per_block=49152,
        shared_memory_per_block_optin=card.shared_memory, L2_cache_size=50 * 2**20,
        shared_memory_per_multiprocessor=card.shared_memory + 1024, gcnArchName="", uuid="0",
        clock_rate=1_980_000, memory_clock_rate=2_619_000, memory_bus_width=5120,
        is_integrated=0, is_multi_gpu_board=0,
    )  # fmt: skip
    state = torch.zeros(16, dtype=torch.uint8)
    answers = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
        "get_device_properties": properties, "get_device_capability": card.capability,
        "get_device_name": card.name, "is_bf16_supported": major >= 8, "_lazy_init": None,
        "set_device": None, "synchronize": None, "empty_cache": None, "memory_allocated": 0,
        "reset_peak_memory_stats": None, "max_memory_allocated": 0, "memory_reserved": 0,
        "get_rng_state": state,
        "mem_get_info": (card.memory, card.memory), "get_rng_state_all": [state],
        "set_rng_state": None, "manual_seed": None, "manual_seed_all": None,
        "current_stream": _Nothing(), "get_arch_list": [f"sm_{major}{minor}"],
    }  # fmt: skip
    for name, answer in answers.items():
        for module in (torch.cuda, torch.cuda.random, torch.cuda.memory):
            if hasattr(module, name):
                setattr(module, name, lambda *_, _answer=answer, **__: _answer)
    for name in ("device", "_DeviceGuard", "Event"):
        setattr(torch.cuda, name, _Nothing)
    for name, answer in {
        "_cuda_getCurrentRawStream": 0, "_cuda_getDevice": 0, "_cuda_setDevice": None,
        "_cuda_isCurrentStreamCapturing": False,
    }.items():  # fmt: skip
        setattr(torch._C, name, lambda *_, _answer=answer: _answer)


def _make_tensors() -> None:
    """What a CPU build cannot make: pinned memory (it is not), tensors on CUDA from numbers."""
    import torch
    from torch.utils._device import _device_constructors

    _device_constructors()  # `with torch.device(...)` notes the functions that it changes
    empty, tensor = torch.empty, torch.tensor
    torch.empty = lambda *arguments, pin_memory=False, **named: empty(*arguments, **named)
    torch.tensor = lambda data, device=None, **named: tensor(data, **named).to(device or "cpu")
    torch.Tensor.pin_memory = lambda self, device=None: self


def _save_zeros() -> None:
    """Files of fake tensors hold zeros."""
    import safetensors.torch
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    save = safetensors.torch.save_file

    def save_file(tensors: dict[str, Any], path: Path, metadata: dict[str, str]) -> None:
        real = {
            name: torch.zeros(t.shape, dtype=t.dtype) if isinstance(t, FakeTensor) else t
            for name, t in tensors.items()
        }
        save(real, path, metadata)

    safetensors.torch.save_file = save_file


def _move_modules() -> None:
    """`module.to` with new parameters: those of fake tensors cannot be exchanged in place."""
    import torch

    def apply(self: Any, function: Callable, recurse: bool = True) -> Any:
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    moved = torch.nn.Parameter(function(parameter.detach()))
                    module._parameters[name] = moved
            for name, buffer in module._buffers.items():
                module._buffers[name] = function(buffer)
        return self

    torch.nn.Module._apply = apply


def _read_numbers(recorder: Recorder) -> None:
    """What the host reads from a fake tensor."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    def number(tensor: torch.Tensor) -> float | int | bool:
        recorder.reads += 1
        if tensor.dtype.is_floating_point:
            return 1.0 if tensor.dtype == torch.float64 else 0.0
        return True if tensor.dtype == torch.bool else 1

    def to_list(tensor: torch.Tensor) -> Any:
        value: Any = number(tensor)
        for size in reversed(tensor.shape):
            value = [value] * size
        return value

    FakeTensor.tolist = to_list
    FakeTensor.item = FakeTensor.__float__ = FakeTensor.__bool__ = FakeTensor.__int__ = number


class Recorder:
    """What happened: the code that inductor generated, and how often the host read a number."""

    def __init__(self) -> None:
        self.wrappers: list[str] = []
        self.kernels: dict[str, str] = {}  # Triton's, by their names
        self.launches = 0
        self.reads = 0

    def cubins(self) -> dict[str, int]:
        """Compile every Triton kernel for the pretended card; the bytes of each one's binary."""
        import triton
        from torch._inductor.codecache import PyCodeCache
        from triton.compiler import ASTSource

        sizes = {}
        for name, source in self.kernels.items():
            kernel = getattr(PyCodeCache.load(source), name)
            config, meta = kernel.configs[0], kernel.triton_meta
            constants = {**meta.get("constants", {}), **config.kwargs}
            signature = {**meta["signature"], **dict.fromkeys(config.kwargs, "constexpr")}
            numbered = {(kernel.fn.arg_names.index(key),): v for key, v in constants.items()}
            compiled = triton.compile(
                ASTSource(kernel.fn, signature, numbered, meta["configs"][0]),
                target=triton.runtime.driver.active.get_current_target(),
                options={"num_warps": config.num_warps, "num_stages": config.num_stages},
            )
            sizes[name] = len(compiled.asm["cubin"])
        return sizes


def _compile_for(card: Card, recorder: Recorder) -> None:
    """Have inductor generate code for the card, and execute its wrappers on fake tensors."""
    import torch._inductor.config
    from torch._inductor.fx_passes import joint_graph

    torch._inductor.config.compile_threads = 1
    torch._inductor.config.force_disable_caches = True
    joint_graph.lazy_init = lambda *_, **__: None  # traces patterns on real tensors of the device
    _answer_dynamo(card)
    _answer_triton(card)
    _allocate_on_the_host(recorder)
    _fuse_rms_norm(recorder)
    _record_kernels(recorder)
    _execute_wrappers(recorder)


def _answer_dynamo(card: Card) -> None:
    """Answer for the card as Dynamo and inductor ask."""
    import torch
    from torch._dynamo import device_interface

    capability = 10 * card.capability[0] + card.capability[1]
    properties = torch.cuda.get_device_properties()

    class Interface(device_interface.CudaInterface):
        """torch.cuda, as they ask it."""

        is_available = is_triton_capable = staticmethod(lambda device=None: True)
        get_compute_capability = staticmethod(lambda device=None: capability)
        raise_if_triton_unavailable = staticmethod(lambda device=None: None)
        get_raw_stream = current_device = staticmethod(lambda device=None: 0)
        device_count = staticmethod(lambda: 1)
        set_device = synchronize = staticmethod(lambda device=None: None)
        get_device_properties = staticmethod(lambda device=None: properties)
        current_stream = staticmethod(lambda device=None: _Nothing())

        class Worker:
            """The same in a compile worker."""

            set_device = staticmethod(lambda device: None)
            current_device = staticmethod(lambda: 0)
            get_device_properties = staticmethod(lambda device=None: properties)

    device_interface.get_registered_device_interfaces()  # registers the real ones first
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, Interface)


def _answer_triton(card: Card) -> None:
    """Be the driver that Triton asks for the card."""
    import torch
    import triton
    from torch._inductor.runtime import triton_helpers
    from torch.utils import _triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 10 * card.capability[0] + card.capability[1], 32)

    class Driver:
        """What Triton asks a driver."""

        is_active = staticmethod(lambda: True)
        get_current_target = staticmethod(lambda: target)
        get_current_device = staticmethod(lambda: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))
        get_current_stream = staticmethod(lambda device=None: 0)
        get_device_capability = staticmethod(lambda device=None: card.capability)
        get_device_interface = staticmethod(lambda: torch.cuda)

    _triton.has_triton = _triton.has_triton_package = lambda: True
    triton.runtime.driver.set_active(Driver())
    triton_helpers.set_driver_to_gpu = lambda: None


def _allocate_on_the_host(recorder: Recorder) -> None:
    """What allocates on 'cuda' beside the fake mode gets memory of the host."""
    import torch

    library = torch.library.Library("aten", "IMPL")
    recorder.library = library  # its registrations live as long as it does

    def on_cpu(function: Callable) -> Callable:
        def allocate(*arguments: Any, dtype: Any = None, device: Any = None, **_: Any) -> Any:
            return function(*arguments, dtype=dtype, device="cpu")

        return allocate

    library.impl("empty.memory_format", on_cpu(torch.empty), "CUDA")
    library.impl("empty_strided", on_cpu(torch.empty_strided), "CUDA")


def _fuse_rms_norm(recorder: Recorder) -> None:
    """RMSNorm as one kernel, which a PyTorch with CUDA has and one without takes apart."""
    import torch

    def forward(input: Any, shape: list[int], weight: Any, epsilon: float | None) -> Any:
        rows = [*input.shape[: -len(shape)], *(1 for _ in shape)]
        return torch.empty_like(input), input.new_empty(rows, dtype=torch.float32)

    def backward(grad: Any, input: Any, shape: Any, rstd: Any, weight: Any, mask: Any) -> Any:
        return torch.empty_like(input), torch.empty_like(weight)

    for name, function in (("_fused_rms_norm", forward), ("_fused_rms_norm_backward", backward)):
        recorder.library.impl(name, function, "CUDA")


def _record_kernels(recorder: Recorder) -> None:
    """Keep each Triton kernel's source; count launches instead of launching."""
    from torch._inductor.async_compile import AsyncCompile

    def triton_kernel(self: Any, name: str, source: str, device_str: str = "cuda") -> Any:
        recorder.kernels[name] = source

        def launch(*_: Any, **__: Any) -> None:
            recorder.launches += 1

        return SimpleNamespace(run=launch)

    AsyncCompile.triton = triton_kernel
    AsyncCompile.wait = lambda self, scope: None


def _execute_wrappers(recorder: Recorder) -> None:
    """Run what inductor generates around the kernels, under the fake mode of its arguments."""
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensor

    def load(self: GraphLowering) -> Any:
        text = self.codegen()[0].value
        recorder.wrappers.append(text)
        # Allocations of the wrapper that bypass the dispatcher, as ones that a mode can see.
        text = text.replace(
            "empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cuda",
            "empty_strided_cuda = lambda s, t, d: "
            "torch.empty_strided(s, t, dtype=d, device='cuda')",
        )
        text = re.sub(
            r"^reinterpret_tensor = .*$",
            "reinterpret_tensor = lambda x, s, t, o=0: "
            "torch.as_strided(x, s, t, x.storage_offset() + o)",
            text,
            flags=re.MULTILINE,
        )
        scope = {"__name__": "wrapper", "__file__": "wrapper.py"}
        exec(compile(text, f"wrapper{len(recorder.wrappers)}.py", "exec"), scope)
        inner = scope["call"] if "call" in scope else scope["runner"].call

        def call(arguments: list) -> Any:
            modes = [a.fake_mode for a in arguments if isinstance(a, FakeTensor)]
            with modes[0] if modes else contextlib.nullcontext():
                return inner(arguments)

        return SimpleNamespace(
            call=call, __file__="wrapper.py", key="key", runner=scope.get("runner")
        )

    GraphLowering.compile_to_module = load
