"""What the run promised and whether it kept it: computed from the rows, typed nowhere."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Bar:
    """`value` must be at most (or at least) `limit`; `stretch` is the better figure aimed for."""

    name: str
    value: float
    limit: float
    at_most: bool = True
    stretch: float | None = None

    @property
    def passed(self) -> bool:
        return self._meets(self.limit)

    @property
    def stretched(self) -> bool | None:
        return None if self.stretch is None else self._meets(self.stretch)

    def _meets(self, limit: float) -> bool:
        return self.value <= limit if self.at_most else self.value >= limit

    def as_dict(self) -> dict[str, object]:
        return {**self.__dict__, "passed": self.passed, "stretch_passed": self.stretched}


def compute_bars(rows: dict[str, dict], floor: float, schedule_steps: tuple[int, ...], moment_steps: tuple[int, ...]) -> list[Bar]:
    """Every bar of the demo from the rows of its table."""

    def distance(name: str) -> float:
        return rows[name]["frechet"]

    teacher, fewest = distance("teacher"), min(schedule_steps)
    bars = [
        Bar("teacher / floor", teacher / floor, 1.5),
        Bar("LCSS / teacher", distance("lcss") / teacher, 1.5),
    ]
    for steps in schedule_steps:
        limit = 0.75 if steps == fewest else 1.05
        ratio = distance(f"optimised_{steps}") / distance(f"karras_{steps}")
        bars.append(Bar(f"optimised / Karras schedule, {steps} steps", ratio, limit))
    adaptive = rows["adaptive_linspace_hold"]  # the published rule on the published kind of grid
    bars += [
        Bar("AdaptiveSkip network calls", adaptive["calls"], 20),
        Bar("AdaptiveSkip PSNR (dB)", adaptive["psnr"], 30.0, at_most=False),
        Bar("SIM, 1 call / teacher", distance("sim") / teacher, 2.5, stretch=2.0),
    ]
    best_few = min(distance(f"{kind}_{fewest}") for kind in ("karras", "optimised"))
    bars.append(Bar(f"SIM, 1 call / teacher's best {fewest} Heun steps", distance("sim") / best_few, 1.0))
    bars += _moment_bars(rows, teacher, sorted(moment_steps))
    return bars


def _moment_bars(rows: dict[str, dict], teacher: float, steps: list[int]) -> list[Bar]:
    distances = [rows[f"moment_matching_{k}"]["frechet"] for k in steps]
    bars = [Bar(f"moment matching k={steps[-1]} / teacher", distances[-1] / teacher, 1.5, stretch=1.25)]
    for (few, worse), (more, better) in pairwise(zip(steps, distances, strict=True)):
        bars.append(Bar(f"moment matching k={more} / k={few}", better / worse, 1.0))
    eleven_calls = [r["frechet"] for name, r in rows.items() if name.startswith("karras_") and r["calls"] == 11]
    if 4 in steps and eleven_calls:
        bars.append(Bar("moment matching k=4 / Karras with 11 calls", rows["moment_matching_4"]["frechet"] / eleven_calls[0], 1.0))
    return bars


def mark_losses(rows: dict[str, dict]) -> None:
    """Give every row `loses_to`: the baselines at equal calls that are better, by PSNR where the row has one, else by Fréchet distance."""
    for name, this in rows.items():
        this["loses_to"] = []
        for baseline in this["baselines"]:
            other = rows[baseline]
            if this["calls"] != other["calls"]:
                raise ValueError(f"row '{name}' needs {this['calls']} calls and its baseline '{baseline}' {other['calls']}")
            better = other["psnr"] > this["psnr"] if "psnr" in this else other["frechet"] < this["frechet"]
            if better:
                this["loses_to"].append(baseline)
