"""Patched models of the installed diffusers: as accurate as the host's own, and otherwise the models they were."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import nn

from fastdiff_kernels.integrations.diffusers import _processors as processors
from fastdiff_kernels.integrations.diffusers import patch, unpatch
from tests.helpers import assert_bitwise, assert_within_eager
from tests.integrations.models import BY_NAME, CASES, Case, dit, randn

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
one_of_each_class = pytest.mark.parametrize(
    "case", [case for case in CASES if case.name.split("-")[-1] not in ("shift", "SDXL", "3.5")], ids=lambda case: case.name
)


def gradients(case: Case, model: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """All of the model's gradients of one random functional of its output, in one vector."""
    torch.manual_seed(0)  # DiT drops labels in training
    output = case.call(model, dtype)
    upstream = randn(*output.shape, seed=7).to(dtype)
    found = torch.autograd.grad(output, [p for p in model.parameters() if p.requires_grad], upstream, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


@every_case
def test_as_many_modules_are_replaced_as_the_class_has(case: Case) -> None:
    model = case.model()
    report = patch(model)
    assert report.counts == case.counts
    assert [entry.module for entry in report.entries] == [name for name, _ in model.named_modules()]
    assert all((entry.replacement is None) != (entry.reason is None) for entry in report.entries)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_are_as_accurate_as_the_hosts(case: Case, dtype: torch.dtype) -> None:
    model = case.model(dtype)
    exact = copy.deepcopy(model).double()
    results = []
    for fn in (lambda *a: case.call(*a).detach(), lambda *a: gradients(case, *a)):
        truth, eager = fn(exact, torch.float64), fn(model, dtype)
        patch(model)
        results.append((fn(model, dtype), eager, truth))
        unpatch(model)
    for actual, eager, truth in results:
        assert actual.dtype == eager.dtype
        # On these inputs PixArt's largest error in float32 is 2.09 times the host's, on 39 others 0.73 to 1.36 times (median 1.00).
        assert_within_eager(actual, eager, truth, factor=2.2 if case.name == "PixArtTransformer2DModel" else 2.0)


@every_case
def test_unpatching_restores_classes_processors_and_bits(case: Case) -> None:
    model = case.model()
    modules = {name: (module, type(module), getattr(module, "processor", None)) for name, module in model.named_modules()}
    keys, before = list(model.state_dict()), case.call(model)
    patch(model)
    assert list(model.state_dict()) == keys
    assert any(type(module) is not kind for module, kind, _ in modules.values())
    unpatch(model)
    for name, module in model.named_modules():
        was, kind, processor = modules[name]
        assert module is was
        assert type(module) is kind
        assert getattr(module, "processor", None) is processor
    assert_bitwise(case.call(model), before)


@every_case
def test_patching_twice_is_patching_once(case: Case) -> None:
    model = case.model()
    first = patch(model)
    processors = [m.processor for m in model.modules() if hasattr(m, "processor")]
    classes = [type(m) for m in model.modules()]
    second = patch(model)
    assert [type(m) for m in model.modules()] == classes
    assert second.entries == first.entries
    assert all(m.processor is p for m, p in zip((m for m in model.modules() if hasattr(m, "processor")), processors, strict=True))


def test_the_report_reads_well() -> None:
    report = patch(BY_NAME["DiTTransformer2DModel"].model())
    lines = repr(report).splitlines()
    assert lines[0] == f"PatchReport of DiTTransformer2DModel: 8 of {len(report.entries)} modules replaced"
    assert "  replaced 2 AdaLayerNormZero by FusedAdaLayerNormZero" in lines
    assert any(line.startswith("  left 2 BasicTransformerBlock: its forward is its own; the modulation, gates and") for line in lines)


@pytest.mark.parametrize("wrong", ["UNet2DModel", diffusers.DDIMScheduler(), None])
def test_what_is_neither_module_nor_pipeline_is_refused(wrong: object) -> None:
    for call in (patch, unpatch):
        with pytest.raises(TypeError, match=f"model_or_pipeline must be a module or a pipeline, got {type(wrong).__name__}"):
            call(wrong)


def test_a_model_that_is_not_known_is_left_and_reported() -> None:
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2)
    kinds = {name: type(module) for name, module in vae.named_modules()}
    report = patch(vae)
    assert report.model == "AutoencoderKL"
    assert [(entry.module, entry.kind) for entry in report.left] == [(name, kind.__name__) for name, kind in kinds.items()]
    assert {entry.reason for entry in report.left} == {"AutoencoderKL is not one of the models that are known here"}
    assert not report.replaced
    unpatch(vae)
    assert {name: type(module) for name, module in vae.named_modules()} == kinds


