"""Which modules of a diffusers model are replaced, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
from torch import nn

from .._report import Entry, PatchReport
from .._swap import Replacement, restore_all, swap
from . import _blocks, _norms, _processors, _resnet
from . import _host as host
from ._probes import difference, swap_output, swap_resnet

MODELS = (
    "UNet2DModel",
    "UNet2DConditionModel",
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "WanTransformer3DModel",
)
_ATTENTIONS = (host.Attention, host.FluxAttention, host.WanAttention)
_HOOKED = "its forward was replaced by hooks (offloading); patch before those are added"
_BLOCK = "its forward is its own; the modulation, gates and residuals in it are computed by ops where its modules below are replaced"
_NO_OP = "no op here computes it"


def patch(model_or_pipeline: Any) -> PatchReport:
    """Replaces attention, modulated norms, gated residuals and group norms of a diffusers model by this package's ops, in place.

    Attention gets other processors (norms of q and k with the rotary embedding, and attention); norms keep their objects and get a class
    that computes norm and modulation, or group norm and SiLU, in one op. Where a block writes out modulation, or gate and residual, its
    norms and branches return what waits for that and is then one op. Parameters, their names, hooks, LoRA layers, checkpointing and
    the config stay as they are. Each kind of replacement is first compared with the installed diffusers on a tiny module, and left out
    where the two differ.

    Under `torch.compile` group norms are diffusers' own again, since Inductor fuses those with what surrounds them.

    Args:
        model_or_pipeline: UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel,
            FluxTransformer2DModel or WanTransformer3DModel, a torch.compile of one, or a pipeline whose components they are. Other
            models are left alone, in a pipeline too. A patched model is left as it is.

    Returns:
        PatchReport: every module, replaced with what, or left and why; and which classes this release of diffusers does not have.

    Raises:
        TypeError: neither a module nor a pipeline.
    """
    entries: list[Entry] = []
    for prefix, model in _models(model_or_pipeline):
        reason = _left_whole(model)
        entries += _patch_model(prefix, model) if reason is None else _leave_model(prefix, model, reason)
    return PatchReport(type(_unwrapped(model_or_pipeline)).__name__, entries, host.MISSING)


def unpatch(model_or_pipeline: Any) -> None:
    """Undoes `patch`: every module has its own class and the very processor object it had. Processors set since are kept.

    Raises:
        TypeError: as `patch`. RuntimeError: offloading hooks were added after `patch`; remove those first. Nothing is undone then.
    """
    models = [(prefix, model) for prefix, model in _models(model_or_pipeline) if _is_known(model)]
    modules = [(_join(prefix, name), module) for prefix, model in models for name, module in model.named_modules()]
    restore_all((name, module) for name, module in modules if isinstance(module, Replacement))
    for _, module in modules:
        processor = getattr(module, "processor", None)
        if isinstance(processor, _processors.Fused):
            module.set_processor(processor.replaced)


def _models(model_or_pipeline: Any) -> Iterator[tuple[str, Any]]:
    model = _unwrapped(model_or_pipeline)
    if isinstance(model, nn.Module):
        yield "", model
        return
    components = getattr(model, "components", None)
    if not isinstance(components, dict):
        raise TypeError(f"model_or_pipeline must be a module or a pipeline, got {type(model).__name__}")
    for name, component in components.items():
        component = _unwrapped(component)
        if isinstance(component, nn.Module):
            yield name, component


def _is_known(model: nn.Module) -> bool:
    return isinstance(model, tuple(getattr(diffusers, name) for name in MODELS if hasattr(diffusers, name)))


def _left_whole(model: nn.Module) -> str | None:
    if not _is_known(model):
        return f"{type(model).__name__} is not one of the models that are known here"
    modules = list(model.modules())
    patched = any(isinstance(module, Replacement) for module in modules)
    if not patched and any(module._backward_hooks and not module._is_full_backward_hook for module in modules):
        return "hooks of register_backward_hook are in the model, which see what its last operations are; use register_full_backward_hook"
    return None


def _leave_model(prefix: str, model: nn.Module, reason: str) -> list[Entry]:
    return [Entry(_join(prefix, name), type(module).__name__, reason=reason) for name, module in model.named_modules()]


def _unwrapped(model: Any) -> Any:
    return getattr(model, "_orig_mod", model)


def _patch_model(prefix: str, model: Any) -> list[Entry]:
    modules = dict(model.named_modules())
    found: dict[int, Entry] = {}
    # Blocks first: they know which norm an activation follows.
    for name, module in modules.items():
        if type(module) is host.ResnetBlock2D:
            _patch_resnet(_join(prefix, name), module, found)
    if hasattr(model, "conv_norm_out"):
        _patch_output(prefix, model, found)
    blocks = {name: module for name, module in modules.items() if type(module) in _blocks.KINDS}
    for name, module in blocks.items():
        _patch_parts(_join(prefix, name), module, found)
    for name, module in modules.items():
        if id(module) not in found:
            found[id(module)] = _patch_module(_join(prefix, name), module)
    for module in blocks.values():
        _gate_attentions(module)
    return [_named(found[id(module)], _join(prefix, name)) for name, module in modules.items()]


def _patch_module(name: str, module: Any) -> Entry:
    kind: Any = type(module)
    if isinstance(module, Replacement):
        return Entry(name, module.replaces.__name__, replacement=kind.__name__)
    if kind in _ATTENTIONS:
        return _patch_attention(name, module)
    if kind in _norms.REPLACEMENTS:
        reason = _refused(module) or _norms.refusal(module) or difference(kind)
        if reason is None:
            swap(module, _norms.REPLACEMENTS[kind])
            return Entry(name, kind.__name__, replacement=type(module).__name__)
        return Entry(name, kind.__name__, reason=reason)
    if kind is nn.GroupNorm:
        if reason := _refused(module):
            return Entry(name, "GroupNorm", reason=reason)
        swap(module, _resnet.FusedGroupNorm)
        return Entry(name, "GroupNorm", replacement="FusedGroupNorm")
    return Entry(name, kind.__name__, reason=_plain_reason(module))


def _plain_reason(module: Any) -> str:
    if type(module) in _blocks.KINDS and _blocks.parts(module):
        return _BLOCK
    if hasattr(module, "processor"):
        return "an attention of a class that is not known here"
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm, host.RMSNorm)):
        return "computed within attention or by PyTorch; its modulation, if any, is in the block's forward"
    return _NO_OP


def _patch_attention(name: str, module: Any) -> Entry:
    processor = module.processor
    if isinstance(processor, _processors.Fused):
        return Entry(name, type(processor.replaced).__name__, replacement=type(processor).__name__)
    reason = _processors.refusal(module) or _difference(processor)
    if reason is not None:
        return Entry(name, type(processor).__name__, reason=reason)
    module.set_processor(_processors.REPLACEMENTS[type(processor)](processor))
    return Entry(name, type(processor).__name__, replacement=type(module.processor).__name__)


def _patch_parts(name: str, block: Any, found: dict[int, Entry]) -> None:
    """Norms and feed-forwards of a block; attentions are patched as all others."""
    for part, module in _blocks.parts(block).items():
        kind: Any = type(module)
        if kind in _ATTENTIONS or isinstance(module, Replacement):
            continue
        reason = _refused(module) or _blocks.refusal(module) or _difference(block)
        if reason is None:
            _blocks.fuse(module)
        replacement = type(module).__name__ if reason is None else None
        found[id(module)] = Entry(f"{name}.{part}", kind.__name__, replacement=replacement, reason=reason)


def _gate_attentions(block: Any) -> None:
    for module in _blocks.parts(block).values():
        if type(module) in _ATTENTIONS and _difference(block) is None:
            _blocks.fuse(module)


def _patch_resnet(name: str, block: Any, found: dict[int, Entry]) -> None:
    parts: dict[str, Any] = {part: getattr(block, part) for part in ("norm1", "norm2", "nonlinearity")}
    if any(isinstance(part, Replacement) for part in parts.values()):
        return
    reason = next(filter(None, (_refused(part) for part in parts.values())), None)
    if reason is None and type(block.nonlinearity) is not nn.SiLU:
        reason = f"the activation after it is {type(block.nonlinearity).__name__}"
    if reason is None and not type(block.norm1) is type(block.norm2) is nn.GroupNorm:
        reason = "its block has another norm than GroupNorm"
    reason = reason or _difference(block)
    kinds = {part: type(module).__name__ for part, module in parts.items()}
    if reason is None:
        swap_resnet(block)
    for part, module in parts.items():
        replacement = type(module).__name__ if reason is None else None
        found[id(module)] = Entry(f"{name}.{part}", kinds[part], replacement=replacement, reason=reason)


def _patch_output(prefix: str, model: Any, found: dict[int, Entry]) -> None:
    """A U-Net's last norm and activation, which its forward calls one after the other."""
    norm: Any = model.conv_norm_out
    activation: Any = getattr(model, "conv_act", None)
    if type(norm) is not nn.GroupNorm or type(activation) is not nn.SiLU or _refused(norm) or _refused(activation):
        return
    base = next((base for base in (host.UNet2DModel, host.UNet2DConditionModel) if isinstance(model, base)), None)
    if base is None:
        return
    if reason := difference(base):
        found[id(activation)] = Entry(_join(prefix, "conv_act"), "SiLU", reason=reason)
        return
    swap_output(model)
    found[id(norm)] = Entry(_join(prefix, "conv_norm_out"), "GroupNorm", replacement=type(norm).__name__)
    found[id(activation)] = Entry(_join(prefix, "conv_act"), "SiLU", replacement=type(activation).__name__)


def _difference(module: Any) -> str | None:
    kind: Any = type(module)
    return difference(kind)


def _refused(module: Any) -> str | None:
    return _HOOKED if "forward" in vars(module) else None


def _named(entry: Entry, name: str) -> Entry:
    return entry if entry.module == name else Entry(name, entry.kind, entry.replacement, entry.reason)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
