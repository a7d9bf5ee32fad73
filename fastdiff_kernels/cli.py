"""The command ``fastdiff``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastdiff", description="Fused kernels and distillers that make diffusion models fast.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="train a teacher, optimise its schedule, skip its steps, distil it to one step; write a report",
        description="Trains, speeds up and distils a diffusion model on real images; writes a report, metrics.json and the networks.",
    )
    demo.add_argument("--data", metavar="FOLDER", help="images of your own, sub-folders are the classes (default: scikit-learn's digits)")
    demo.add_argument("--size", type=int, help="side length that the images of --data are resized to (default: 16)")
    demo.add_argument("--fast", action="store_true", help="the same stages in under 90 seconds on two cores, without the quality")
    demo.add_argument(
        "--out", metavar="FOLDER", default="out/demo", help="folder to write, new or an earlier demo's (default: %(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    demo.add_argument("--resume", action="store_true", help="go on where an interrupted run with the same arguments stopped")
    demo.add_argument("--workers", type=_count, help="processes to run stages in, one thread each (default: as many as CPUs, at most 4)")
    demo.add_argument("--quiet", action="store_true", help="no progress bar")
    commands.add_parser("doctor", help="what was built, for what, what is loaded, what is missing and what to do")
    bench = commands.add_parser("bench", help="tables, figures and comparisons of what `pytest benchmarks --save-rows` measured")
    wanted = bench.add_subparsers(dest="wanted", required=True)
    report = wanted.add_parser("report", help="write report.html, report.md and figures")
    report.add_argument("rows", metavar="ROWS", help="a results file, for instance benchmarks/results/rows.csv")
    target = report.add_mutually_exclusive_group()
    target.add_argument("--out", metavar="FOLDER", default="out/bench", help="where to write (default: %(default)s)")
    target.add_argument("--into", metavar="FILE", help="instead, put the tables between the marks of this Markdown file")
    report.add_argument("--network", action="append", default=[], help="with --into: only these networks, their parts and variants")
    compare = wanted.add_parser("compare", help="which cases became slower or faster by more than their noise; status 1 if any is slower")
    compare.add_argument("a", metavar="A", help="results file, or FILE@COMMIT for the rows of one commit")
    compare.add_argument("b", metavar="B", help="likewise")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; got {text!r}")
    return int(text)


def _cpus() -> int:
    """CPUs this process may use, which in a container can be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from .demo.run import load_data, run_demo
        from .demo.settings import Settings
    except ImportError as error:
        print(f"fastdiff demo: {error}; pip install 'fastdiff-kernels[train]'", file=sys.stderr)
        return 1
    settings = Settings.fast(arguments.seed) if arguments.fast else Settings(seed=arguments.seed)
    try:
        data = load_data(arguments.data, arguments.size)
    except ValueError as error:
        print(f"fastdiff demo: {error}", file=sys.stderr)
        return 2
    workers = min(4, _cpus()) if arguments.workers is None else arguments.workers
    try:
        run_demo(settings, arguments.out, data=data, resume=arguments.resume, workers=workers, progress=not arguments.quiet)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command with --resume goes on from {arguments.out}", file=sys.stderr)
        return 130
    except FileExistsError as error:
        print(f"fastdiff demo: {error}", file=sys.stderr)
        return 2
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from .bench import compare, report, rows

    def read(place: str) -> list[rows.Row]:
        path, _, commit = place.partition("@")
        found = list(rows.at_commit(rows.read(path), commit))
        if not found:
            raise ValueError(f"{place}: no rows")
        return found

    try:
        if arguments.wanted == "compare":
            changes = compare.compare(read(arguments.a), read(arguments.b))
            print(compare.table(changes))
            return int(any(change.verdict == "slower" for change in changes))
        if arguments.network and not arguments.into:
            raise ValueError("--network needs --into: the page has all networks")
        measured = read(arguments.rows)
        if arguments.into:
            target = Path(arguments.into)
            target.write_text(report.splice(target.read_text(), report.markdown(measured, arguments.network)))
        else:
            print(report.write(measured, arguments.out))
    except (OSError, ValueError) as error:
        print(f"fastdiff bench: {error}", file=sys.stderr)
        return 2
    return 0


def _doctor() -> int:
    from .doctor import report

    print(report())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. A missed bar of the demo is reported, not an error."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "demo":
        return _demo(arguments)
    return _bench(arguments) if arguments.command == "bench" else _doctor()


if __name__ == "__main__":
    raise SystemExit(main())
