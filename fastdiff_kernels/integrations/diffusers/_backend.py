"""A backend named "fastdiff" in diffusers' attention dispatcher, chosen processor by processor."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

from ._host import attention_dispatch as host
from ._masks import key_lengths
from ._processors import BACKEND as NAME
from ._processors import Fused, attend

# On a processor, and so on its copies: what it had before.
_BEFORE = "_fastdiff_backend_before"
# Those that have it, so that nothing stays behind when the backend goes.
_chosen: weakref.WeakSet[Any] = weakref.WeakSet()


def attention_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """`ops.attention` as the dispatcher calls it, [B, N, H, D] -> [B, N, H, D].

    Raises:
        ValueError: a mask that is not padding behind the keys, dropout, causal attention, fewer heads for keys than for queries,
            log-sum-exps or context parallelism: all of what the dispatcher would otherwise drop in silence.
    """
    # The dispatcher drops arguments that are not named here.
    for name, asked in (
        ("dropout_p", dropout_p != 0),
        ("is_causal", is_causal),
        ("enable_gqa", enable_gqa and key.shape[2] != query.shape[2]),
        ("return_lse", return_lse),
        ("_parallel_config", _parallel_config is not None),
    ):
        if asked:
            raise ValueError(f"attention backend {NAME!r} has no {name}; choose another backend for this model")
    lengths = None
    if attn_mask is not None:
        lengths = key_lengths(attn_mask, key.shape[0], key.shape[1])
        if lengths is None:
            raise ValueError(
                f"attention backend {NAME!r} takes masks that are padding behind the keys and no others; choose another backend"
            )
    return attend(query, key, value, lengths, scale).unflatten(2, query.shape[2:])


def register_attention_backend() -> None:
    """Makes "fastdiff" a name that diffusers' dispatcher knows. Done by `set_attention_backend`; doing it twice is doing it once.

    diffusers has no registration for others: this adds a member to its enumeration of names and an entry to its registry.

    Raises:
        RuntimeError: this release keeps its backends otherwise.
    """
    if _member() is not None:
        return
    names, registry = getattr(host, "AttentionBackendName", None), getattr(host, "_AttentionBackendRegistry", None)
    if names is None or registry is None:
        raise RuntimeError("diffusers has no attention_dispatch with AttentionBackendName and a registry: this release is not supported")
    for attribute in ("_backends", "_constraints", "_supported_arg_names"):
        if not isinstance(getattr(registry, attribute, None), dict):
            raise RuntimeError(f"diffusers' attention registry has no dict {attribute}: this release is not supported")
    member: Any = str.__new__(names, NAME)
    member._name_, member._value_, member._sort_order_ = NAME.upper(), NAME, len(names)
    type.__setattr__(names, NAME.upper(), member)
    names._member_map_[NAME.upper()] = names._value2member_map_[NAME] = member
    names._member_names_.append(NAME.upper())
    registry.register(member)(attention_backend)


def unregister_attention_backend() -> None:
    """Removes the name again, and gives every processor that got it by `set_attention_backend` what it had before.

    Nobody knows which processors have it otherwise, by `model.set_attention_backend("fastdiff")` or as copies of others: those cannot
    attend until `reset_attention_backend(model)`, before or after.
    """
    member = _member()
    if member is None:
        return
    names, registry = host.AttentionBackendName, host._AttentionBackendRegistry
    for processor in list(_chosen):
        _restore(processor)
    if registry._active_backend == member:
        registry._active_backend = names.NATIVE
    for table in (registry._backends, registry._constraints, registry._supported_arg_names):
        table.pop(member, None)
    del names._member_map_[NAME.upper()], names._value2member_map_[NAME]
    names._member_names_.remove(NAME.upper())
    type.__delattr__(names, NAME.upper())


def set_attention_backend(model: nn.Module) -> int:
    """Lets the processors of this model that go through diffusers' dispatcher attend by `ops.attention`; other models stay as they are.

    `model.set_attention_backend("fastdiff")` would do the same and also become every other model's default, which is how diffusers does it.

    Returns:
        How many processors use it now.

    Raises:
        ValueError: none of the model's processors goes through the dispatcher; `patch` replaces those.
    """
    processors = [p for p in _processors(model) if hasattr(p, "_attention_backend")]
    if not processors:
        raise ValueError(f"no attention processor of {type(model).__name__} goes through diffusers' dispatcher; use patch(model)")
    register_attention_backend()
    for processor in processors:
        if processor._attention_backend != NAME:
            setattr(processor, _BEFORE, processor._attention_backend)
            processor._attention_backend = _member()
        _chosen.add(processor)
    return len(processors)


def reset_attention_backend(model: nn.Module) -> None:
    """Undoes `set_attention_backend`: every processor has the backend it had, or another that was set since."""
    for processor in _processors(model):
        _restore(processor)


def _member() -> Any:
    return getattr(getattr(host, "AttentionBackendName", None), "_value2member_map_", {}).get(NAME)


def _processors(model: nn.Module) -> list[Any]:
    """The model's processors, and of a patched one those that were replaced."""
    found = (getattr(module, "processor", None) for module in model.modules())
    return [processor.replaced if isinstance(processor, Fused) else processor for processor in found if processor is not None]


def _restore(processor: Any) -> None:
    before = vars(processor).pop(_BEFORE, None)  # None is diffusers' own default
    _chosen.discard(processor)
    if getattr(processor, "_attention_backend", None) == NAME:
        processor._attention_backend = before
