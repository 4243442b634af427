"""Numba kernels of fastebm for CPUs, imported as ``fastebm.kernels.cpu``, and how they are loaded and called.

philox.py       the noise stream: words, uniforms, normals
update.py       noise, update and clamp in one pass
activations.py  activations with their slopes
mlp.py          the layers of an MLP
leapfrog.py     leapfrog steps of HMC
pool.py         draws of chains, and their rows
program.py      lists of calls, run without Python in between
jit.py          how they are compiled

A kernel is a C function of one argument, the address of a block of 64-bit values (addresses, integers, float32 in the
low half), which ``Kernel`` fills. It runs without the GIL on the calling thread; some may run on several threads at
once. Machine code is cached on disk: the first process on a machine imports Numba and compiles, which takes seconds,
and later ones load it in some 10 ms. Numba's own cache would not do, because reading it needs all of Numba.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import struct
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import program

__all__ = [
    "CHUNK",
    "DRIFT",
    "LANGEVIN",
    "NORMAL",
    "UNIFORM",
    "WORDS",
    "Call",
    "Kernel",
    "listed",
    "load",
    "scratch",
    "why_not",
]

# Counters that a kernel draws from at once: their words and normals take 32 KiB, the L1 cache of most cores.
CHUNK = 1024

# What ``update.draw`` does; ``update.update`` does the last two.
WORDS, UNIFORM, NORMAL, LANGEVIN, DRIFT = range(5)

_lock = threading.RLock()
_kept: list[Any] = []  # LLVM engines: they own machine code in use


@cache
def why_not() -> str | None:
    """Why these kernels can't run in this process; None if they can. Finds out by loading one."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return "NUMBA_DISABLE_JIT is set"
    if importlib.util.find_spec("numba") is None:
        return "the package numba is not installed"
    try:
        load("update.draw")
    except Exception as error:  # a numpy that is too new for Numba, a broken llvmlite, no executable memory, ...
        return f"numba does not work here: {type(error).__name__}: {error}"
    return None


class Call:
    """A kernel with its arguments, to be run any number of times.

    block: the arguments as 64-bit values. kept: owners of the memory that they point to.
    """

    __slots__ = ("block", "kept", "kernel")

    def __init__(self, kernel: Kernel, block: Any, kept: object) -> None:
        self.kernel, self.block, self.kept = kernel, block, kept

    def __call__(self) -> None:
        self.kernel.run(self.block)

    def again(self, **arguments: Tensor | int) -> Call:
        """A copy of this call with other values of some arguments."""
        call = Call(self.kernel, type(self.block).from_buffer_copy(self.block), (self.kept, arguments))
        call.aim(**arguments)
        return call

    def aim(self, **arguments: Tensor | int) -> None:
        """Replace some arguments in place, faster than a new call. The caller must keep the tensors alive."""
        for name, value in arguments.items():
            i = self.kernel.place[name]
            self.block[i] = value if isinstance(value, int) else _address(self.kernel.kinds[i], value)


class Kernel:
    """A C function. arguments: names and types, "int", "float", or anything else for an address."""

    def __init__(self, address: int, arguments: dict[str, str]) -> None:
        self.address, self.kinds = address, list(arguments.values())
        self.place = {name: i for i, name in enumerate(arguments)}  # of an argument in the block
        self.run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)  # releases the GIL
        self._layout = struct.Struct("=" + "".join("f4x" if kind == "float" else "q" for kind in self.kinds))
        self._block = ctypes.c_int64 * len(self.kinds)

    def prepared(self, *arguments: Any) -> Call:
        """arguments: numbers, and tensors, which the call keeps alive, or None for arrays."""
        values = [
            value if kind in _NUMBERS else 0 if value is None else _address(kind, value)
            for kind, value in zip(self.kinds, arguments, strict=True)
        ]
        return Call(self, self._block.from_buffer_copy(self._layout.pack(*values)), arguments)

    def __call__(self, *arguments: Any) -> None:
        self.prepared(*arguments)()


_NUMBERS = ("int", "float")

_DTYPES = {
    "f32s": (torch.float32,),
    "i32s": (torch.int32,),
    "i64s": (torch.int64,),
    "u8s": (torch.uint8, torch.bool),
    "u32s": (torch.float32,),  # scratch
}


def _address(kind: str, value: Tensor) -> int:
    """Of a tensor on the CPU with contiguous rows. Checked here, because a kernel would silently read garbage."""
    whole = value.is_contiguous() or value.numel() <= 1 or value.shape[-1] <= 1 or value.stride(-1) == 1
    if not (whole and value.dtype in _DTYPES[kind] and value.is_cpu) or value.is_neg():
        raise TypeError(
            f"a kernel takes {kind} on the CPU with a last stride of 1, got {value.dtype} on {value.device}, strides "
            f"{value.stride()}{', lazily negated' if value.is_neg() else ''}"
        )
    return value.data_ptr()


