"""`fastdiff doctor`: what was built, for what, what is loaded, what is missing and what to do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import torch

from . import __version__, _backends, _loader
from ._registry import OPS


def report() -> str:
    """The whole diagnosis as text, one fact a line; lines that ask for action begin with '!'."""
    lines = [
        f"fastdiff-kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}",
        *_built(),
        *_loaded(),
        *_gpu(),
        *_ops(),
        *_extras(),
    ]
    return "\n".join(lines)


def _built() -> list[str]:
    build = _loader.build_report()
    if not build and _loader.LIBRARY.exists():
        python = ".".join(platform.python_version_tuple()[:2])
        missing = f"_host, with the build report, is missing for {python}"
        return [f"! built: for another Python: {_loader.LIBRARY.name} serves every one, but {missing}. {_loader.REBUILD}"]
    if not build:
        return ["! built: nothing was compiled. Install a C++ compiler, then: " + _loader.REBUILD]
    lines = [
        f"built: {build['built']} by {build['compiler']}, for torch >= {build['torch_target']} (headers of {build['torch_headers']})",
        f"built for CPU: {', '.join(build['cpu_variants'])}",
    ]
    if build["cuda"]:
        lines.append(f"built for CUDA: {build['cuda']}, architectures {', '.join(build['cuda_archs'])} and PTX of the newest")
    else:
        lines.append("built for CUDA: no (nvcc was not found, or FASTDIFF_CUDA=0). With nvcc in PATH: FASTDIFF_CUDA=1 " + _loader.REBUILD)
    if build["version"] != __version__:
        lines.append(f"! the compiled part is of version {build['version']}: {_loader.REBUILD}")
    return lines


def _loaded() -> list[str]:
    reason = _loader.load()
    if reason is not None:
        return [f"! loaded: no. {reason}"]
    instruction_set, limit = _loader.instruction_set(), os.environ.get("FASTDIFF_ISA")
    if instruction_set is None:
        return [f"! loaded: {_loader.LIBRARY.name}, which is older than this package: {_loader.REBUILD}"]
    limited = "" if limit is None else f" (FASTDIFF_ISA={limit})"
    return [f"loaded: {_loader.LIBRARY.name}, CPU kernels for {instruction_set}{limited}"]


def _gpu() -> list[str]:
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no device (driver missing or hidden)"
        return [f"GPU: none; {why}"]
    return [
        f"GPU {i}: {torch.cuda.get_device_name(i)}, sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}"
        for i in range(torch.cuda.device_count())
    ]


def _ops() -> list[str]:
    """For each op, the backends that would run here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [name for name in _backends.BACKENDS if name != "reference"]
    rows = []
    for op in OPS.values():
        available = [name for name in names if _backends.unavailable(op, name, device) is None]
        rows.append(f"  {op.name:32} {', '.join(available) or 'its definition in PyTorch'}")
    return [f"ops on {device}:", *rows]


def _extras() -> list[str]:
    needs = {
        "triton": ("Triton kernels", "triton"),
        "sklearn": ("the demo's data", "fastdiff-kernels[train]"),
        "matplotlib": ("plots", "fastdiff-kernels[train]"),
        "tqdm": ("progress bars", "fastdiff-kernels[train]"),
        "diffusers": ("the diffusers integration", "fastdiff-kernels[diffusers]"),
    }
    lines = []
    for module, (purpose, remedy) in needs.items():
        if importlib.util.find_spec(module) is None:
            lines.append(f"missing: {module} ({purpose}); pip install '{remedy}'")
        else:
            lines.append(f"found: {module} {_version(module)}")
    return lines


def _version(module: str) -> str:
    return importlib.metadata.version({"sklearn": "scikit-learn"}.get(module, module))