def test_a_pipeline_is_patched_by_component() -> None:
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2)
    pipeline = diffusers.DiTPipeline(BY_NAME["DiTTransformer2DModel"].model(), vae, diffusers.DDIMScheduler())
    report = patch(pipeline)
    assert report.model == "DiTPipeline"
    assert {entry.module for entry in report.replaced} == {
        f"transformer.transformer_blocks.{i}.{part}" for i in range(2) for part in ("norm1", "attn1", "norm3", "ff")
    }
    rest = {entry.module: entry.reason for entry in report.left if entry.module.split(".")[0] == "vae"}
    assert list(rest) == ["vae", *(f"vae.{name}" for name, _ in vae.named_modules() if name)]
    assert set(rest.values()) == {"AutoencoderKL is not one of the models that are known here"}
    unpatch(pipeline)
    assert type(pipeline.transformer.transformer_blocks[0].attn1.processor) is AttnProcessor2_0


@one_of_each_class
def test_the_whole_model_compiles_into_one_graph(case: Case) -> None:
    model = case.model()
    before = case.call(model)
    patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(case.call(compiled), before)


def test_a_compiled_model_follows_its_patch() -> None:
    case = BY_NAME["DiTTransformer2DModel"]
    model = case.model()
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(str(graph.graph)) or graph.forward)
    before = case.call(compiled)
    patch(compiled)
    torch.testing.assert_close(case.call(compiled), before)
    unpatch(compiled)
    assert_bitwise(case.call(compiled), before)
    assert ["fastdiff.attention" in graph for graph in graphs] == [False, True]


@every_case
def test_gradient_checkpointing_gives_the_same_gradients(case: Case) -> None:
    model = case.model().train()
    patch(model)
    kept = gradients(case, model, torch.float32)
    model.enable_gradient_checkpointing()
    assert_bitwise(gradients(case, model, torch.float32), kept)


