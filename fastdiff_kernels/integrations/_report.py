"""What a patch did to a model, module by module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One module: its name in the model, its class, and what stands in its place or why it was left.

    Attributes:
        module: dotted name; "" is the model itself. Of a pipeline it begins with the component's name.
        kind: class name of the module, or of the attention processor that was replaced.
        replacement: class name of what computes now, or None.
        reason: why the module was left, or None.
    """

    module: str
    kind: str
    replacement: str | None = None
    reason: str | None = None


class PatchReport:
    """Every module of a model: replaced with what, or left and why.

    Attributes:
        model: class name of the model or pipeline.
        entries: all of it, in the model's order. replaced, left: the two halves.
        missing: classes that replacements are written for and the installed release of the host does not have.
    """

    def __init__(self, model: str, entries: Sequence[Entry], missing: Sequence[str] = ()) -> None:
        self.model = model
        self.entries = tuple(entries)
        self.missing = tuple(missing)

    @property
    def replaced(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.replacement is not None)

    @property
    def left(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.replacement is None)

    @property
    def counts(self) -> dict[str, int]:
        """How many modules were replaced, by the name of what they were."""
        return dict(Counter(entry.kind for entry in self.replaced))

    def __repr__(self) -> str:
        lines = [f"PatchReport of {self.model}: {len(self.replaced)} of {len(self.entries)} modules replaced"]
        replaced = Counter((entry.kind, entry.replacement) for entry in self.replaced)
        lines += [f"  replaced {count} {kind} by {replacement}" for (kind, replacement), count in replaced.items()]
        for reason in dict.fromkeys(entry.reason for entry in self.left):
            kinds = Counter(entry.kind for entry in self.left if entry.reason == reason)
            lines.append(f"  left {', '.join(f'{count} {kind}' for kind, count in kinds.items())}: {reason}")
        if self.missing:
            lines.append(f"  not in the installed release, so that nothing is replaced for them: {', '.join(self.missing)}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return repr(self)
