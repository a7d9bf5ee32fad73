"""Builds the compiled parts: `_native.so` (CPU and CUDA kernels on torch's stable ABI) and `_host` (pybind11).

Needs neither a GPU nor a CUDA build of torch. Environment:
  FASTDIFF_CUDA=auto|1|0     CUDA kernels when nvcc is found (auto, the default), required, or left out
  FASTDIFF_CUDA_ARCHS        e.g. "80;90a;120": what to embed instead of everything nvcc knows
  FASTDIFF_NVCC              the nvcc to use; else that of CUDA_HOME or CUDA_PATH, that in PATH, or /usr/local/cuda's
  FASTDIFF_NATIVE=auto|0     0 builds no compiled part at all
  CXX                        the C++ compiler; else c++, g++ or clang++
  MAX_JOBS                   parallel compilations
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from datetime import datetime, timezone
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
PACKAGE = "fastdiff_kernels"
# One binary for every torch from this version on.
TORCH_TARGET = (2, 11)
CUDA_ARCHS = ("80", "86", "89", "90a", "100", "120")
CPU_VARIANTS = {"x86_64": ("", "FASTDIFF_AVX2", "FASTDIFF_AVX512"), "AMD64": ("", "FASTDIFF_AVX2", "FASTDIFF_AVX512")}
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
]
SOURCES = ("cpu/*.cpp", "host/*.cpp")
GIB_PER_JOB = 1.0


def find_torch() -> Path | None:
    """The torch of the environment that is installed into, found from inside pip's isolated builds too."""
    paths = sysconfig.get_paths()
    for site in dict.fromkeys([paths["purelib"], paths["platlib"], *sys.path]):
        if (Path(site) / "torch" / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            return Path(site) / "torch"
    return None


def find_nvcc() -> Path | None:
    """nvcc by FASTDIFF_NVCC, CUDA_HOME or CUDA_PATH, PATH, or in the usual place."""
    if asked := os.environ.get("FASTDIFF_NVCC"):
        if not Path(asked).is_file():
            raise SystemExit(f"FASTDIFF_NVCC must be the path of nvcc; got {asked!r}, which is no file")
        return Path(asked)
    candidates = [str(Path(home) / "bin" / "nvcc") for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    candidates += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((Path(c) for c in candidates if c and Path(c).exists()), None)


def cuda_root(nvcc: Path) -> Path:
    """Where the toolkit lies; nvcc itself knows, also when what stands in PATH is a wrapper."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=True).stderr
    return Path(next(line.split("=", 1)[1] for line in dry_run.splitlines() if line.startswith("#$ TOP=")))


def nvcc_version(nvcc: Path) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return text.split("release ", 1)[1].split(",", 1)[0]


def cuda_archs(nvcc: Path) -> list[str]:
    """The architectures to embed: those asked for, else those of ours that nvcc knows."""
    asked = [arch for arch in os.environ.get("FASTDIFF_CUDA_ARCHS", "").replace(",", ";").split(";") if arch]
    known = set(subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split())
    unknown = [arch for arch in asked if f"compute_{arch.rstrip('af')}" not in known]
    if unknown:
        raise SystemExit(f"FASTDIFF_CUDA_ARCHS: {nvcc} does not know {', '.join(unknown)}; it knows {', '.join(sorted(known))}")
    return asked or [arch for arch in CUDA_ARCHS if f"compute_{arch.rstrip('af')}" in known]


def gencode(archs: list[str]) -> list[str]:
    """One machine code per architecture, and PTX of the newest for GPUs that do not exist yet."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    newest = max((arch for arch in archs if arch.isdigit()), key=int, default=None)
    return flags + ([f"-gencode=arch=compute_{newest},code=compute_{newest}"] if newest else [])


def job_count() -> int:
    if asked := os.environ.get("MAX_JOBS"):
        return max(1, int(asked))
    free_gib = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30 if "SC_AVPHYS_PAGES" in os.sysconf_names else 4
    return max(1, min(os.cpu_count() or 1, int(free_gib / GIB_PER_JOB)))


def say(text: str) -> None:
    print(f"fastdiff_kernels: {text}", file=sys.stderr, flush=True)


class NativeBuild(build_ext):
    """Compiles with ninja; without sources, a compiler or torch's headers it says so and leaves the compiled parts out."""

    def run(self) -> None:
        missing = self.missing()
        if missing:
            say(f"installing without compiled kernels: {missing}. PyTorch definitions run on CPU; `fastdiff doctor` tells what to do.")
            self.extensions = []
            return
        super().run()

    def missing(self) -> str | None:
        wanted = os.environ.get("FASTDIFF_NATIVE", "auto")
        if wanted not in ("auto", "0"):
            raise SystemExit(f"FASTDIFF_NATIVE must be auto or 0; got {wanted!r}")
        if wanted == "0":
            return "FASTDIFF_NATIVE=0"
        if absent := [pattern for pattern in SOURCES if not sources(pattern)]:
            return f"its sources are not in this folder ({', '.join(f'csrc/{pattern}' for pattern in absent)})"
        if self.compiler_command() is None:
            return "no C++ compiler was found (set CXX, or install g++ or clang)"
        if find_torch() is None:
            return f"torch >= {'.'.join(map(str, TORCH_TARGET))} is not installed in this environment; install it first"
        return None

    @staticmethod
    def compiler_command() -> str | None:
        return next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)

    def get_ext_filename(self, fullname: str) -> str:
        # The kernels know nothing of Python, so their file carries no Python version.
        if fullname.rpartition(".")[2] == "_native":
            return str(Path(*fullname.split(".")).with_suffix(".so"))
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        torch, compiler = find_torch(), self.compiler_command()
        native, host = (Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions)
        work = Path(self.build_temp).resolve()
        for folder in (work, native.parent):
            folder.mkdir(parents=True, exist_ok=True)
        nvcc = self.nvcc()
        plan = NinjaPlan(torch, compiler, nvcc, work)
        report = {
            "version": self.distribution.get_version(),
            "built": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "compiler": subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0],
            "torch_target": ".".join(map(str, TORCH_TARGET)),
            "torch_headers": (torch / "version.py").read_text().split("__version__ = '")[1].split("'")[0],
            "cpu_variants": [v.removeprefix("FASTDIFF_").lower() or "baseline" for v in plan.cpu_variants],
            "cuda": nvcc_version(nvcc) if nvcc else None,
            "cuda_archs": plan.archs,
        }
        (work / "build_report.h").write_text(f'#define FASTDIFF_BUILD_REPORT R"json({json.dumps(report)})json"\n')
        plan.write(native, host)
        say(
            f"compiling for {', '.join(report['cpu_variants'])}" + (f" and CUDA {report['cuda']} {plan.archs}" if nvcc else " without CUDA")
        )
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(work), "-j", str(job_count())], check=True)

    @staticmethod
    def nvcc() -> Path | None:
        wanted = os.environ.get("FASTDIFF_CUDA", "auto")
        if wanted not in ("auto", "1", "0"):
            raise SystemExit(f"FASTDIFF_CUDA must be auto, 1 or 0; got {wanted!r}")
        nvcc = None if wanted == "0" else find_nvcc()
        if wanted == "1" and nvcc is None:
            raise SystemExit("FASTDIFF_CUDA=1, but nvcc was not found: put it in PATH or set CUDA_HOME")
        if wanted == "auto" and nvcc is None:
            say("nvcc was not found; building without CUDA C++ kernels (Triton kernels need none)")
        return nvcc


