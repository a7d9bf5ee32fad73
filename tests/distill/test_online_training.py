"""Training at the levels of an OnlineSchedule: what ScoreTrainer does with it, where it leads, and how a run is taken up again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastdiff_kernels.diffusion import EDMPrecond, OnlineSchedule
from fastdiff_kernels.distill import LearningRate, ScoreTrainer, Trainer

from ..diffusion.oracles import GaussianNetwork, gaussian_length, geodesic

DATA = 0.4 * torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(256) % 3


def learned_gaussian(spread=1.0):
    """The denoiser of data N(0, spread^2), spread to be learned; notes the levels and the mode its raw output is asked for in."""
    network = GaussianNetwork(spread)
    network.c = nn.Parameter(torch.tensor(spread))
    return Noting(network)


class Noting(EDMPrecond):
    def __init__(self, network):
        super().__init__(network)
        self.asked = []

    def raw(self, x, sigma, **conditioning):
        self.asked.append((sigma.max().item(), sigma.min().item(), self.training, torch.is_autocast_enabled("cpu"), x.dtype))
        return super().raw(x, sigma, **conditioning)


def online(**options):
    return OnlineSchedule(
        9, **{"sigma_min": 0.05, "sigma_max": 20.0, "knots": 16, "burn_in": 40, "min_visits": 1, "damping": 0.5, **options}
    )


def test_levels_follow_the_denoiser_to_the_geodesic_of_the_data():
    law = online(knots=128)
    trainer = ScoreTrainer(learned_gaussian(), noise_law=law, learning_rate=LearningRate(0.05, "linear", 600), ema_decay=0.9)
    start, steps = law.levels.log(), 40 + 5 * 127
    seen = []
    Trainer(trainer, DATA, steps=steps, batch_size=32, progress=False, log=lambda step, _: seen.append(law.levels.log())).fit()
    assert all(torch.equal(levels, start) for levels in seen[: 40 + 126]), "nothing moves in the burn-in and the first estimate"
    assert law.moves == 5
    assert trainer.generator.network.c.abs().item() == pytest.approx(0.4, rel=0.05)
    exact = np.log(geodesic(gaussian_length(0.4), 8, 0.05, 20.0))
    # Five moves of half of the way, and the data's own spread in place of .4.
    assert np.abs(start.numpy() - exact).max() > 1
    assert law.levels.log().numpy() == pytest.approx(exact, abs=0.5**5 * np.abs(start.numpy() - exact).max() + 0.05)


def test_a_step_observes_the_averaged_denoiser_without_casts():
    law = online(burn_in=2)
    trainer = ScoreTrainer(learned_gaussian(), noise_law=law, autocast=torch.bfloat16)
    for count, batch in enumerate(DATA[:12].split(3)):
        trainer.step(batch)
        assert law.steps == count + 1
    grid = law.grid.float().tolist()
    assert trainer.denoiser.asked == []
    assert trainer.generator.asked == [(pytest.approx(grid[i]), pytest.approx(grid[i + 1]), False, False, torch.float32) for i in range(2)]


def test_levels_trained_at_are_the_schedules():
    law = online(burn_in=10**6)
    law.levels = torch.cat((law.levels[:1], torch.linspace(2.0, 1.0, 7, dtype=torch.float64), law.levels[-1:]))
    denoiser, levels = learned_gaussian(), []
    denoiser.register_forward_pre_hook(lambda _, args: levels.append(args[1]))
    trainer = ScoreTrainer(denoiser, noise_law=law)
    for batch in DATA.split(64):
        trainer.step(batch)
    levels = torch.cat(levels)
    assert ((levels >= 1) & (levels <= 2)).float().mean().item() == pytest.approx(6 / 8, abs=0.1)
    assert levels.min() < 1 < 2 < levels.max()


def test_samples_are_drawn_at_the_schedules_levels():
    law = online()
    trainer = ScoreTrainer(learned_gaussian(0.4), noise_law=law, sample_shape=(64,))
    assert torch.equal(trainer.sample(3), trainer.sample(3, schedule=law.schedule))
    plain = ScoreTrainer(learned_gaussian(0.4), sample_shape=(64,))
    assert not torch.equal(trainer.sample(3), plain.sample(3))


@pytest.mark.parametrize("stop", [3, 9, 12, 14])
def test_a_run_is_taken_up_again_with_the_same_bits(tiny_denoiser, tmp_path, stop):
    """Stopped in the burn-in of 5 steps, inside of an estimate of 7 intervals, at its end, and inside of the next."""
    images = DATA[:20, :16].view(-1, 1, 4, 4)

    def run(steps, **options):
        law = online(burn_in=5, knots=8)
        recipe = ScoreTrainer(tiny_denoiser(dropout=0.1), noise_law=law, label_dropout=0.2)
        fitting = Trainer(recipe, images, steps=steps, batch_size=3, conditioning={"class_labels": LABELS[:20]}, progress=False, **options)
        return law, recipe, fitting.fit()

    law, whole, history = run(20)
    run(stop, checkpoint=tmp_path / "run.pt")
    resumed_law, resumed, resumed_history = run(20, checkpoint=tmp_path / "run.pt")
    assert law.moves == resumed_law.moves == 2
    assert torch.equal(resumed_law.levels, law.levels)
    assert resumed_history == history
    for ours, theirs in zip(resumed.generator.parameters(), whole.generator.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_state_of_another_law_is_refused():
    with_law, without = ScoreTrainer(learned_gaussian(), noise_law=online()), ScoreTrainer(learned_gaussian())
    with pytest.raises(ValueError, match="got one with an OnlineSchedule for a trainer with none"):
        without.load_state_dict(with_law.state_dict())
    with pytest.raises(ValueError, match="got one with no OnlineSchedule for a trainer with one"):
        with_law.load_state_dict(without.state_dict())
    with pytest.raises(ValueError, match=r"state: grid must be 17 from 20 to 0.05; got 16 from 20"):
        ScoreTrainer(learned_gaussian(), noise_law=online(knots=17)).load_state_dict(with_law.state_dict())


def test_denoisers_that_cannot_be_observed_are_refused(gaussian_denoiser, tiny_denoiser):
    with pytest.raises(TypeError, match=r"denoiser must offer .raw\(x, sigma\) and .sigma_data"):
        ScoreTrainer(gaussian_denoiser(0.0, 1.0), noise_law=online())
    denoiser = tiny_denoiser(dtype=torch.bfloat16).requires_grad_(False)
    denoiser.network.embedding.float().requires_grad_(True)
    with pytest.raises(TypeError, match=r"denoiser must be float32 or float64 for an OnlineSchedule, .* got torch.bfloat16"):
        ScoreTrainer(denoiser, noise_law=online())