def listed(calls: Sequence[Call]) -> Tensor:
    """The calls as a list for ``program.run`` and ``program.share``: a tensor of pairs of addresses."""
    pairs = [address for call in calls for address in (call.kernel.address, ctypes.addressof(call.block))]
    return torch.tensor(pairs, dtype=torch.int64, device="cpu")


def load(name: str) -> Kernel:
    """The kernel "module.function": from memory, from disk, or compiled and stored there."""
    return _loaded.get(name) or _load(name)


def scratch(n_blocks: int) -> list[Tensor]:
    """Scratch for drawing rows of n_blocks blocks: a kernel's arguments w, r and out. Each thread needs its own."""
    sizes = [4 * CHUNK, 4 * CHUNK, 4 * max(CHUNK, n_blocks)]
    return list(torch.empty(sum(sizes), dtype=torch.float32, device="cpu").split(sizes))


_loaded: dict[str, Kernel] = {}


def _load(name: str) -> Kernel:
    with _lock:
        if name not in _loaded:
            module, function = name.split(".")
            if module == "program":
                engine = _engine_of(program.SOURCE)
                for function, arguments in program.ARGUMENTS.items():
                    _loaded[f"program.{function}"] = Kernel(engine.get_function_address(function), arguments)
                return _loaded[name]
            file = f"{name}-{_stamp()}.kernel"
            kept = next((found for folder in _folders() if (found := _read(folder / file)) is not None), None)
            if kept is None:
                kept = importlib.import_module(f".{module}", __name__).compiled(function)
                _write(file, *kept)
            _loaded[name] = _function(*kept)
        return _loaded[name]


def _engine_of(source: str, code: bytes | None = None) -> Any:
    """An LLVM engine with the functions of a source in LLVM IR, and of an object file."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(codemodel="jitdefault", jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(source), machine)
    if code is not None:
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _kept.append(engine)
    return engine


def _function(header: dict[str, Any], code: bytes) -> Kernel:
    """header: "symbol", and "arguments", their names and types."""
    function, arguments = _engine_of("", code).get_function_address(header["symbol"]), header["arguments"]
    return Kernel(_engine_of(_unpacking(function, arguments.values())).get_function_address("unpacking"), arguments)


def _unpacking(address: int, kinds: Iterable[str]) -> str:
    """LLVM IR of a function that calls another with the values of a block."""
    lines, values = [], []
    for i, kind in enumerate(kinds):
        lines += [f"%p{i} = getelementptr i64, ptr %block, i64 {i}", f"%v{i} = load i64, ptr %p{i}"]
        if kind == "float":
            lines += [f"%h{i} = trunc i64 %v{i} to i32", f"%f{i} = bitcast i32 %h{i} to float"]
        values.append(f"float %f{i}" if kind == "float" else f"i64 %v{i}")
    lines += [f"%function = inttoptr i64 {address} to ptr", f"call void %function({', '.join(values)})", "ret void"]
    return "define void @unpacking(ptr %block) {\n" + "\n".join(lines) + "\n}"


# -- on disk ---------------------------------------------------------------------------------------------------


@cache
def _stamp() -> str:
    """Identifies machine code: the sources of all kernels (they inline each other), Numba's version, and the CPU."""
    import llvmlite.binding as llvm

    sources = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    versions = [importlib.metadata.version(name) for name in ("numba", "llvmlite")]
    machine = [llvm.get_default_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    return hashlib.sha256(b"\0".join([*sources, *(s.encode() for s in versions + machine)])).hexdigest()[:32]


def _folders() -> list[Path]:
    """Folders for machine code, in order of preference. None that other users can write to: what is in it is run."""
    named, home = os.environ.get("NUMBA_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    folders = [Path(named)] if named else [Path(__file__).parent / "__pycache__"]
    return [*folders, Path(home or os.path.expanduser("~/.cache")) / "fastebm"]


def _read(file: Path) -> tuple[dict[str, Any], bytes] | None:
    """None if the file does not exist or is damaged."""
    try:
        first, code = file.read_bytes().split(b"\n", 1)
        header = json.loads(first)
        return (header, code) if header["sha256"] == hashlib.sha256(code).hexdigest() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(file: str, header: dict[str, Any], code: bytes) -> None:
    """To the first folder that is writable, if any."""
    whole = json.dumps({**header, "sha256": hashlib.sha256(code).hexdigest()}).encode() + b"\n" + code
    for folder in _folders():
        part = folder / f"{file}.{os.getpid()}.{threading.get_ident()}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part.write_bytes(whole)
            os.replace(part, folder / file)  # atomic: other processes may write and read the same file
            return
        except OSError:
            with suppress(OSError):
                part.unlink(missing_ok=True)
