"""The loop: which data a step sees, checkpoints, interruption, history."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager

import pytest
import torch

from fastdiff_kernels.diffusion import Schedule
from fastdiff_kernels.distill import MomentMatchingDistiller, ScoreTrainer, SIMDistiller, Trainer

DATA = torch.randn(10, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(10) % 3


@pytest.fixture
def recipe(tiny_denoiser):
    return lambda: ScoreTrainer(tiny_denoiser(dropout=0.1))


def trainer(recipe, **options):
    return Trainer(recipe, DATA, **{"steps": 8, "batch_size": 4, "conditioning": {"class_labels": LABELS}, "progress": False, **options})


def weights(recipe):
    return torch.cat([parameter.flatten() for parameter in recipe.generator.parameters()])


def saved_steps(path):
    return torch.load(path, weights_only=True)["recipe"]["steps_done"]


@contextmanager
def sigint_handled_by(handler):
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def tear(recipe, step):
    """Make step `step` fail once, after the fake was updated and before the student is."""
    student = recipe.learners["student"]
    update = student.update

    def failing(loss, at):
        if at == step:
            student.update = update
            raise FloatingPointError("torn")
        return update(loss, at)

    student.update = failing


def test_every_epoch_visits_every_sample_once(recipe):
    data, index = torch.arange(10).view(10, 1, 1, 1).float().expand(10, 1, 4, 4), torch.arange(10)
    batches = Trainer(recipe(), data, steps=5, batch_size=4, conditioning={"index": index}, seed=2).batches
    seen = []
    for step in range(5):
        batch, conditioning = batches(step)
        assert torch.equal(batch[:, 0, 0, 0].long(), conditioning["index"])
        seen += conditioning["index"].tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_batches_depend_on_seed_and_step_alone(recipe):
    first, second, other = (trainer(recipe(), seed=seed).batches for seed in (1, 1, 2))
    later = second(6)[0]
    assert torch.equal([first(step)[0] for step in range(7)][6], later)
    assert not torch.equal(other(6)[0], later)


def test_a_batch_may_be_larger_than_the_data(recipe):
    batch, conditioning = trainer(recipe(), batch_size=23).batches(1)
    assert batch.shape == (23, 1, 4, 4)
    assert conditioning["class_labels"].shape == (23,)


def test_history_and_log_hold_every_step(recipe):
    seen = []
    fitting = trainer(recipe(), log=lambda step, metrics: seen.append((step, metrics["loss"])))
    history = fitting.fit()
    assert history["loss/step"] == list(range(8))
    assert seen == list(zip(range(8), history["loss"], strict=True))


def test_history_of_metrics_that_alternate(tiny_denoiser):
    history = trainer(MomentMatchingDistiller(tiny_denoiser(), num_steps=2)).fit()
    assert history["auxiliary_loss/step"] == [0, 2, 4, 6]
    assert history["loss/step"] == [1, 3, 5, 7]


def test_runs_without_data(tiny_denoiser):
    plain = Trainer(SIMDistiller(tiny_denoiser(), sample_shape=(1, 4, 4)), steps=2, batch_size=3, progress=False)
    assert plain.batches(0) == (3, None)
    assert len(plain.fit()["loss"]) == 2
    labelled = Trainer(SIMDistiller(tiny_denoiser(), sample_shape=(1, 4, 4)), steps=2, batch_size=3, conditioning={"class_labels": LABELS})
    batch, conditioning = labelled.batches(0)
    assert batch == 3
    assert conditioning["class_labels"].shape == (3,)


def test_batches_from_a_function(recipe):
    asked = []

    def source(step):
        asked.append(step)
        return DATA[:2], {"class_labels": LABELS[:2]}

    Trainer(recipe(), source, steps=3, progress=False).fit()
    assert asked == [0, 1, 2]


def test_two_fits_agree(recipe):
    runs = [recipe(), recipe()]
    histories = [trainer(one).fit() for one in runs]
    assert histories[0] == histories[1]
    assert torch.equal(*map(weights, runs))


def test_resumes_from_a_checkpoint_bit_for_bit(recipe, tmp_path):
    whole, first, second = recipe(), recipe(), recipe()
    expected = trainer(whole).fit()
    path = tmp_path / "new" / "run.pt"
    trainer(first, steps=5, checkpoint=path, checkpoint_every=2).fit()
    history = trainer(second, checkpoint=path).fit()
    assert history == expected
    assert torch.equal(weights(second), weights(whole))
    assert [entry.name for entry in path.parent.iterdir()] == ["run.pt"]


def test_a_finished_run_is_not_run_again(recipe, tmp_path):
    expected = trainer(recipe(), checkpoint=tmp_path / "run.pt").fit()
    again = trainer(recipe(), checkpoint=tmp_path / "run.pt", log=lambda step, metrics: pytest.fail("took a step"))
    assert again.fit() == expected


def test_checkpoints_are_written_every_so_often(recipe, tmp_path):
    path, steps = tmp_path / "run.pt", []

    def log(step, metrics):
        steps.append((step, saved_steps(path)))

    trainer(recipe(), checkpoint=path, checkpoint_every=3, log=log).fit()
    assert steps == [(0, 0), (1, 0), (2, 0), (3, 3), (4, 3), (5, 3), (6, 6), (7, 6)]
    assert saved_steps(path) == 8


def test_interrupt_finishes_the_step_saves_and_resumes(recipe, tmp_path):
    whole, first, second = recipe(), recipe(), recipe()
    expected = trainer(whole).fit()

    class Interrupting(type(first)):
        def _step(self, batch, conditioning):
            if self.steps_done == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return super()._step(batch, conditioning)

    first.__class__ = Interrupting
    Interrupting.__name__ = "ScoreTrainer"
    previous = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer(first, checkpoint=tmp_path / "run.pt").fit()
    assert signal.getsignal(signal.SIGINT) is previous
    assert first.steps_done == 4
    assert trainer(second, checkpoint=tmp_path / "run.pt").fit() == expected
    assert torch.equal(weights(second), weights(whole))


def test_interrupt_between_steps_saves(recipe, tmp_path):
    def log(step, metrics):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(recipe(), checkpoint=tmp_path / "run.pt", log=log).fit()
    assert saved_steps(tmp_path / "run.pt") == 3


def test_a_torn_step_is_not_saved(recipe, tmp_path):
    whole, torn, second = recipe(), recipe(), recipe()
    expected = trainer(whole).fit()

    def hook(module, args):
        if torn.steps_done == 2:
            raise KeyboardInterrupt

    torn.denoiser.register_forward_pre_hook(hook)
    with pytest.raises(KeyboardInterrupt):
        trainer(torn, checkpoint=tmp_path / "run.pt", checkpoint_every=1).fit()
    # the torn step has drawn its noise already: saved, it would not be drawn again
    assert trainer(second, checkpoint=tmp_path / "run.pt").fit() == expected
    assert torch.equal(weights(second), weights(whole))


def test_a_torn_step_is_not_continued_in_silence(tiny_denoiser):
    recipe = SIMDistiller(tiny_denoiser(), sample_shape=(1, 4, 4))
    tear(recipe, step=1)
    with pytest.raises(FloatingPointError):
        trainer(recipe).fit()
    for again in (trainer(recipe), trainer(recipe, steps=1)):
        with pytest.raises(RuntimeError, match="the last step of the SIMDistiller ended in an error or an interrupt"):
            again.fit()
    with pytest.raises(RuntimeError, match="make the recipe and its networks anew"):
        recipe.state_dict()


def test_a_torn_first_step_is_taken_again_from_the_checkpoint(tiny_denoiser, tmp_path):
    whole, torn = (SIMDistiller(tiny_denoiser(), sample_shape=(1, 4, 4)) for _ in range(2))
    expected = trainer(whole, steps=3).fit()
    tear(torn, step=0)
    fitting = trainer(torn, steps=3, checkpoint=tmp_path / "run.pt")
    with pytest.raises(FloatingPointError):
        fitting.fit()
    assert saved_steps(tmp_path / "run.pt") == 0
    assert fitting.fit() == expected
    assert torch.equal(weights(torn), weights(whole))


def test_a_second_interrupt_does_not_wait(recipe):
    stubborn = recipe()

    def hook(module, args):
        if stubborn.steps_done == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("went on after the second interrupt")

    stubborn.denoiser.register_forward_pre_hook(hook)
    with pytest.raises(KeyboardInterrupt):
        trainer(stubborn).fit()
    assert stubborn.steps_done == 1


def test_an_interrupt_during_the_last_save_is_not_swallowed(recipe, tmp_path, monkeypatch):
    def interrupted_save(state, path, save=torch.save):
        save(state, path)
        if state["recipe"]["steps_done"] == 8:
            monkeypatch.undo()
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(torch, "save", interrupted_save)
    with pytest.raises(KeyboardInterrupt):
        trainer(recipe(), checkpoint=tmp_path / "run.pt", checkpoint_every=4).fit()
    assert saved_steps(tmp_path / "run.pt") == 8


def test_an_ignored_interrupt_stays_ignored(recipe):
    with sigint_handled_by(signal.SIG_IGN):
        history = trainer(recipe(), log=lambda step, metrics: os.kill(os.getpid(), signal.SIGINT)).fit()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert len(history["loss"]) == 8


def test_fits_outside_the_main_thread(recipe):
    results = []
    thread = threading.Thread(target=lambda: results.append(trainer(recipe(), steps=2).fit()))
    thread.start()
    thread.join()
    assert len(results[0]["loss"]) == 2


def test_progress_bar_names_the_recipe_and_its_metrics(recipe, capsys):
    pytest.importorskip("tqdm")
    trainer(recipe(), steps=3, progress=True).fit()
    shown = capsys.readouterr().err
    assert "ScoreTrainer" in shown
    assert "3/3" in shown
    assert "loss=" in shown


def test_a_launch_in_several_processes_is_refused(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="launched in 2"):
        trainer(recipe()).fit()


def test_a_checkpoint_of_another_order_of_the_data_is_refused(recipe, tmp_path):
    trainer(recipe(), checkpoint=tmp_path / "run.pt", steps=1).fit()
    with pytest.raises(ValueError, match="seed must be the checkpoint's 0"):
        trainer(recipe(), checkpoint=tmp_path / "run.pt", seed=1).fit()
    with pytest.raises(ValueError, match="batch_size must be the checkpoint's 4"):
        trainer(recipe(), checkpoint=tmp_path / "run.pt", batch_size=5).fit()
    with pytest.raises(ValueError, match=r"number of samples must be the checkpoint's 10 to resume .*run.pt, got 9"):
        Trainer(recipe(), DATA[:9], steps=8, batch_size=4, checkpoint=tmp_path / "run.pt").fit()


def test_a_checkpoint_of_another_recipe_is_refused_and_named(recipe, tiny_denoiser, tmp_path):
    trainer(recipe(), checkpoint=tmp_path / "run.pt", steps=1).fit()
    with pytest.raises(ValueError, match=r"checkpoint .*run.pt: loss must be the state's 'dsm', got 'lcss'"):
        trainer(ScoreTrainer(tiny_denoiser(dropout=0.1), loss="lcss"), checkpoint=tmp_path / "run.pt").fit()


def test_samples_can_be_drawn_after_a_finished_run_was_taken_up(recipe, tmp_path):
    first, again = recipe(), recipe()
    for one in (first, again):
        trainer(one, checkpoint=tmp_path / "run.pt", steps=2).fit()
    assert torch.equal(again.sample(2, schedule=Schedule.karras(2, 0.1, 10.0)), first.sample(2, schedule=Schedule.karras(2, 0.1, 10.0)))


def damaged(path):
    path.write_bytes(path.read_bytes()[:-200])


def of_an_earlier_layout(path):
    held = torch.load(path, weights_only=True)
    del held["order"]["number of samples"]
    torch.save(held, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"abc"), "checkpoint must be a file that a Trainer has written, got .*run.pt, which cannot be read"),
        (lambda path: path.write_bytes(b""), "checkpoint must be a file that a Trainer has written, got .*run.pt, which cannot be read"),
        (damaged, "checkpoint must be a file that a Trainer has written, got .*run.pt, which cannot be read"),
        (lambda path: torch.save({"model": 1}, path), "checkpoint .*run.pt must hold recipe, history, order too, .* got model"),
        (lambda path: torch.save([1], path), "checkpoint .*run.pt must be a dict, got list"),
        (of_an_earlier_layout, "order of the checkpoint .*run.pt must hold number of samples too, as this version saves it"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named(recipe, tmp_path, write, message):
    trainer(recipe(), checkpoint=tmp_path / "run.pt", steps=1).fit()
    write(tmp_path / "run.pt")
    held = (tmp_path / "run.pt").read_bytes()
    with pytest.raises(ValueError, match=message):
        trainer(recipe(), checkpoint=tmp_path / "run.pt").fit()
    assert (tmp_path / "run.pt").read_bytes() == held


@pytest.mark.parametrize("place", ["file/run.pt", "folder"])
def test_a_checkpoint_that_cannot_be_written_is_found_before_the_first_step(recipe, tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=place.split("/")[0]):
        trainer(recipe(), checkpoint=tmp_path / place, log=lambda step, metrics: pytest.fail("took a step")).fit()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"batch_size": None}, ValueError, "batch_size must be given"),
        ({"checkpoint_every": 2}, ValueError, "checkpoint must name a file"),
        ({"conditioning": {"class_labels": LABELS[:5]}}, ValueError, r"equally many samples, got .*class_labels'\]\": 5"),
        ({"conditioning": {"class_labels": [1, 2]}}, TypeError, r"class_labels'\] must be a tensor"),
    ],
)
def test_bad_arguments(recipe, options, error, message):
    with pytest.raises(error, match=message):
        trainer(recipe(), **options)


def test_bad_sources(recipe):
    with pytest.raises(TypeError, match="recipe must be a Recipe, got Linear"):
        trainer(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"data must be a tensor \[M, ...\] with M > 0"):
        Trainer(recipe(), DATA[:0], steps=1, batch_size=1)
    with pytest.raises(ValueError, match="must not be given beside a function"):
        Trainer(recipe(), lambda step: (DATA, None), steps=1, batch_size=4)
