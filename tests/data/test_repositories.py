import gzip
import json
import re

import datasets
import pytest

from lowmem_dpo.data.reading import open_source, read_preferences
from lowmem_dpo.data.repositories import read_dataset

ROW = {"prompt": "p", "chosen": "c", "rejected": "r"}


@pytest.fixture(autouse=True)
def _private_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.fixture
def hub(monkeypatch):
    """A hub whose one data set has the given splits; the calls are kept."""
    calls = []

    def stub(*splits, error=None):
        def load_dataset(*arguments, **keywords):
            calls.append((arguments, keywords))
            if error:
                raise error
            rows = {name: [ROW | {"prompt": f"{name} {i}"} for i in range(2)] for name in splits}
            return datasets.DatasetDict({n: datasets.Dataset.from_list(r) for n, r in rows.items()})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return stub


def write_rows(path, prompts):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [ROW | {"prompt": prompt} for prompt in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def prompts(source, **settings):
    return [p.prompt for p in read_preferences(open_source(source, **settings))[0]]


def test_read_dataset_reads_the_split_that_is_wanted_from_the_hub(hub):
    calls = hub("train", "test", "other")
    assert prompts("owner/name") == ["train 0", "train 1"]
    assert prompts("owner/name", purpose="test") == ["test 0", "test 1"]
    assert prompts("owner/name", split="other", dataset_config="en") == ["other 0", "other 1"]
    assert calls[-1] == (("owner/name", "en"), {})  # and so without leave to run code
    places = [row.place for row in read_dataset("owner/name", None, None)[0]]
    assert places == ["owner/name, split train, row 1", "owner/name, split train, row 2"]


def test_read_dataset_takes_the_only_split_and_lists_several(hub):
    hub("all")
    assert prompts("owner/name", purpose="test") == ["all 0", "all 1"]
    hub("train_prefs", "test_prefs")
    with pytest.raises(ValueError, match="has the splits train_prefs, test_prefs; choose one with"):
        prompts("owner/name")
    with pytest.raises(ValueError, match="has no split x, as dataset_test_split wants; it has tr"):
        prompts("owner/name", split="x", purpose="test")


class GatedRepoError(Exception):
    """As huggingface_hub calls it."""


@pytest.mark.parametrize(
    ("error", "help_"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b'\ndoesn't exist"),
            "check the name",
        ),
        (
            GatedRepoError("403 Client Error"),
            "accept its terms on https://huggingface.co/datasets/owner/name",
        ),
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "the hub cannot be reached"),
        (RuntimeError("Dataset scripts are no longer supported"), "code from a data set is never"),
        (ValueError("BuilderConfig 'x' not found. Available: ['en']"), "check dataset_config"),
        (KeyError("x" * 10**5), "check dataset_config"),
    ],
)
def test_read_dataset_puts_the_librarys_errors_into_one_line(hub, error, help_):
    hub(error=error)
    with pytest.raises(ValueError) as caught:
        prompts("owner/name")
    message = str(caught.value)
    assert message.startswith("cannot read the data set owner/name: ") and help_ in message
    assert "\n" not in message and len(message) < 400


def test_read_dataset_reads_folders_of_files_with_file_and_line(tmp_path):
    folder = tmp_path / "set"
    write_rows(folder / "train-0.jsonl", ["a", "b"])
    write_rows(folder / "train-1.jsonl", ["c"])
    write_rows(folder / "test.jsonl", ["d"])
    assert prompts(folder) == ["a", "b", "c"]
    assert prompts(folder, purpose="test") == ["d"]
    rows = list(read_dataset(str(folder), None, None)[0])
    assert [row.number for row in rows] == [1, 2, 3]
    assert rows[2].place.endswith("train-1.jsonl, line 1")
    (folder / "test.jsonl").write_text('\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"test\.jsonl, line 2: broken JSON"):
        prompts(folder, purpose="test")


def test_read_dataset_reads_folders_of_parquet_and_csv(tmp_path):
    data = datasets.Dataset.from_list([ROW])
    for name in ("parquet", "csv"):
        (tmp_path / name).mkdir()
        getattr(data, f"to_{name}")(str(tmp_path / name / f"data.{name}"))
        assert prompts(tmp_path / name) == ["p"]


@pytest.mark.parametrize("suffix", [".tsv", ".ndjson", ".jsonl.gz", ".csv.gz"])
def test_read_dataset_reads_folders_of_every_kind_of_file_here(tmp_path, suffix):
    text = "prompt\tchosen\trejected\np\tc\tr\n" if suffix == ".tsv" else json.dumps(ROW)
    text = "prompt,chosen,rejected\np,c,r\n" if suffix == ".csv.gz" else text
    content = gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode()
    (tmp_path / f"data{suffix}").write_bytes(content)
    rows = list(read_dataset(str(tmp_path), None, None)[0])
    assert [row.value for row in rows] == [ROW]
    assert f"data{suffix}, line " in rows[0].place


def test_read_dataset_reads_what_save_to_disk_wrote(tmp_path):
    messages = [{"role": "user", "content": "u"}]
    data = datasets.Dataset.from_list([ROW | {"prompt": messages}, ROW | {"prompt": messages * 2}])
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "other": data}).save_to_disk(str(tmp_path / "two"))
    for name in ("one", "two"):
        assert prompts(tmp_path / name) == [messages, messages * 2]
    with pytest.raises(ValueError, match="dataset_config=en has no effect"):
        prompts(tmp_path / "one", dataset_config="en")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read the data set .*one: "):
        prompts(tmp_path / "one")


def test_read_dataset_refuses_other_sources_by_name(tmp_path):
    for name in ("a.txt", "a.parquet.gz", "a.gz", "a"):
        (tmp_path / name).write_text("x")
        with pytest.raises(ValueError, match=r"not supported; \.jsonl, .*\(\.gz behind it"):
            prompts(tmp_path / name)
    with pytest.raises(ValueError, match="no such file or folder; an id on the hub is OWNER/NAME"):
        prompts(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=re.escape("put .jsonl, .json, .csv or .parquet files in")):
        prompts(tmp_path / "empty")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "code.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(ValueError, match="code from a data set is never run"):
        prompts(tmp_path / "code")
