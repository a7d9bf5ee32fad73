"""Building and loading: what happens on machines that lack something."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import fastdiff_kernels
from fastdiff_kernels import _loader, doctor

from .test_contract import CALLS

PACKAGE = Path(fastdiff_kernels.__file__).parent
ROOT = PACKAGE.parent

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source checkout")


def setup(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    command = (sys.executable, "setup.py", *command)
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, **environment})


def build(tmp_path: Path, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return setup(folder, "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}", **environment)


# An editable install finds the compiled modules of the checkout for any package of this name.
WITHOUT_EDITABLE_INSTALL = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in str(f)]\n"


def run_python(code: str, path: Path, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(path), **environment}
    command = [sys.executable, "-c", WITHOUT_EDITABLE_INSTALL + code]
    return subprocess.run(command, cwd=path, capture_output=True, text=True, env=environment)


@pytest.fixture
def uncompiled(tmp_path: Path) -> Path:
    """A folder with the package as it is installed where there is no compiler."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_without_a_compiler_the_build_succeeds_and_says_so(tmp_path: Path):
    done = build(tmp_path, PATH=str(tmp_path), CXX="")
    assert done.returncode == 0, done.stderr
    assert "installing without compiled kernels: no C++ compiler was found" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_without_its_sources_the_build_succeeds_and_says_so(tmp_path: Path):
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    done = build(tmp_path / "built", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "installing without compiled kernels: its sources are not in this folder (csrc/cpu/*.cpp, csrc/host/*.cpp)" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


FOLDERS = ("csrc", "fastdiff_kernels", "tests", "benchmarks", "docs", "examples")


def files(folder: Path) -> set[str]:
    """What a source distribution should hold of a folder."""
    left_out = (".pyc", ".pyo", ".so")
    found = [path for name in FOLDERS for path in (folder / name).rglob("*") if path.is_file() and not path.name.endswith(left_out)]
    found += [path for pattern in ("*.md", "*.py", "*.toml", "*.in", "Makefile", "LICENSE") for path in folder.glob(pattern)]
    return {str(path.relative_to(folder)) for path in found}


def test_a_source_distribution_holds_what_it_takes_to_build_and_to_test(tmp_path: Path):
    wanted = files(ROOT)
    assert {"csrc/cpu/modulate.cpp", "csrc/cuda/modulate.cu", "csrc/include/fastdiff/math.h", "tests/helpers.py"} <= wanted
    for name in [*wanted, "fastdiff_kernels/_native.so", "tests/__pycache__/helpers.pyc"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name in wanted:
            shutil.copy(ROOT / name, tmp_path / name)
        else:
            (tmp_path / name).touch()
    done = setup(tmp_path, "sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as members:
        held = {member.name.partition("/")[2] for member in members if member.isfile()}
    made = {name for name in held if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert held - made == wanted


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("FASTDIFF_CUDA", "yes", "FASTDIFF_CUDA must be auto, 1 or 0; got 'yes'"),
        ("FASTDIFF_NATIVE", "no", "FASTDIFF_NATIVE must be auto or 0; got 'no'"),
        ("FASTDIFF_NVCC", "no/such/nvcc", "FASTDIFF_NVCC must be the path of nvcc; got 'no/such/nvcc', which is no file"),
    ],
)
def test_a_wrong_switch_is_refused(tmp_path: Path, name: str, value: str, text: str):
    done = build(tmp_path, **{name: value})
    assert done.returncode != 0
    assert text in done.stderr


def test_nothing_is_compiled_where_that_is_asked_for(tmp_path: Path):
    done = build(tmp_path, FASTDIFF_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert "installing without compiled kernels: FASTDIFF_NATIVE=0" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_every_variable_that_a_build_reads_is_documented():
    code = (ROOT / "setup.py").read_text()
    read = set(re.findall(r"""environ(?:\.get\(|\[)["'](\w+)""", code))
    assert {"FASTDIFF_CUDA", "CXX", "MAX_JOBS"} <= read
    ours = {name for name in read if name.startswith("FASTDIFF_")}
    for text, names in ((code.split('"""')[1], read), ((ROOT / "README.md").read_text(), ours)):
        assert not {name for name in names if not re.search(rf"\b{name}\b", text)}


def test_an_uncompiled_package_works_and_warns_once(uncompiled: Path):
    code = """
import torch, warnings
from fastdiff_kernels import explain, ops
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x = torch.zeros(2, 3, requires_grad=True)
    for _ in range(3):
        ops.denoising_loss(x, torch.ones(2, 3)).sum().backward()
assert torch.equal(x.grad, torch.full((2, 3), -6.0)), x.grad
print(len([w for w in caught if "PyTorch definitions on CPU" in str(w.message)]))
print(explain(ops.lcss_noise, torch.zeros(1, 2), 0))
"""
    done = run_python(code, uncompiled)
    assert done.returncode == 0, done.stderr
    warned, explanation = done.stdout.strip().splitlines()
    assert warned == "1"
    assert explanation.startswith("lcss_noise: reference (cpu: the compiled library is missing")


def test_doctor_of_an_uncompiled_package_says_what_to_do(uncompiled: Path):
    done = run_python("from fastdiff_kernels import doctor; print(doctor.report())", uncompiled)
    assert done.returncode == 0, done.stderr
    assert "! built: nothing was compiled. Install a C++ compiler, then: pip install" in done.stdout
    assert "lcss_noise                       its definition in PyTorch" in done.stdout


def test_a_library_that_does_not_load_is_explained(uncompiled: Path):
    (uncompiled / PACKAGE.name / "_native.so").write_bytes(b"not a library")
    done = run_python("from fastdiff_kernels import _loader; print(_loader.load())", uncompiled)
    assert "does not load in torch" in done.stdout
    assert "Rebuild it with: pip install" in done.stdout


def test_doctor_names_what_was_built_and_what_runs():
    text = doctor.report()
    assert f"fastdiff-kernels {fastdiff_kernels.__version__}" in text
    assert "loaded: _native.so" in text
    assert "built for CPU: baseline" in text
    assert _loader.build_report()["torch_target"] == "2.11"
    assert "for torch >= 2.11" in text


@pytest.mark.parametrize("isa", _loader.INSTRUCTION_SETS[:-1])
def test_kernels_for_other_machines_agree_with_the_definitions(isa: str):
    """Every op and its gradients by the kernels that machines with less run; those of the best set here all other tests run."""
    best = _loader.instruction_set()
    if _loader.INSTRUCTION_SETS.index(isa) >= _loader.INSTRUCTION_SETS.index(best):
        pytest.skip(f"here the other tests run {best}")
    command = [sys.executable, "-m", "pytest", "tests/test_contract.py", "-k", "test_backends_agree", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "FASTDIFF_ISA": isa})
    assert done.returncode == 0, done.stdout
    assert f"{len(CALLS)} passed" in done.stdout


def test_doctor_names_the_instruction_set_that_runs():
    """The one asked for, or the best that the machine has below it."""
    best = _loader.instruction_set()
    for limit in _loader.INSTRUCTION_SETS:
        runs = min(limit, best, key=_loader.INSTRUCTION_SETS.index)
        done = run_python("from fastdiff_kernels import doctor; print(doctor.report())", ROOT, FASTDIFF_ISA=limit)
        assert f"loaded: _native.so, CPU kernels for {runs} (FASTDIFF_ISA={limit})" in done.stdout, done.stderr


@pytest.mark.parametrize("isa", ["AVX2", "avx9", ""])
def test_an_instruction_set_that_is_none_is_refused(isa: str):
    done = run_python("import fastdiff_kernels", ROOT, FASTDIFF_ISA=isa)
    assert done.returncode != 0
    assert f"ValueError: FASTDIFF_ISA must be one of 'baseline', 'avx2', 'avx512', or not be set; got {isa!r}" in done.stderr


def test_doctor_tells_an_older_library(monkeypatch):
    monkeypatch.setattr(_loader, "instruction_set", lambda: None)
    assert "! loaded: _native.so, which is older than this package: pip install" in doctor.report()
