"""Models on the Hugging Face hub: what is asked or downloaded of them goes through here.

What it refuses becomes one line that says what to do: which page to accept, which variable holds
the token, what is in the local cache. A wait is said. Whether a model can be read at all, and
whether there is room for it, is known before the first weight is downloaded.
"""

import difflib
import errno
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from lowmem_dpo.console import say_if_slow
from lowmem_dpo.data.hub_errors import causes, hub_refusal, one_line

_SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model", "merges.txt"]
_MODEL_FILES = ["*.safetensors", *_SMALL_FILES]
_OTHER_FILES = ["*/*", "consolidated*"]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_OF_THE_SYSTEM = (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS)
_NUM_SHOWN = 5

Answer = TypeVar("Answer")


def download_config(model_id: str) -> Path:
    """A model's config.json, and nothing else of it.

    Raises:
        ValueError: If the hub does not give it.
    """

    def question() -> str:
        if not _is_cached(model_id, "config.json", None):
            # Six tries in half a minute without a network; the download's own last a minute each.
            get_hf_file_metadata(hf_hub_url(model_id, "config.json"), retry_on_errors=True)
        return hf_hub_download(model_id, "config.json")

    return Path(_ask(model_id, "config.json", question))


def download_small_files(model_id: str) -> Path:
    """The folder of a model's tokenizer and settings, without its weights.

    Raises:
        ValueError: If the hub does not give them.
    """
    return _snapshot(model_id, "the tokenizer", _SMALL_FILES)


def download_model(model_id: str) -> Path:
    """The folder of a model's safetensors and small files; pickles are never downloaded.

    Raises:
        ValueError: If the hub does not give them.
    """
    return _snapshot(model_id, "the weights", _MODEL_FILES)


def _snapshot(model_id: str, what: str, patterns: list[str]) -> Path:
    return Path(
        _ask(
            model_id,
            what,
            lambda: snapshot_download(
                model_id, allow_patterns=patterns, ignore_patterns=_OTHER_FILES
            ),
        )
    )


