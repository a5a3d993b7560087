"""Data sets: folders, and repositories of the Hugging Face hub, through the library `datasets`.

A folder of files that we read ourselves gives rows with file and line; the library says which
files are which split. Everything else (what `save_to_disk` wrote, Arrow files, the hub) comes as
the library reads it. Since version 4 it runs no code from a data set.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowmem_dpo.console import say_if_slow
from lowmem_dpo.data.hub_errors import class_names, hub_refusal
from lowmem_dpo.data.rows import Row, drop_nulls, file_kinds, is_row_file, printable_line, read_rows

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SAVED_TO_DISK = ("state.json", "dataset_dict.json")


def read_dataset(
    name: str, config: str | None, split: str | None, purpose: str = "train"
) -> tuple[Iterator[Row], list[Path], str]:
    """Find the rows of one split.

    Args:
        name: A folder, or the id of a data set on the hub.
        config: Which of its configurations.
        split: Which split; by default the one named `purpose`, or the only one.
        purpose: train or test.

    Returns:
        The rows in the split's order, numbered through; the files they are read from; and the
        fingerprint of a data set of the library, which tells how they are read. It is of what the
        user's program did, so the same for answers that were drawn anew.

    Raises:
        ValueError: There is no such data set, configuration or split, or it cannot be read.
    """
    path = Path(name)
    if not path.is_dir():
        _check_is_id(path)
        splits = _load(name, config)
    elif any((path / file).is_file() for file in SAVED_TO_DISK):
        if config is not None:
            raise ValueError(f"dataset_config={config} has no effect on {name}, a saved data set")
        splits = _load_saved(name)
    else:
        splits = _folder_files(name, config) or _load(name, config)
    chosen = _choose_split(name, list(map(str, splits)), split, purpose)
    content = splits[chosen]
    if isinstance(content, list):
        return _file_rows(content), content, ""
    rows = _dataset_rows(f"{name}, split {chosen}", name, content)
    files = [Path(file["filename"]) for file in getattr(content, "cache_files", [])]
    return rows, files, str(getattr(content, "_fingerprint", ""))


def _check_is_id(path: Path) -> None:
    """Refuse what is neither there nor an id of the hub."""
    if path.exists():
        kind = f"a {path.suffix} file" if path.suffix else "a file without a suffix"
        raise ValueError(f"{path}: {kind} is not supported; {file_kinds()} files are")
    if not HUB_ID.fullmatch(path.as_posix()):
        raise ValueError(f"{path}: no such file or folder; an id on the hub is OWNER/NAME")


def _load(name: str, config: str | None) -> Mapping[str, Any]:
    """Every split of a data set on the hub, or of a folder of files that we do not read."""
    import datasets

    try:
        with say_if_slow(
            f"waiting for the data set {name} (HF_HUB_OFFLINE=1 takes what is cached)"
        ):
            return datasets.load_dataset(name, config)
    except Exception as error:  # whatever the library throws is about what the user named
        raise ValueError(_in_words(name, error)) from None


def _load_saved(name: str) -> Mapping[str, Any]:
    """The splits of a folder that `save_to_disk` wrote; a lone one is called train."""
    import datasets

    try:
        saved = datasets.load_from_disk(name)
    except Exception as error:
        raise ValueError(_in_words(name, error)) from None
    return saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}


def _folder_files(name: str, config: str | None) -> dict[str, list[Path]]:
    """The files of every split of a folder; empty if there are some that we do not read."""
    import datasets

    try:
        files = datasets.load_dataset_builder(name, config).config.data_files or {}
    except Exception as error:
        raise ValueError(_in_words(name, error)) from None
    paths = {str(split): [Path(file) for file in files[split]] for split in files}
    is_ours = all(is_row_file(p) and p.is_file() for ps in paths.values() for p in ps)
    return paths if is_ours else {}


def _choose_split(name: str, splits: list[str], split: str | None, purpose: str) -> str:
    """The split that was asked for, else that of the purpose, else the only one."""
    setting, known = f"dataset_{purpose}_split", ", ".join(splits)
    if split is not None and split not in splits:
        raise ValueError(f"{name} has no split {split}, as {setting} wants; it has {known}")
    if split is None and len(splits) > 1 and purpose not in splits:
        raise ValueError(f"{name} has the splits {known}; choose one with {setting}")
    return split or (purpose if purpose in splits else splits[0])


def _file_rows(paths: list[Path]) -> Iterator[Row]:
    """The rows of files one after another; a single file's keep their numbers."""
    rows = (row for path in paths for row in read_rows(path))
    for i, row in enumerate(rows, start=1):
        yield Row(row.number if len(paths) == 1 else i, row.place, row.value, row.fault)


def _dataset_rows(title: str, name: str, dataset: Any) -> Iterator[Row]:
    """The rows of a data set as the library decodes them."""
    number = 0
    try:
        for value in dataset:
            number += 1
            yield Row(number, f"{title}, row {number}", drop_nulls(value))
    except Exception as error:
        raise ValueError(
            f"{title}, behind row {number}: {printable_line(str(error), 200)}"
        ) from None


def _in_words(name: str, error: Exception) -> str:
    """What went wrong with a data set, and what helps."""
    if refusal := hub_refusal(name, f"https://huggingface.co/datasets/{name}", error):
        return f"cannot read the data set {name}: {refusal}"
    kinds = class_names(error)
    reason = printable_line(str(error.__cause__ or error), 200)
    if kinds & {"DatasetNotFoundError", "RepositoryNotFoundError"}:
        help_ = "check the name; for a private one `hf auth login`"
    elif kinds & {"ConnectionError", "OfflineModeIsEnabled", "ConnectError", "TimeoutError"}:
        help_ = "no such folder here, and the hub cannot be reached; check the path, or go online"
    elif "scripts" in reason:
        help_ = "code from a data set is never run; download its files and name them"
    elif Path(name).is_dir():
        help_ = "name one of its files, or put .jsonl, .json, .csv or .parquet files into it"
    else:
        help_ = "check dataset_config, or download its files and name them"
    return f"cannot read the data set {name}: {reason}; {help_}"
