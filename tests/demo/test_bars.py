"""Bars and losing rows are computed from the table."""

import pytest

from fastdiff_kernels.demo.bars import Bar, compute_bars, mark_losses


def row(frechet, calls=1, baselines=(), **more):
    return {"label": "row", "frechet": frechet, "calls": calls, "baselines": list(baselines), **more}


def table(**changes):
    rows = {
        "teacher": row(0.1, 35),
        "lcss": row(0.12, 35),
        "karras_4": row(2.0, 7),
        "optimised_4": row(1.0, 7),
        "karras_6": row(0.3, 11),
        "optimised_6": row(0.2, 11),
        "adaptive_linspace_hold": row(0.1, 17, psnr=33.0),
        "sim": row(0.19),
        "moment_matching_8": row(0.11, 8),
        "moment_matching_4": row(0.15, 4),
        "moment_matching_1": row(0.4, 1),
    }
    return {name: {**value, **changes.get(name, {})} for name, value in rows.items()}


def bars(rows, floor=0.08):
    return {bar.name: bar for bar in compute_bars(rows, floor, (4, 6), (8, 4, 1))}


def test_all_pass_on_a_good_table():
    good = bars(table())
    assert all(bar.passed for bar in good.values())
    assert good["teacher / floor"].value == pytest.approx(1.25)
    assert good["SIM, 1 call / teacher"].stretched is True
    assert good["AdaptiveSkip PSNR (dB)"].at_most is False


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"teacher": {"frechet": 0.2}}, "teacher / floor"),
        ({"lcss": {"frechet": 0.16}}, "LCSS / teacher"),
        ({"optimised_4": {"frechet": 1.6}}, "optimised / Karras schedule, 4 steps"),
        ({"optimised_6": {"frechet": 0.32}}, "optimised / Karras schedule, 6 steps"),
        ({"adaptive_linspace_hold": {"calls": 21}}, "AdaptiveSkip network calls"),
        ({"adaptive_linspace_hold": {"psnr": 29.9}}, "AdaptiveSkip PSNR (dB)"),
        ({"sim": {"frechet": 0.26}}, "SIM, 1 call / teacher"),
        ({"sim": {"frechet": 1.1}}, "SIM, 1 call / teacher's best 4 Heun steps"),
        ({"moment_matching_8": {"frechet": 0.16}}, "moment matching k=8 / teacher"),
        ({"moment_matching_4": {"frechet": 0.105}}, "moment matching k=8 / k=4"),
        ({"moment_matching_1": {"frechet": 0.14}}, "moment matching k=4 / k=1"),
        ({"moment_matching_4": {"frechet": 0.35}}, "moment matching k=4 / Karras with 11 calls"),
    ],
)
def test_each_bar_can_be_missed(change, missed):
    assert not bars(table(**change))[missed].passed


def test_a_bar_may_be_met_without_its_stretch():
    bar = Bar("ratio", 2.2, 2.5, stretch=2.0)
    assert bar.passed
    assert bar.as_dict()["stretch_passed"] is False
    assert Bar("no stretch", 1, 2).stretched is None


def test_rows_name_the_baselines_that_beat_them():
    rows = {"a": row(1.0, baselines=("b", "c")), "b": row(0.9), "c": row(1.1)}
    mark_losses(rows)
    assert rows["a"]["loses_to"] == ["b"]
    assert rows["b"]["loses_to"] == []


def test_rows_with_psnr_are_compared_by_it():
    rows = {"a": row(0.5, baselines=("b",), psnr=30.0), "b": row(0.9, psnr=31.0)}
    mark_losses(rows)
    assert rows["a"]["loses_to"] == ["b"]


def test_a_baseline_of_another_price_is_an_error():
    with pytest.raises(ValueError, match="needs 1 calls and its baseline 'b' 2"):
        mark_losses({"a": row(1.0, baselines=("b",)), "b": row(1.0, calls=2)})
