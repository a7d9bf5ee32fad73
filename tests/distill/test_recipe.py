"""What holds for every recipe: determinism, complete state, averaging, indifference to global randomness."""

from __future__ import annotations

import copy

import pytest
import torch

from fastdiff_kernels import _derivatives
from fastdiff_kernels.diffusion import Schedule
from fastdiff_kernels.distill import LogNormal, MomentMatchingDistiller, ScoreTrainer, SIMDistiller
from fastdiff_kernels.distill.recipe import mixed_seed

RECIPES = {
    "dsm": lambda denoiser, **options: ScoreTrainer(denoiser, label_dropout=0.2, **options),
    "lcss": lambda denoiser, **options: ScoreTrainer(denoiser, loss="lcss", antithetic=True, **options),
    "lcss_b": lambda denoiser, **options: ScoreTrainer(denoiser, loss="lcss", reading="B", **options),
    "sim": lambda denoiser, **options: SIMDistiller(denoiser, sample_shape=(1, 4, 4), **options),
    "moment_matching": lambda denoiser, **options: MomentMatchingDistiller(denoiser, num_steps=2, **options),
    "moment_matching_shared": lambda denoiser, **options: MomentMatchingDistiller(denoiser, num_steps=2, shared_batch=True, **options),
}
every_recipe = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in RECIPES.items()])


def batches(count, size=6):
    rng = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 1, 4, 4, generator=rng), {"class_labels": torch.randint(0, 3, (size,), generator=rng)}) for _ in range(count)
    ]


def run(recipe, data):
    return [recipe.step(*batch) for batch in data]


def assert_equal_state(left, right):
    """Bitwise, through dicts, lists and tensors."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal_state(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for pair in zip(left, right, strict=True):
            assert_equal_state(*pair)
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


@every_recipe
def test_two_runs_agree(tiny_denoiser, make):
    runs = [make(tiny_denoiser(dropout=0.2), seed=3) for _ in range(2)]
    histories = [run(recipe, batches(4)) for recipe in runs]
    assert histories[0] == histories[1]
    assert_equal_state(runs[0].state_dict(), runs[1].state_dict())


@every_recipe
def test_the_mean_is_taken_in_the_weights_so_that_no_gradient_is_scaled_again(tiny_denoiser, make, monkeypatch):
    factors = []
    monkeypatch.setattr(_derivatives, "scale_samples", lambda gradient, factor: factors.append(factor) or gradient)
    run(make(tiny_denoiser()), batches(2))
    assert factors
    assert all((factor == 1).all() for factor in factors)


@every_recipe
def test_another_seed_is_another_run(tiny_denoiser, make):
    first, second = (run(make(tiny_denoiser(), seed=seed), batches(2)) for seed in (3, 4))
    assert first != second


@every_recipe
def test_global_randomness_and_sampling_change_nothing(tiny_denoiser, make):
    plain, disturbed = make(tiny_denoiser(dropout=0.2)), make(tiny_denoiser(dropout=0.2))
    run(plain, batches(3))
    for batch in batches(3):
        torch.manual_seed(torch.seed())
        before = torch.get_rng_state()
        disturbed.step(*batch)
        assert torch.equal(torch.get_rng_state(), before)
        options = {"schedule": Schedule.karras(2, 0.1, 10.0)} if isinstance(disturbed, ScoreTrainer) else {}
        disturbed.sample(2, **options)
    assert_equal_state(plain.state_dict(), disturbed.state_dict())


@every_recipe
def test_resumed_run_is_the_uninterrupted_run(tiny_denoiser, make, tmp_path):
    data = batches(7)
    whole = make(tiny_denoiser(dropout=0.2))
    run(whole, data)
    begun = make(tiny_denoiser(dropout=0.2))
    run(begun, data[:3])
    torch.save(begun.state_dict(), tmp_path / "state.pt")
    resumed = make(tiny_denoiser(dropout=0.2))
    run(resumed, data[5:])  # elsewhere than the run it is to take up
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(resumed, data[3:])
    assert_equal_state(whole.state_dict(), resumed.state_dict())


@every_recipe
def test_generator_is_the_moving_average(tiny_denoiser, make):
    recipe = make(tiny_denoiser(), ema_decay=0.15, learning_rate=1e-2)
    trained = next(iter(recipe.learners.values())).network
    expected = [parameter.detach().clone() for parameter in trained.parameters()]
    for step, batch in enumerate(batches(4), start=1):
        recipe.step(*batch)
        decay = min(0.15, (1 + step) / (10 + step))
        expected = [decay * old + (1 - decay) * new.detach() for old, new in zip(expected, trained.parameters(), strict=True)]
        torch.testing.assert_close(list(recipe.generator.parameters()), expected)
    assert not recipe.generator.training
    assert not any(parameter.requires_grad for parameter in recipe.generator.parameters())


@every_recipe
def test_metrics_are_floats(tiny_denoiser, make):
    for metrics in run(make(tiny_denoiser()), batches(2)):
        assert metrics
        assert all(type(value) is float for value in metrics.values())


@every_recipe
def test_runs_under_bfloat16_autocast(tiny_denoiser, make):
    recipe = make(tiny_denoiser(), autocast=torch.bfloat16)
    plain = make(tiny_denoiser())
    metrics, expected = run(recipe, batches(2)), run(plain, batches(2))
    assert all(parameter.dtype == torch.float32 for parameter in recipe.generator.parameters())
    key = "auxiliary_loss" if "auxiliary_loss" in expected[0] else "fake_loss" if "fake_loss" in expected[0] else "loss"
    assert metrics[0][key] == pytest.approx(expected[0][key], rel=0.1, abs=0.02)
    assert metrics[0][key] != expected[0][key]


@every_recipe
def test_denoisers_are_given_a_float32_noise_level_for_every_sample(tiny_denoiser, make):
    recipe, levels = make(tiny_denoiser()), []
    for network in (recipe.generator, *(learner.network for learner in recipe.learners.values())):
        network.register_forward_pre_hook(lambda _, args: levels.append((args[1].dtype, args[1].shape == args[0].shape[:1])))
    run(recipe, batches(2))
    recipe.sample(2, **({"schedule": Schedule.karras(2, 0.1, 10.0)} if isinstance(recipe, ScoreTrainer) else {}))
    assert len(levels) >= 4
    assert set(levels) == {(torch.float32, True)}


@every_recipe
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_are_not_trained_in_16_bits(tiny_denoiser, make, dtype):
    """Most weights, and all of the average's, would stay where they are at the learning rates in use."""
    with pytest.raises(TypeError, match=rf"must have float32 or float64 parameters.* got {dtype} \(network\..*autocast=torch"):
        make(tiny_denoiser(dtype=dtype))


