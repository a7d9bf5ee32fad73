"""Which data and which network an estimate of a schedule goes on with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fastdiff_kernels.diffusion import EDMPrecond, Schedule, optimize_schedule
from fastdiff_kernels.diffusion._fingerprints import of_batch, of_weights


class Weighted(EDMPrecond):
    """Takes labels, and has weights and a buffer that a file can be told by."""

    def __init__(self, weight: float = 1.0, mean: float = 0.0, *, never: bool = False) -> None:
        super().__init__(nn.Linear(3, 3, bias=False))
        self.network.weight.data.fill_(weight)
        self.register_buffer("mean", torch.tensor(mean))
        self.never = never
        self.labels: list[Tensor | None] = []

    def raw(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        assert not self.never, "a finished estimate calls no network"
        self.labels.append(class_labels)
        return torch.sin(self.network(x - self.mean))


CLEAN, LABELS = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12)


@pytest.mark.parametrize("streamed", [False, True], ids=["tensor", "stream"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"denoiser": Weighted(1.5)}, r"with {'weights of the denoiser': '\w{8}'}, got {'weights of the denoiser': '\w{8}'}$"),
        ({"denoiser": Weighted(mean=0.1)}, "'weights of the denoiser'"),
        ({"sigma_data": 0.6}, "with {'sigma_data': 0.5}, got {'sigma_data': 0.6}"),
        ({"data": 2 * CLEAN}, r"with {'first batch and its conditioning': '\w{8}'}, got {'first batch and its conditioning': '\w{8}'}"),
        ({"data": CLEAN.double()}, "'first batch and its conditioning'"),
        ({"labels": LABELS.flip(0)}, "'first batch and its conditioning'"),
    ],
)
def test_a_file_of_another_estimate_is_refused_though_it_has_ended(
    tmp_path: Path, change: dict[str, object], message: str, streamed: bool
) -> None:
    def optimise(denoiser: Weighted, data: Tensor = CLEAN, labels: Tensor = LABELS, sigma_data: float = 0.5) -> Schedule:
        denoiser.sigma_data = sigma_data
        options: dict[str, object] = {"sigma_min": 0.1, "sigma_max": 8.0, "knots": 5, "path": tmp_path / "schedule.pt"}
        if streamed:
            pairs = zip(data.split(4), labels.split(4), strict=True)
            return optimize_schedule(denoiser, [(x, {"class_labels": y}) for x, y in pairs], 4, **options)
        return optimize_schedule(denoiser, data, 4, batch_size=4, conditioning={"class_labels": labels}, **options)

    ended = optimise(Weighted())
    assert torch.equal(optimise(Weighted(never=True)).sigmas, ended.sigmas)
    with pytest.raises(ValueError, match=message):
        optimise(**{"denoiser": Weighted(), **change})


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    path, options = tmp_path / "schedule.pt", {"sigma_min": 0.1, "sigma_max": 8.0, "knots": 5}
    optimize_schedule(Weighted(), CLEAN, 4, path=path, **options)
    held = torch.load(path, weights_only=True)
    del held["settings"]["sigma_data"]
    torch.save(held, path)
    with pytest.raises(ValueError, match=r"must hold an estimate that optimize_schedule of this version has saved"):
        optimize_schedule(Weighted(), CLEAN, 4, path=path, **options)


def test_levels_of_an_ended_estimate_may_be_read_off_in_another_way(tmp_path: Path) -> None:
    options = {"sigma_min": 0.1, "sigma_max": 8.0, "knots": 9, "path": tmp_path / "schedule.pt"}
    optimize_schedule(Weighted(), CLEAN, 4, **options)
    assert optimize_schedule(Weighted(never=True), CLEAN, 7, interpolation="linear", **options).num_steps == 7


class Pairs(Dataset):
    """A datum and what conditions it."""

    def __len__(self) -> int:
        return len(CLEAN)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return CLEAN[index], {"class_labels": LABELS[index]}


def test_batches_may_come_from_a_data_loader() -> None:
    options = {"sigma_min": 0.1, "sigma_max": 8.0, "knots": 5}
    bare = optimize_schedule(Weighted(), list(CLEAN.split(4)), 4, **options)
    loaded = optimize_schedule(Weighted(), DataLoader(TensorDataset(CLEAN), batch_size=4), 4, **options)
    assert torch.equal(loaded.sigmas, bare.sigmas)
    denoiser = Weighted()
    optimize_schedule(denoiser, DataLoader(Pairs(), batch_size=4), 4, **options)
    assert torch.cat([labels[:4] for labels in denoiser.labels[:3]]).tolist() == LABELS.tolist()


def test_weights_are_told_by_their_bits_and_not_by_what_wraps_them() -> None:
    network = nn.Linear(3, 2)
    whole = of_weights(network)
    assert of_weights(nn.Sequential(nn.Sequential(network))) == whole
    assert of_weights(network.double()) != whole
    assert of_weights(network.float()) == whole
    network.weight.data[0, 0] *= 1 + 1e-6
    assert of_weights(network) != whole
    assert of_weights(nn.Linear(3, 2, device="meta")) == of_weights(nn.Linear(3, 2, device="meta"))


def test_weights_of_every_dtype_are_read() -> None:
    module = nn.Module()
    for dtype in (torch.float64, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool, torch.complex64):
        before = of_weights(module)
        module.register_buffer(str(dtype).partition(".")[2], torch.ones(3, dtype=dtype))
        ones = of_weights(module)
        module.get_buffer(str(dtype).partition(".")[2]).zero_()
        assert len({before, ones, of_weights(module)}) == 3


def test_weights_that_a_subclass_holds_in_parts_are_read() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    def of(second: float) -> str:
        module = nn.Module()
        module.register_buffer("both", TwoTensor(torch.ones(3), torch.full((3,), second)))
        return of_weights(module)

    assert of(1.0) == of(1.0) != of(2.0)


def test_a_batch_is_told_by_its_conditioning_in_any_order_of_the_keys() -> None:
    given: dict[str, object] = {"mode": "a", "text": {"tokens": torch.ones(12, 2, dtype=torch.bfloat16)}}
    found = of_batch(CLEAN, given)
    assert of_batch(CLEAN, dict(reversed(given.items()))) == found
    others = ({**given, "mode": "b"}, {**given, "text": {"tokens": torch.zeros(12, 2, dtype=torch.bfloat16)}}, {"mode": "a"})
    assert found not in {of_batch(CLEAN, other) for other in others}
