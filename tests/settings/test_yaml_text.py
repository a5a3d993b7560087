import pytest

from lowmem_dpo.settings.configs import TrainConfig


@pytest.mark.parametrize(
    "text, message",
    [
        ("beta: 0.1\nseed: 1\nbeta: 0.5", "beta is given twice"),
        ("beta: 0.1\nseed: 1\nbeta: 0.5", "line 3: beta is given twice"),
        ("seed: 042", "042 means another number in YAML"),
        ("beta: 1:30.5", "1:30.5 means another number in YAML"),
        ("beta: 1_0.5", "1_0.5 means another number in YAML"),
        ("seed: !!bool abc", "types such as !!bool are not read; leave it out"),
        ("data: !!timestamp abc", "types such as !!timestamp are not read"),
        ("seed: " + "9" * 5000, "a number of 5000 digits"),
        ("seed: " + "[" * 3000, "its brackets are nested too deep"),
        ("seed: \0", "the character '\\x00' cannot be there"),
        ('data: "a\\0b"', "data must be plain UTF-8 text, got 'a\\x00b'"),
        ("columns: {prompt: 1}", "columns: prompt must be the name of a column in the file, got 1"),
        ("max_length: 1:30", "1:30 means another number in YAML"),
    ],
)
def test_from_yaml_refuses_what_yaml_reads_otherwise_than_it_was_meant(text, message, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        TrainConfig.from_yaml(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_from_yaml_refuses_utf16(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("beta: 1\n", encoding="utf-16")
    with pytest.raises(ValueError, match="is not UTF-8 text; save it as UTF-8"):
        TrainConfig.from_yaml(path)


def test_from_yaml_takes_dates_for_text_thousands_and_merge_keys(tmp_path):
    text = "data: 2024-13-45\nmax_steps: 1_000\ncolumns:\n  <<: {prompt: q}\n  chosen: c\n"
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    config = TrainConfig.from_yaml(path)
    assert (config.data, config.max_steps) == ("2024-13-45", 1000)
    assert config.columns == {"prompt": "q", "chosen": "c"}
