"""The command line."""

import pytest

from fastdiff_kernels import _loader, cli


def test_doctor_prints_its_report(capsys):
    assert cli.main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out


def test_doctor_tells_a_library_of_another_python_from_none(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(_loader, "build_report", dict)
    cli.main(["doctor"])
    assert "! built: for another Python" in capsys.readouterr().out
    monkeypatch.setattr(_loader, "LIBRARY", tmp_path / "_native.so")
    monkeypatch.setattr(_loader, "load", _loader.load.__wrapped__)
    cli.main(["doctor"])
    told = capsys.readouterr().out
    assert "! built: nothing was compiled" in told
    assert "! loaded: no. the compiled library is missing" in told


@pytest.fixture
def ran(monkeypatch):
    from fastdiff_kernels.demo import run

    calls = []
    monkeypatch.setattr(run, "run_demo", lambda settings, out, **options: calls.append((settings, out, options)))
    return calls


def test_demo_hands_its_arguments_on(ran):
    assert cli.main(["demo", "--fast", "--out", "somewhere", "--seed", "4", "--resume", "--quiet"]) == 0
    settings, out, options = ran[0]
    assert (settings.name, settings.seed, out) == ("fast", 4, "somewhere")
    assert options["resume"] is True
    assert options["progress"] is False
    assert 1 <= options["workers"] <= 4
    assert options["data"].name == "digits"


def test_demo_is_full_unless_told(ran):
    assert cli.main(["demo"]) == 0
    assert ran[0][0].name == "full"
    assert ran[0][1] == "out/demo"


def test_a_missing_folder_is_said_and_not_a_traceback(ran, capsys, tmp_path):
    assert cli.main(["demo", "--data", str(tmp_path / "none")]) == 2
    assert "must be a folder of images" in capsys.readouterr().err
    assert not ran


def test_a_size_of_the_digits_is_refused(ran, capsys):
    assert cli.main(["demo", "--size", "32"]) == 2
    assert "size belongs to a folder of images and must not be given without data, got 32" in capsys.readouterr().err
    assert not ran


def test_a_folder_of_other_files_is_said_and_not_a_traceback(capsys, tmp_path):
    (tmp_path / "thesis.tex").touch()
    assert cli.main(["demo", "--fast", "--quiet", "--out", str(tmp_path)]) == 2
    assert "out must be a new or empty folder, or one of an earlier demo" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(monkeypatch, capsys):
    from fastdiff_kernels.demo import run

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_demo", interrupt)
    assert cli.main(["demo"]) == 130
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "required: command"),
        (["unknown"], "invalid choice: 'unknown'"),
        (["demo", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["demo", "--workers", "many"], "argument --workers: must be a whole number of at least 1; got 'many'"),
        (["demo", "--workers", "0"], "argument --workers: must be a whole number of at least 1; got '0'"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments, text, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert text in capsys.readouterr().err