class NinjaPlan:
    """The build as a ninja file."""

    def __init__(self, torch: Path, compiler: str, nvcc: Path | None, work: Path) -> None:
        import pybind11

        self.compiler, self.nvcc, self.work = compiler, nvcc, work
        self.cuda_root = cuda_root(nvcc) if nvcc else None
        self.archs = cuda_archs(nvcc) if nvcc else []
        self.cpu_variants = CPU_VARIANTS.get(os.uname().machine, ("",))
        self.torch_lib = torch / "lib"
        target = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
        includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
        self.cxx = [*CXX_FLAGS, f"-ffile-prefix-map={ROOT}=.", target, *includes, f"-isystem{torch / 'include'}"]
        self.host = [*CXX_FLAGS, f"-I{work}", *includes, f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}"]
        self.cu = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "--expt-relaxed-constexpr", "-diag-suppress=20012,20014"]
        self.cu += [target, *includes, f"-isystem={torch / 'include'}", *gencode(self.archs)]

    def write(self, native: Path, host: Path) -> None:
        lines = [
            "ninja_required_version = 1.5",
            f"cxx = {self.compiler}",
            f"nvcc = {self.nvcc}",
            "rule cxx\n  command = $cxx -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            "rule cu\n  command = $nvcc -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            "rule link\n  command = $cxx -shared -o $out $in $flags",
        ]
        objects = [
            self.compile(lines, "cxx", source, self.cxx, variant) for source in sources("cpu/*.cpp") for variant in self.cpu_variants
        ]
        link = [f"-L{self.torch_lib}", "-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,--as-needed"]
        if self.nvcc:
            objects += [self.compile(lines, "cu", source, self.cu) for source in sources("cuda/*.cu")]
            link += [f"-L{self.cuda_root / 'lib64'}", f"-L{self.cuda_root / 'lib'}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        self.link(lines, native, objects, link)
        self.link(lines, host, [self.compile(lines, "cxx", source, self.host) for source in sources("host/*.cpp")], [])
        lines.append(f"default {native} {host}")
        (self.work / "build.ninja").write_text("\n".join(lines) + "\n")

    def compile(self, lines: list[str], rule: str, source: Path, flags: list[str], variant: str = "") -> str:
        out = self.work / f"{source.parent.name}_{source.stem}{variant.lower().removeprefix('fastdiff')}.o"
        lines.append(f"build {out}: {rule} {source}\n  flags = {' '.join([*flags, *([f'-D{variant}'] if variant else [])])}")
        return str(out)

    @staticmethod
    def link(lines: list[str], out: Path, objects: list[str], flags: list[str]) -> None:
        lines.append(f"build {out}: link {' '.join(objects)}\n  flags = {' '.join(flags)}")


def sources(pattern: str) -> list[Path]:
    return sorted((ROOT / "csrc").glob(pattern))


# pip's isolated build needs torch's headers: the environment's own torch when there is one, else the one that is about to be installed.
build_requires = [] if find_torch() or os.environ.get("FASTDIFF_NATIVE") == "0" else [f"torch>={'.'.join(map(str, TORCH_TARGET))}"]

setup(
    ext_modules=[Extension(f"{PACKAGE}._native", sources=[]), Extension(f"{PACKAGE}._host", sources=[])],
    cmdclass={"build_ext": NativeBuild},
    setup_requires=build_requires,
)