@every_recipe
@pytest.mark.parametrize("autocast", [torch.float32, torch.int8, "bfloat16", True])
def test_autocast_is_to_16_bits_or_not_at_all(tiny_denoiser, make, autocast):
    with pytest.raises(ValueError, match=r"autocast must be None, torch\.bfloat16 or torch\.float16, got"):
        make(tiny_denoiser(), autocast=autocast)


@every_recipe
@pytest.mark.parametrize("options", [{"ema_decay": 2.0}, {"learning_rate": 0.0}, {"betas": (2.0, 0.9)}, {"autocast": torch.float32}])
def test_a_denoiser_refused_with_bad_arguments_is_left_as_it_was(tiny_denoiser, make, options):
    denoiser = tiny_denoiser()
    denoiser.eval().network.embedding.train()
    modes = [module.training for module in denoiser.modules()]
    with pytest.raises(ValueError, match=r"must be|Invalid beta"):
        make(denoiser, **options)
    assert [module.training for module in denoiser.modules()] == modes
    assert all(parameter.requires_grad for parameter in denoiser.parameters())


@every_recipe
def test_a_gradient_that_is_not_finite_stops_the_run(tiny_denoiser, make):
    recipe = make(tiny_denoiser())
    learner = list(recipe.learners.values())[-1]  # the one that moves first
    with torch.no_grad():
        learner.parameters[0].view(-1)[0] = float("nan")
    before = [parameter.detach().clone() for parameter in learner.parameters]
    with pytest.raises(FloatingPointError, match=f"the gradient of {learner.name} is not finite at step 0"):
        recipe.step(*batches(1)[0])
    torch.testing.assert_close(learner.parameters, before, rtol=0, atol=0, equal_nan=True)


@every_recipe
def test_an_empty_batch_is_no_step(tiny_denoiser, make):
    recipe = make(tiny_denoiser())
    images, conditioning = batches(1, size=0)[0]
    with pytest.raises(ValueError, match="batch must hold at least one sample, got none"):
        recipe.step(images, conditioning)
    assert recipe.steps_done == 0


@pytest.mark.parametrize(("name", "law"), [("dsm", "noise_law"), ("lcss", "noise_law"), ("sim", "generator_law"), ("sim", "fake_law")])
@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (lambda count, rng: -torch.ones(count), "positive and finite noise levels, got from -1 to -1"),
        (lambda count, rng: torch.arange(count).float(), "positive and finite noise levels, got from 0 to 5"),
        (lambda count, rng: torch.full((count,), float("inf")), "positive and finite noise levels, got from inf to inf"),
        (lambda count, rng: torch.ones(count, dtype=torch.int64), r"floating-point noise levels of shape \[6\], got torch.int64 \[6\]"),
        (lambda count, rng: torch.ones(1), r"floating-point noise levels of shape \[6\], got torch.float32 \[1\]"),
        (lambda count, rng: 2.0, r"floating-point noise levels of shape \[6\], got float"),
    ],
)
def test_a_law_must_give_noise_levels(tiny_denoiser, name, law, levels, message):
    recipe = RECIPES[name](tiny_denoiser(), **{law: levels})
    with pytest.raises(ValueError, match=f"{law} must return {message}"):
        recipe.step(*batches(1)[0])