def check_download(model_id: str, cache_dir: Path, copy_bytes: int) -> None:
    """Refuse a model whose weights cannot be read, or for which there is too little room.

    A hub that does not answer is no reason: what is cached may do, and the download will tell.

    Args:
        model_id: Hugging Face id.
        cache_dir: Our own cache, which receives the quantised copy.
        copy_bytes: Size of that copy, 0 for none.

    Raises:
        ValueError: Naming what is missing, or the folder whose disk is too small.
    """
    try:
        with _said_if_slow(model_id, "the list of files"):
            info = HfApi().model_info(
                model_id, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
    except Exception:  # of many libraries; nothing depends on the answer
        return
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    weights = {n: size for n, size in sizes.items() if n.endswith(".safetensors") and "/" not in n}
    weights = {n: size for n, size in weights.items() if not n.startswith("consolidated")}
    if not weights:
        raise ValueError(_without_weights(model_id, list(sizes)))
    missing_bytes = sum(
        size for name, size in weights.items() if not _is_cached(model_id, name, info.sha)
    )
    if missing_bytes:
        check_space(
            f"downloading {model_id}",
            (Path(constants.HF_HUB_CACHE), missing_bytes),
            (cache_dir, copy_bytes),
        )


def _is_cached(model_id: str, name: str, revision: str | None) -> bool:
    return isinstance(try_to_load_from_cache(model_id, name, revision=revision), str)


def check_space(what: str, download: tuple[Path, int], copy: tuple[Path, int]) -> None:
    """Hold what will be written against the disks that it goes to, which may be one.

    Args:
        what: Is being done, for the message.
        download: The hub's cache, and the bytes it will receive.
        copy: Our cache, and the bytes of the quantised copy.

    Raises:
        ValueError: Naming the folder, what it needs and what it has.
    """
    wanted: dict[int, int] = {}
    for folder, num_bytes in (download, copy):
        place = _existing(folder)
        disk, free_bytes = place.stat().st_dev, shutil.disk_usage(place).free
        wanted[disk] = wanted.get(disk, 0) + num_bytes
        if num_bytes and wanted[disk] > free_bytes:
            is_copy = (folder, num_bytes) == copy
            together = " and its quantised copy" if is_copy else ""
            without = ", or do without the copy (--quantized_copy false)" if is_copy else ""
            raise ValueError(
                f"{what}{together} needs {_gigabytes(wanted[disk])} in {folder}, where "
                f"{_gigabytes(free_bytes)} are free; free some, or move the hub's cache (HF_HOME) "
                f"or ours (--cache_dir) to another disk{without}"
            )


def _existing(folder: Path) -> Path:
    """A folder, or the nearest one above that is there already."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def _without_weights(model_id: str, names: list[str]) -> str:
    """Why a repository without safetensors cannot be used."""
    if any(name.endswith(".gguf") for name in names):
        return f"{model_id} holds GGUF files only, which are for inference; give their source"
    if "adapter_config.json" in names:
        return (
            f"{model_id} is an adapter, not a model; download it (hf download {model_id} "
            "--local-dir FOLDER) and give its folder"
        )
    if any(name.endswith(_PICKLES) for name in names):
        return (
            f"{model_id} holds pickled weights only (.bin), which can run code; choose a release "
            "with .safetensors, or convert it: from_pretrained, then save_pretrained(FOLDER)"
        )
    return f"{model_id} holds no weights in .safetensors; is it a model?"


def _said_if_slow(model_id: str, what: str) -> AbstractContextManager[None]:
    """Says what the hub is asked for, if the answer takes a while."""
    return say_if_slow(
        f"waiting for Hugging Face: {what} of {model_id} (HF_HUB_OFFLINE=1 takes what is cached)"
    )


def _ask(model_id: str, what: str, question: Callable[[], Answer]) -> Answer:
    """The hub's answer to a question for `what`; what goes wrong becomes a ValueError of one line.

    Raises:
        ValueError: If the hub cannot be reached or refuses.
        OSError: Of this machine's own: a full disk, a folder that cannot be written.
    """
    try:
        with _said_if_slow(model_id, what):
            return question()
    except Exception as error:  # of the hub's library, of its HTTP library, of the system
        if isinstance(error, OSError) and error.errno in _OF_THE_SYSTEM:
            raise
        raise ValueError(explain(model_id, error)) from None


def explain(model_id: str, error: Exception) -> str:
    """What an error of the hub means for the user, and what to do about it."""
    chain = causes(error)
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in chain):
        return f"HF_HUB_OFFLINE is set, and {_not_in_cache(model_id)}; unset it for a download"
    if refusal := hub_refusal(model_id, f"{constants.ENDPOINT}/{model_id}", error):
        return refusal
    if isinstance(error, RepositoryNotFoundError):
        return _not_found(model_id)
    if isinstance(error, RemoteEntryNotFoundError):
        return _without_config(model_id)
    reason = one_line(chain[-1])
    return f"Hugging Face cannot be reached ({reason}), and {_not_in_cache(model_id)}"


def _not_found(model_id: str) -> str:
    near = difflib.get_close_matches(model_id, _cached_models(), n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else "check the spelling"
    if "/" not in model_id and not near:
        hint = "an id is OWNER/NAME, such as Qwen/Qwen3-0.6B"
    return (
        f"there is no folder {model_id}, and Hugging Face has no such model, or it is private: "
        f"{hint}; for a private one set HF_TOKEN"
    )


def _without_config(model_id: str) -> str:
    """A repository without config.json is none of a model that transformers knows."""
    try:
        names = HfApi().list_repo_files(model_id)
    except Exception:  # of many libraries; only the message would be better for it
        names = []
    known = any(name.endswith((".gguf", "adapter_config.json")) for name in names)
    return (
        _without_weights(model_id, names)
        if known
        else f"{model_id} holds no config.json; is it a causal language model of transformers?"
    )


def _not_in_cache(model_id: str) -> str:
    cached = _cached_models()
    nearest = difflib.get_close_matches(model_id, cached, n=_NUM_SHOWN, cutoff=0.0)
    holds = f"holds {', '.join(nearest)}" if nearest else "is empty"
    if model_id in cached:
        return f"the cache {constants.HF_HUB_CACHE} holds only a part of {model_id}"
    return f"{model_id} is not in the cache {constants.HF_HUB_CACHE}, which {holds}"


def _cached_models() -> list[str]:
    """Ids of the models in the hub's cache."""
    names = (path.name for path in Path(constants.HF_HUB_CACHE).glob("models--*") if path.is_dir())
    return sorted(name.removeprefix("models--").replace("--", "/", 1) for name in names)