@every_case
def test_copies_and_pickles_are_patched_models(case: Case) -> None:
    model = case.model()
    patch(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_bitwise(case.call(twin), case.call(model))
        unpatch(twin)
        assert patch(twin).counts == case.counts


@every_case
def test_saving_writes_what_the_host_writes(case: Case, tmp_path) -> None:
    model = case.model()
    before = case.call(model)
    patch(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not [m for m in loaded.modules() if type(m).__name__.startswith("Fused")]
    assert_bitwise(case.call(loaded), before)


def test_autocast_computes_in_its_dtype() -> None:
    case = BY_NAME["DiTTransformer2DModel"]
    model = case.model()
    truth = case.call(copy.deepcopy(model).double(), torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = case.call(model)
        patch(model)
        actual = case.call(model)
    assert actual.dtype == eager.dtype
    assert_within_eager(actual, eager, truth)


def test_a_hook_on_a_norm_sees_the_norm_and_not_the_activation() -> None:
    case = BY_NAME["UNet2DModel"]
    model = case.model()
    seen = []
    norm = model.down_blocks[0].resnets[0].norm1
    norm.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    before = case.call(model)
    patch(model)
    torch.testing.assert_close(case.call(model), before)
    torch.testing.assert_close(seen[1], seen[0])


def test_another_activation_after_a_norm_activates_the_norm() -> None:
    case = BY_NAME["UNet2DModel"]
    model, host = case.model(), case.model()
    patch(model)
    for changed in (model, host):
        changed.down_blocks[0].resnets[0].nonlinearity = nn.ReLU()
        changed.conv_act = nn.GELU()
    torch.testing.assert_close(case.call(model), case.call(host))


def test_a_processor_that_is_not_known_is_left() -> None:
    case = BY_NAME["UNet2DConditionModel-SD"]
    model = case.model()
    model.set_attn_processor(AttnProcessor())
    report = patch(model)
    assert "AttnProcessor2_0" not in report.counts
    left = [entry for entry in report.left if entry.kind == "AttnProcessor"]
    assert len(left) == 8
    assert left[0].reason == "its processor AttnProcessor is not one that is known here"


def test_heads_wider_than_the_op_are_left() -> None:
    attn = Attention(300, heads=1, dim_head=300)
    model = BY_NAME["DiTTransformer2DModel"].model()
    model.transformer_blocks[0].attn1 = attn
    assert "its head dimension 300 is above 256" in [entry.reason for entry in patch(model).left]


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel"])
def test_fused_projections_and_a_chosen_backend_are_respected(name: str) -> None:
    case = BY_NAME[name]
    model = case.model()
    before = case.call(model)
    patch(model)
    model.fuse_qkv_projections()
    torch.testing.assert_close(case.call(model), before)
    model.unfuse_qkv_projections()
    for attn in (m for m in model.modules() if hasattr(m, "processor")):
        attn.set_attention_backend("_native_math")
    processors._said.clear()
    with pytest.warns(UserWarning, match="another attention backend"):
        output = case.call(model)
    torch.testing.assert_close(output, before)


def test_modules_under_offloading_hooks_are_left_or_keep_the_patch_in_place() -> None:
    case = BY_NAME["DiTTransformer2DModel"]
    model = case.model()
    norm = model.transformer_blocks[0].norm1
    norm.forward = norm.forward
    report = patch(model)
    assert report.counts["AdaLayerNormZero"] == 1
    assert "patch before those are added" in repr(report)
    late = model.transformer_blocks[1].norm1
    late.forward = late.forward
    patched = [(type(module), getattr(module, "processor", None)) for module in model.modules()]
    with pytest.raises(RuntimeError, match=r"transformer_blocks.1.norm1: its forward was replaced after the patch"):
        unpatch(model)
    assert [(type(module), getattr(module, "processor", None)) for module in model.modules()] == patched
    del late.forward
    unpatch(model)
    assert type(late).__name__ == "AdaLayerNormZero"


def test_unpatching_keeps_processors_that_were_set_since() -> None:
    case = BY_NAME["DiTTransformer2DModel"]
    model = case.model()
    before = case.call(model)
    patch(model)
    chosen = AttnProcessor()
    model.transformer_blocks[0].attn1.set_processor(chosen)
    unpatch(model)
    assert model.transformer_blocks[0].attn1.processor is chosen
    assert type(model.transformer_blocks[1].attn1.processor) is AttnProcessor2_0
    torch.testing.assert_close(case.call(model), before)


def test_what_inductor_makes_of_a_patched_model_is_the_host_with_its_gradients() -> None:
    case = replace(BY_NAME["DiTTransformer2DModel"], build=lambda: dit(num_layers=1))
    model = case.model()
    exact = copy.deepcopy(model).double()
    truth, eager = gradients(case, exact, torch.float64), gradients(case, model, torch.float32)
    assert patch(model).replaced
    compiled = torch.compile(model, fullgraph=True)
    # What Inductor makes of this model, patched or not, has 8.7 times the error of eager PyTorch.
    assert_within_eager(gradients(case, compiled, torch.float32), eager, truth, factor=10.0)
