"""Stages side by side: one process a core, one thread a process."""

from __future__ import annotations

import multiprocessing
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from queue import Empty
from typing import Any

import torch

from . import stages
from .data import ImageData, stratified_split
from .features import FeatureExtractor, train_feature_extractor
from .judge import Judge
from .settings import Settings
from .stages import Bench, Stage
from .store import Store

FIRST = ("teacher", "lcss")  # all others start from the teacher
Report = Callable[[str, float], None]


def stage_functions(settings: Settings) -> dict[str, Callable[[Bench], Stage]]:
    """Stages by name, in the order they start."""
    functions: dict[str, Callable[[Bench], Stage]] = {
        "teacher": stages.train_teacher,
        "lcss": stages.train_lcss,
        "schedule": stages.optimise_schedule,
        "skipping": stages.skip_steps,
        "sim": stages.distil_sim,
    }
    for steps in settings.moment_matching_steps:
        functions[f"moment_matching_{steps}"] = partial(stages.distil_moment_matching, steps=steps)
    return functions


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch computes in one thread, so that a run does not depend on how many workers share it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def new_judge(settings: Settings, data: ImageData, store: Store) -> Judge:
    """The judge with a newly trained feature extractor, which goes to `store`."""
    train = stratified_split(data.labels, settings.seed).train
    images, labels = data.images[train], data.labels[train]
    extractor = train_feature_extractor(images, labels, data.num_classes, epochs=settings.feature_epochs, seed=settings.seed)
    store.save_network("features", extractor)
    return _judge(settings, data, extractor)


def _judge(settings: Settings, data: ImageData, extractor: FeatureExtractor) -> Judge:
    return Judge(data, extractor, seed=settings.seed, sets=settings.frechet_sets, floor_splits=settings.floor_splits)


def run_stages(
    settings: Settings, data: ImageData, store: Store, judge: Judge, predicted: dict[str, float], *, workers: int, progress: bool
) -> dict[str, dict]:
    """Run what is not finished; {stage: {"measured_s", "predicted_s", "resumed"}} in the order of the stages."""
    names = list(stage_functions(settings))
    seconds = {name: store.seconds(name) for name in names}
    timings = {name: {"measured_s": seconds[name], "resumed": True, "predicted_s": predicted[name]} for name in names}
    pending = [name for name in names if seconds[name] is None]
    with _bar(sum(predicted[name] for name in pending), progress) as bar:
        shown = _Progress(bar, predicted)
        run = _here if workers == 1 else partial(_side_by_side, workers=workers)
        for name, measured in run(settings, data, store, judge, pending, shown):
            timings[name] |= {"measured_s": measured, "resumed": False}
    return timings


class _Progress:
    """One bar for all stages, in predicted seconds of work."""

    def __init__(self, bar: Any, predicted: dict[str, float]) -> None:
        self.bar, self.predicted = bar, predicted
        self.shares: dict[str, float] = {}

    def __call__(self, stage: str, share: float) -> None:
        if self.bar is None:
            return
        self.shares[stage] = share
        done = sum(self.predicted[name] * value for name, value in self.shares.items())
        self.bar.n = min(done, self.bar.total)  # a sum of floats may pass the total
        running = [f"{name.replace('_', ' ')} {value:.0%}" for name, value in self.shares.items() if value < 1]
        self.bar.set_postfix_str(", ".join(running))


@contextmanager
def _bar(total: float, progress: bool) -> Iterator[Any]:
    if not progress:
        yield None
        return
    from tqdm.auto import tqdm

    layout = "{percentage:3.0f}% |{bar:24}| {elapsed}, about {remaining} left  {postfix}"
    with tqdm(total=total, bar_format=layout) as bar:
        yield bar


def _here(
    settings: Settings, data: ImageData, store: Store, judge: Judge, pending: list[str], report: Report
) -> Iterator[tuple[str, float]]:
    bench = Bench(settings, data, judge, store.checkpoints, report)
    for name in pending:
        report(name, 0.0)
        yield name, _run_stage(bench, store, name)
        report(name, 1.0)


def _run_stage(bench: Bench, store: Store, name: str) -> float:
    if name not in FIRST and "teacher" not in bench.networks:
        bench.networks["teacher"] = store.load_network("teacher", bench.settings, bench.data)
    start = time.perf_counter()
    stage = stage_functions(bench.settings)[name](bench)
    seconds = time.perf_counter() - start
    store.save(name, stage, seconds)
    return seconds


_worker: tuple[Bench, Store] | None = None


def _start_worker(settings: Settings, pickled: bytes, store: Store, messages: Any) -> None:
    global _worker
    torch.set_num_threads(1)
    data = pickle.loads(pickled)
    judge = _judge(settings, data, store.load_features(data))
    _worker = Bench(settings, data, judge, store.checkpoints, lambda stage, share: messages.put((stage, share))), store


def _in_worker(name: str) -> float:
    assert _worker is not None, "the pool runs _start_worker first"
    bench, store = _worker
    return _run_stage(bench, store, name)


def _side_by_side(
    settings: Settings, data: ImageData, store: Store, judge: Judge, pending: list[str], report: Report, workers: int
) -> Iterator[tuple[str, float]]:
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    arguments = (settings, pickle.dumps(data), store, messages)
    waiting = list(pending)
    running: dict[Future[float], str] = {}
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=arguments) as pool:
        try:
            while waiting or running:
                for name in _ready(waiting, pending, running):
                    waiting.remove(name)
                    running[pool.submit(_in_worker, name)] = name
                    report(name, 0.0)
                done, _ = wait(running, timeout=0.3, return_when=FIRST_COMPLETED)
                _drain(messages, report)
                for future in done:
                    name = running.pop(future)
                    yield name, future.result()
                    report(name, 1.0)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _ready(waiting: list[str], pending: list[str], running: dict[Future[float], str]) -> list[str]:
    """What can start now: all but the first stages wait until the teacher is there."""
    no_teacher = "teacher" in waiting or "teacher" in running.values()
    return [name for name in waiting if name in FIRST or not no_teacher]


def _drain(messages: Any, report: Report) -> None:
    while True:
        try:
            report(*messages.get_nowait())
        except Empty:
            return
