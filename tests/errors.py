"""What a refusal looks like to a user."""


def one_line_error(capsys) -> str:
    """The one line that an error is; no traceback stands beside it."""
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("lowmem_dpo: error: ")]
    assert len(lines) == 1 and "Traceback" not in error, error
    return lines[0]
