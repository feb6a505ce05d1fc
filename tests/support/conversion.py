"""`data_prep.convert` in this process."""

from pathlib import Path

from data_prep import convert


def converted(source, output: Path | str, **options) -> int:
    """The command line; its exit status."""
    flags = [f"--{name}={value}" for name, value in ({"num_workers": 1} | options).items()]
    return convert.main([str(source), str(output), *flags])


def refused(capsys, source, output: Path, **options) -> str:
    """The message of a conversion that ends with status 1."""
    capsys.readouterr()
    assert converted(source, output, **options) == 1
    captured = capsys.readouterr()
    assert "error: " in captured.err and "Traceback" not in captured.err and not captured.out
    return captured.err.partition("error: ")[2]