def test_state_of_another_recipe_is_refused(tiny_denoiser):
    state = RECIPES["sim"](tiny_denoiser()).state_dict()
    with pytest.raises(ValueError, match="state must be of a ScoreTrainer, got one of a SIMDistiller"):
        RECIPES["dsm"](tiny_denoiser()).load_state_dict(state)


@every_recipe
def test_a_state_is_a_copy_that_neither_run_changes(tiny_denoiser, make):
    first, second = make(tiny_denoiser()), make(tiny_denoiser())
    run(first, batches(3))
    state = first.state_dict()
    kept = copy.deepcopy(state)
    second.load_state_dict(state)
    ahead = run(first, batches(2))
    assert run(second, batches(2)) == ahead
    assert_equal_state(state, kept)
    first.load_state_dict(state)
    assert run(first, batches(2)) == ahead


@every_recipe
def test_samples_can_be_drawn_of_a_state_alone(tiny_denoiser, make):
    trained, loaded = make(tiny_denoiser()), make(tiny_denoiser())
    run(trained, batches(1))
    loaded.load_state_dict(trained.state_dict())
    options = {"schedule": Schedule.karras(2, 0.1, 10.0)} if isinstance(trained, ScoreTrainer) else {}
    assert torch.equal(loaded.sample(2, **options), trained.sample(2, **options))


def one_number(count, generator):
    return torch.full((count,), 0.5)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("score", {"loss": "lcss"}, "loss must be the state's 'dsm', got 'lcss'"),
        ("score", {"label_dropout": 0.5}, "label_dropout must be the state's 0.0, got 0.5"),
        (
            "score",
            {"noise_law": LogNormal(0.0)},
            r"noise_law must be the state's 'LogNormal\(mean=-1.2, .*', got 'LogNormal\(mean=0.0, .*'",
        ),
        ("score", {"noise_law": one_number}, "noise_law must be the state's .*, got 'function'"),
        ("score", {"betas": (0.5, 0.6)}, r"denoiser betas must be the state's \[0.9, 0.999\], got \[0.5, 0.6\]"),
        ("score", {"eps": 1e-3}, "denoiser eps must be the state's 1e-08, got 0.001"),
        ("score", {"seed": 5}, "seed must be the state's 0, got 5"),
        ("score", {"ema_decay": 0.5}, "ema_decay must be the state's 0.999, got 0.5"),
        ("score", {"autocast": torch.bfloat16}, "autocast must be the state's None, got 'torch.bfloat16'"),
        ("score", {"sample_shape": (1, 8, 8)}, r"sample_shape must be the state's \(1, 4, 4\), got \(1, 8, 8\)"),
        ("moment_matching", {"num_steps": 8}, "num_steps must be the state's 2, got 8"),
        ("sim", {"sigma_init": 5.0}, "sigma_init must be the state's 2.5, got 5.0"),
        ("sim", {"clip": None}, "student clip must be the state's 1.0, got inf"),
    ],
)
def test_a_state_of_other_arguments_is_refused(tiny_denoiser, kind, options, message):
    make = {
        "score": lambda **given: ScoreTrainer(tiny_denoiser(), **given),
        "moment_matching": lambda **given: MomentMatchingDistiller(tiny_denoiser(), **{"num_steps": 2, **given}),
        "sim": lambda **given: SIMDistiller(tiny_denoiser(), sample_shape=(1, 4, 4), **given),
    }[kind]
    saved = make()
    run(saved, batches(1))
    other = make(**options)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved.state_dict())
    faster = make(learning_rate=0.1)
    faster.load_state_dict(saved.state_dict())
    run(faster, batches(1))
    assert next(iter(faster.learners.values())).optimizer.param_groups[0]["lr"] == 0.1


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: {**state, "rng": torch.zeros(16, dtype=torch.uint8)}, r"rng must be the state of a cpu generator, got \[16\]"),
        (lambda state: without(state, "settings"), "state must hold settings too, as this version saves it"),
        (lambda state: {**state, "generator": {}}, "the averaged network must hold .* too"),
        (lambda state: {**state, "generator": {**state["generator"], "a": torch.ones(3)}}, r"must hold nothing for a, got a tensor \[3\]"),
        (lambda state: {**state, "learners": without(state["learners"], "fake")}, "the state's learners must hold fake too"),
        (
            lambda state: {**state, "learners": {**state["learners"], "fake": {**state["learners"]["fake"], "optimizer": {}}}},
            "the optimizer of fake must hold state, param_groups too",
        ),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(tiny_denoiser, spoil, message):
    saved, recipe = (RECIPES["sim"](tiny_denoiser()) for _ in range(2))
    run(saved, batches(2))
    run(recipe, batches(1))
    before = recipe.state_dict()
    with pytest.raises(ValueError, match=message):
        recipe.load_state_dict(spoil(saved.state_dict()))
    assert_equal_state(recipe.state_dict(), before)


