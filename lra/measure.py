"""What a run measures: clocks, peak memory, and the facts of its machine and code."""

import contextlib
import os
import platform
import subprocess
import time
import weakref
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lra import ranks
from lra.files import disk_is_full, full_disk

PHASES = ("train", "evaluate", "other")


class Clock:
    """Three clocks of which exactly one runs.

    Args:
        device: The device to wait for before a clock is read.
    """

    def __init__(self, device: torch.device) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._device = device
        self._phase = "other"
        self._since = time.perf_counter()

    def switch(self, phase: str) -> None:
        """Stops the running clock and starts that of ``phase``."""
        if phase != self._phase:
            self.read()
            self._phase = phase

    def carry(self, seconds: dict[str, float]) -> None:
        """Adds the seconds of earlier sessions."""
        for phase, earlier in seconds.items():
            self._seconds[phase] += earlier

    def read(self) -> dict[str, float]:
        """Returns the seconds on each clock, once the device has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._seconds[self._phase] += now - self._since
        self._since = now
        return dict(self._seconds)

    def total(self) -> float:
        """Returns the seconds on all clocks, without waiting for the device."""
        return sum(self._seconds.values()) + time.perf_counter() - self._since


class PeakMemory:
    """Peak memory above what is held when this object is made.

    On CUDA the bytes that torch's allocator hands out; on Linux the resident set, whose
    high-water mark the kernel resets on request (`/proc/self/clear_refs`).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.kind = "none: only CUDA and Linux have a resettable peak"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._start = torch.cuda.memory_allocated(device)
            self.kind = "CUDA memory allocated by torch"
        elif Path("/proc/self/clear_refs").exists():
            try:
                Path("/proc/self/clear_refs").write_text("5")
                self._start = _status_bytes("VmRSS")
                self.kind = "resident set"
            except OSError as error:
                self.kind = f"none: the peak cannot be reset ({error.strerror})"

    def read(self) -> int | None:
        """Returns the peak in bytes, or None where it cannot be measured."""
        if self.kind.startswith("none"):
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._start
        return _status_bytes("VmHWM") - self._start


class _Allocations(TorchDispatchMode):
    """Adds up the bytes of tensors that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {key for key, _ in _storages((args, kwargs))}
        for key, storage in _storages(out):
            if key not in given and key not in self._known:
                size = storage.nbytes()
                self._known.add(key)
                self.alive += size
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._freed, key, size)
        return out

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def _storages(tree: Any) -> list[tuple[int, torch.UntypedStorage]]:
    storages = (x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor))
    return [(storage._cdata, storage) for storage in storages]


def allocated_peak(call: Callable[[], object]) -> int:
    """Returns the peak bytes of the tensors that ``call`` makes, forward and backward.

    Exact and the same on every machine; what an operation needs inside itself is not seen.
    """
    with _Allocations() as allocations:
        call()
    return allocations.peak


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


_elsewhere = False


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """While other machines' runs are planned, such as a cluster's, a GPU need not be here."""
    global _elsewhere
    before, _elsewhere = _elsewhere, True
    try:
        yield
    finally:
        _elsewhere = before


def resolve_device(setting: str) -> torch.device:
    """Returns the device for ``device=``; of several processes each has a GPU of its own.

    Raises:
        ValueError: If there is no such device.
    """
    several = ranks.count() > 1
    if setting == "auto":
        setting = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(setting)
    except RuntimeError:
        raise ValueError(f"device={setting} is no device: use auto, cpu, cuda, cuda:1.") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={setting} is not supported: use auto, cpu, cuda, cuda:1.")
    if device.type == "cpu" or _elsewhere:
        return device
    count = torch.cuda.device_count()
    if several and device.index is not None:
        raise ValueError(
            f"device={setting} is one GPU, but {ranks.count()} processes need one each: use "
            f"device=cuda."
        )
    if several and ranks.local_index() >= count:
        raise ValueError(
            f"Each process needs a GPU of its own, but torch sees {count}: start no more than "
            f"that, as torchrun --nproc_per_node={max(1, count)}."
        )
    if several:
        return torch.device("cuda", ranks.local_index())
    if (device.index or 0) >= count:
        raise ValueError(f"device={setting} is not there: torch sees {count} CUDA devices.")
    return device


def resolve_precision(setting: str, device: torch.device) -> tuple[str, str]:
    """Returns ``fp32`` or ``bf16`` for ``precision=``, and the reason.

    Raises:
        ValueError: If it is that of a GPU elsewhere.
    """
    if setting != "auto":
        return setting, "asked for"
    if device.type == "cpu":
        return "fp32", "auto: CPU"
    if _elsewhere and not torch.cuda.is_available():
        raise ValueError(
            "precision=auto is what the GPU can do, and this machine has none to ask: say "
            "precision=bf16 (A100, H100 and later) or precision=fp32."
        )
    if torch.cuda.is_bf16_supported():
        return "bf16", "auto: the GPU computes in bf16"
    return "fp32", "auto: the GPU does not compute in bf16"


def failure(error: Exception) -> tuple[Literal["oom", "failed"], str]:
    """Returns the status and the reason for an error that ended a run."""
    message = str(error).strip() or type(error).__name__
    if out_of_memory(error):
        return "oom", message.splitlines()[0]
    if isinstance(error, ValueError):
        return "failed", message
    if isinstance(error, OSError) and disk_is_full(error):
        return "failed", full_disk(error)
    return "failed", f"{type(error).__name__}: {message.splitlines()[0]}"


def out_of_memory(error: Exception) -> bool:
    """Tells whether an error says that memory has run out, of the device or of the machine."""
    told = ("can't allocate", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    message = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in message for words in told
    )


def device_facts(device: torch.device) -> dict[str, Any]:
    """Returns the device's kind and name, and the number of threads."""
    if device.type == "cpu":
        name = _cpu_name()
    else:
        name = "elsewhere" if _elsewhere else torch.cuda.get_device_name(device)
    return {"kind": device.type, "name": name, "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("lra", "numpy", "hydra-core", "datasets", "wandb"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any]:
    """Returns the git commit of the code, and whether code or configuration differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        ).stdout.strip()

    try:
        root = Path(__file__).parents[1]
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return {"commit": "unknown", "dirty": None}
        code = ("lra", "models", "conf", "pyproject.toml")
        dirty = bool(git("-C", str(root), "status", "--porcelain", "--", *code))
        return {"commit": git("rev-parse", "HEAD"), "dirty": dirty}
    except (OSError, subprocess.SubprocessError):
        return {"commit": "unknown", "dirty": None}
