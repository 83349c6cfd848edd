"""How the tests compile a function, catch a synchronisation and count bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable


def compiler(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that compiles."""
    reason = "an older torch.compile (2.9 was tried) cannot trace the argument checks"
    return pytest.mark.slow(pytest.mark.skipif(torch.__version__ < "2.11", reason=reason)(test))


def compiled(loss: Callable[..., Tensor], **how: Any) -> tuple[Callable[..., Tensor], Any]:
    """The compiled loss, and what counts the graphs that were compiled, ``frame_count``."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(loss, fullgraph=True, backend=counter, **how), counter


class Trap(TorchDispatchMode):
    """Raises where the host would have to wait for a value of a tensor."""

    SYNCS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        assert name not in self.SYNCS, f"{name} synchronises with the device"
        return func(*args, **(kwargs or {}))


def allocated(run: Callable[[], object], device: str) -> int:
    """Bytes asked of torch's allocator while ``run`` runs: all of them on the CPU, the peak on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    return sum(max(e.nbytes(), 0) for e in events if e.name() == "[memory]")
