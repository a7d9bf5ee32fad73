"""Releases of diffusers that lack a class, build it otherwise, or compute something else: that replacement is left out, and reported."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import diffusers
import pytest
import torch
from diffusers.models.normalization import AdaLayerNormZero

from fastdiff_kernels import integrations
from fastdiff_kernels.integrations.diffusers import _host as host
from fastdiff_kernels.integrations.diffusers import _probes as probes
from fastdiff_kernels.integrations.diffusers import patch
from fastdiff_kernels.integrations.diffusers._patch import MODELS
from tests.helpers import assert_bitwise
from tests.integrations.models import BY_NAME, CASES, Case

PACKAGE = "fastdiff_kernels.integrations.diffusers"
CLASSES = {name: cls for name, cls in vars(host).items() if isinstance(cls, type) and cls.__module__.startswith("diffusers.")}


@pytest.fixture
def imported_anew(monkeypatch):
    """Imports the adapter as if for the first time; the one that is there comes back afterwards."""

    def load() -> ModuleType:
        for name in [name for name in sys.modules if name == PACKAGE or name.startswith(f"{PACKAGE}.")]:
            monkeypatch.delitem(sys.modules, name)
        return importlib.import_module(PACKAGE)

    monkeypatch.setattr(integrations, "diffusers", integrations.diffusers)
    return load


@pytest.fixture
def compared_anew():
    """Forgets what comparisons found, before and after."""
    probes.difference.cache_clear()
    yield
    probes.difference.cache_clear()


def having(cls: type) -> list[Case]:
    """The first host model with a module or processor of this class, or a model of it."""
    for case in CASES:
        modules = list(case.model().modules())
        if any(type(thing) is cls for module in modules for thing in (module, getattr(module, "processor", None))):
            return [case]
    return []


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_that_is_missing_takes_its_replacement_along_and_nothing_else(name: str, imported_anew, monkeypatch) -> None:
    (case,) = having(CLASSES[name]) or [BY_NAME["FluxTransformer2DModel"]]
    model = case.model()
    before = case.call(model)
    monkeypatch.delattr(sys.modules[CLASSES[name].__module__], name)
    adapter = imported_anew()
    assert callable(adapter.as_denoiser)
    assert callable(adapter.enable_adaptive_skip)
    report = adapter.patch(model)
    assert report.missing == (name,)
    assert repr(report).splitlines()[-1] == f"  not in the installed release, so that nothing is replaced for them: {name}"
    assert all(count <= case.counts[kind] for kind, count in report.counts.items())
    torch.testing.assert_close(case.call(model), before)
    adapter.unpatch(model)
    assert_bitwise(case.call(model), before)


def test_a_whole_file_that_is_missing_is_one_models_classes(imported_anew, monkeypatch) -> None:
    for gone in ("transformers.transformer_wan", "attention_dispatch"):
        monkeypatch.setitem(sys.modules, f"diffusers.models.{gone}", None)
    adapter = imported_anew()
    case = BY_NAME["FluxTransformer2DModel"]
    model = case.model()
    report = adapter.patch(model)
    assert report.missing == ("WanAttention", "WanAttnProcessor", "WanTransformerBlock")
    assert report.counts == case.counts
    adapter.unregister_attention_backend()
    with pytest.raises(RuntimeError, match="this release is not supported"):
        adapter.set_attention_backend(model)


def test_an_attention_of_another_class_is_said_to_be_one(imported_anew, monkeypatch) -> None:
    model = BY_NAME["FluxTransformer2DModel"].model()
    monkeypatch.delattr("diffusers.models.transformers.transformer_flux.FluxAttention")
    report = imported_anew().patch(model)
    assert {e.reason for e in report.left if e.kind == "FluxAttention"} == {
        "it is a FluxAttention, which is not known here",  # where a block gates it
        "an attention of a class that is not known here",
    }


def test_every_class_is_there_in_the_release_tested_with() -> None:
    assert host.MISSING == []
    assert patch(BY_NAME["DiTTransformer2DModel"].model()).missing == ()


def test_a_release_that_computes_something_else_is_left_alone(compared_anew, monkeypatch) -> None:
    def scale_first(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype) if self.emb is not None else emb
        scale, shift, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
        return self.norm(x) * (1 + scale[:, None]) + shift[:, None], *rest

    monkeypatch.setattr(AdaLayerNormZero, "forward", scale_first)
    case = BY_NAME["DiTTransformer2DModel"]
    model = case.model()
    before = case.call(model)
    report = patch(model)
    assert report.counts == {"AttnProcessor2_0": 2, "LayerNorm": 2, "FeedForward": 2}
    assert "computes something else than the one known here" in repr(report)
    torch.testing.assert_close(case.call(model), before)


@pytest.mark.parametrize("where", ["__init__", "forward"])
def test_a_release_that_takes_something_else_is_left_alone_with_what_it_said(where: str, compared_anew, monkeypatch) -> None:
    case = BY_NAME["DiTTransformer2DModel"]
    model = case.model()
    known = getattr(AdaLayerNormZero, where)

    def another(self, *args, **kwargs):
        if self not in model.modules():
            raise KeyError("a cache of frames")
        return known(self, *args, **kwargs)

    monkeypatch.setattr(AdaLayerNormZero, where, another)
    before = case.call(model)
    report = patch(model)
    assert report.counts == {"AttnProcessor2_0": 2}  # the block has the norm
    assert {e.reason for e in report.left if e.kind == "AdaLayerNormZero"} == {
        "this version's AdaLayerNormZero cannot be built and called as the one known here: KeyError: 'a cache of frames'"
    }
    torch.testing.assert_close(case.call(model), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_is_nothing_to_a_comparison(dtype: torch.dtype, compared_anew) -> None:
    models = [(case, case.model()) for case in CASES]
    torch.set_default_dtype(dtype)
    try:
        assert [patch(model).counts for _, model in models] == [case.counts for case, _ in models]
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)


def test_random_numbers_are_those_without_a_patch(compared_anew) -> None:
    model = BY_NAME["UNet2DModel"].model()
    state = torch.get_rng_state()
    patch(model)
    assert_bitwise(torch.get_rng_state(), state)


def test_the_models_are_those_of_the_host() -> None:
    assert {case.name.split("-")[0] for case in CASES} == {name for name in MODELS if hasattr(diffusers, name)}