def test_a_state_of_other_networks_is_refused(gaussian_denoiser):
    saved, other = ScoreTrainer(gaussian_denoiser(0.0, 1.0)), ScoreTrainer(gaussian_denoiser([0.0, 1.0], 1.0))
    with pytest.raises(ValueError, match=r"denoiser must hold a tensor \[2\] for mean, got a tensor \[\]"):
        other.load_state_dict(saved.state_dict())
    half_frozen = gaussian_denoiser(0.0, 1.0)
    half_frozen.std.requires_grad_(False)
    with pytest.raises(ValueError, match="the optimizer of denoiser must be of 1 trained parameters, got one of 2"):
        ScoreTrainer(half_frozen).load_state_dict(saved.state_dict())


def test_gradients_are_clipped(tiny_denoiser):
    recipe = ScoreTrainer(tiny_denoiser(), clip=1e-3)
    metrics = recipe.step(*batches(1)[0])
    clipped = torch.cat([parameter.grad.flatten() for parameter in recipe.denoiser.parameters()]).norm().item()
    assert metrics["gradient_norm"] > 1e-2
    assert clipped == pytest.approx(1e-3, rel=1e-3)


def test_teacher_stays_the_callers_module(tiny_denoiser):
    teacher = tiny_denoiser().train()
    before = copy.deepcopy(teacher.state_dict())
    distiller = RECIPES["sim"](teacher)
    run(distiller, batches(2))
    assert distiller.teacher is teacher
    assert_equal_state(teacher.state_dict(), before)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


class GuidedDenoiser(torch.nn.Module):
    """uncond + guidance (cond - uncond) from one call on a doubled batch, as adapters of guided models make it; counts rows."""

    sigma_data = 0.5

    def __init__(self, denoiser, guidance):
        super().__init__()
        self.denoiser, self.guidance, self.rows = denoiser, guidance, []

    def forward(self, x, sigma, class_labels):
        null = torch.full_like(class_labels, 3)
        if self.guidance == 1:
            self.rows.append(len(x))
            return self.denoiser(x, sigma, class_labels=class_labels)
        self.rows.append(2 * len(x))
        both = self.denoiser(torch.cat((x, x)), torch.cat((sigma, sigma)), class_labels=torch.cat((class_labels, null)))
        given, absent = both.chunk(2)
        return absent + self.guidance * (given - absent)


@pytest.mark.parametrize("name", ["sim", "moment_matching"])
@pytest.mark.parametrize("guidance", [3.0, 2])
def test_a_guided_teachers_student_is_evaluated_once_for_a_sample(tiny_denoiser, name, guidance):
    teacher = GuidedDenoiser(tiny_denoiser(), guidance)
    recipe = RECIPES[name](teacher)
    run(recipe, batches(2))
    recipe.sample(3, {"class_labels": torch.tensor([0, 1, 2])})
    assert teacher.guidance == guidance
    assert set(teacher.rows) == {12}
    assert set(recipe.generator.rows) == {3}
    assert all(set(learner.network.rows) == {6} for learner in recipe.learners.values())


@pytest.mark.parametrize("name", ["sim", "moment_matching"])
def test_what_the_teacher_holds_fixed_stays_fixed_in_its_copies(tiny_denoiser, name):
    teacher = tiny_denoiser()
    teacher.network.embedding.requires_grad_(False)
    fixed = {path for path, parameter in teacher.named_parameters() if not parameter.requires_grad}
    recipe = RECIPES[name](teacher)
    run(recipe, batches(2))
    for network in (recipe.generator, *(learner.network for learner in recipe.learners.values())):
        same = {path for path, parameter in network.named_parameters() if torch.equal(parameter, teacher.get_parameter(path))}
        assert same == fixed


@pytest.mark.parametrize("name", ["sim", "moment_matching"])
def test_a_frozen_teacher_is_distilled_again_in_all_its_parameters(tiny_denoiser, name):
    teacher = RECIPES[name](tiny_denoiser()).teacher
    for learner in RECIPES[name](teacher).learners.values():
        assert all(parameter.requires_grad for parameter in learner.network.parameters())


def test_mixed_seeds_differ_in_every_part():
    seeds = {mixed_seed(seed, step, stream) for seed in range(5) for step in range(5) for stream in range(5)}
    assert len(seeds) == 125
    assert all(0 <= seed < 2**63 for seed in seeds)
