"""LoRA layers of peft in patched models: added before or after the patch, trained, switched off, saved and loaded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastdiff_kernels.integrations.diffusers import patch, unpatch
from tests.helpers import assert_bitwise
from tests.integrations.models import BY_NAME, Case

peft = pytest.importorskip("peft")

TARGETS = {
    "UNet2DConditionModel-SD": ["to_q", "to_k", "to_v", "to_out.0"],
    "SD3Transformer2DModel": ["to_q", "net.0.proj", "net.2"],
    "FluxTransformer2DModel": ["to_q", "to_out.0", "net.2", "proj_out", "norm1.linear"],
    "WanTransformer3DModel": ["to_q", "to_out.0", "net.2"],
}
# diffusers rotates queries and keys in float32, in float64 models too.
FLOAT32 = {"rtol": 1.3e-6, "atol": 1e-5}
every_case = pytest.mark.parametrize("case", [BY_NAME[name] for name in TARGETS], ids=lambda case: case.name)


def config(case: Case) -> object:
    return peft.LoraConfig(r=2, target_modules=TARGETS[case.name], init_lora_weights=False)


def gradients(case: Case, model: nn.Module) -> list[torch.Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(case.call(model, torch.float64).sum(), trained))


@every_case
@pytest.mark.parametrize("order", ["patch, adapter", "adapter, patch"])
def test_adapters_do_in_a_patched_model_what_they_do_in_the_hosts(case: Case, order: str) -> None:
    model = case.model(torch.float64)
    model.requires_grad_(False)
    without = case.call(model, torch.float64)
    for step in order.split(", "):
        if step == "patch":
            patch(model)
        else:
            torch.manual_seed(0)
            model.add_adapter(config(case))
    with_lora, trained = case.call(model, torch.float64), gradients(case, model)
    assert all(g.any() for g in trained)
    model.disable_adapters()
    torch.testing.assert_close(case.call(model, torch.float64), without, **FLOAT32)
    model.enable_adapters()
    unpatch(model)
    torch.testing.assert_close(with_lora, case.call(model, torch.float64), **FLOAT32)
    torch.testing.assert_close(trained, gradients(case, model), **FLOAT32)
    model.unload_lora()
    assert patch(model).counts == case.counts


def test_a_gated_projection_with_an_adapter_is_said_to_be_one() -> None:
    case = BY_NAME["FluxTransformer2DModel"]
    model = case.model()
    model.add_adapter(config(case))
    report = patch(model)
    assert {key: count for key, count in case.counts.items() if key != "Linear"} == report.counts
    reasons = {entry.module: entry.reason for entry in report.left}
    for block in range(2):
        reason = reasons[f"single_transformer_blocks.{block}.proj_out"]
        assert reason == "it is a LoRA layer, which adds to the branch before the block gates it"


@every_case
def test_adapters_are_saved_and_loaded_as_the_hosts(case: Case, tmp_path) -> None:
    model, plain = case.model(), case.model()
    patch(model)
    model.add_adapter(config(case))
    model.save_lora_adapter(tmp_path)
    expected = case.call(model)
    for other in (case.model(), plain):
        if other is not plain:
            patch(other)
        other.load_lora_adapter(str(tmp_path), prefix=None, use_safetensors=True)
        torch.testing.assert_close(case.call(other), expected)
        other.unload_lora()
        assert other.state_dict().keys() == case.model().state_dict().keys()
    assert_bitwise(case.call(plain), case.call(case.model()))
