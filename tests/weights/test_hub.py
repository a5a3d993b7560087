import contextlib
import errno
import threading
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from lowmem_dpo import console
from lowmem_dpo.weights import hub
from lowmem_dpo.weights.hub import (
    check_download,
    check_space,
    download_config,
    download_model,
    download_small_files,
    explain,
)

GB = 10**9


def response(status: int = 404) -> SimpleNamespace:
    """What the hub's errors look at of an answer."""
    return SimpleNamespace(headers={}, request=None, status_code=status)


def http_error(kind: type[Exception], status: int = 404, message: str = "no") -> Exception:
    return kind(f"{status} Client Error.\n\n{message}", response=response(status))


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An own cache, no token, and a hub that answers nothing."""
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for name in ("get_hf_file_metadata", "hf_hub_download", "snapshot_download", "HfApi"):
        monkeypatch.setattr(hub, name, answer(ConnectionError("no network in tests")))
    return tmp_path / "hub"


def answer(value):
    """A function that returns `value`, or raises it."""

    def function(*args, **kwargs):
        if isinstance(value, Exception):
            raise value
        return value

    return function


def keep(hub_cache: Path, *model_ids: str) -> None:
    for model_id in model_ids:
        (hub_cache / f"models--{model_id.replace('/', '--')}").mkdir(parents=True)


def repository(monkeypatch, **sizes: int) -> None:
    """Let the hub list files; __ in a name stands for a dot."""
    files = [
        SimpleNamespace(rfilename=name.replace("__", "."), size=size)
        for name, size in sizes.items()
    ]
    api = SimpleNamespace(
        model_info=answer(SimpleNamespace(siblings=files, sha="0" * 40)),
        list_repo_files=answer([file.rfilename for file in files]),
    )
    monkeypatch.setattr(hub, "HfApi", lambda: api)


def refusal(call, *args) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def asked_for(monkeypatch, error: Exception, model_id: str = "meta/llama") -> str:
    monkeypatch.setattr(hub, "get_hf_file_metadata", answer(error))
    return refusal(download_config, model_id)


def test_download_config_names_the_page_to_accept_and_the_token(monkeypatch):
    gated = http_error(errors.GatedRepoError, 401)
    message = asked_for(monkeypatch, gated)
    assert "https://huggingface.co/meta/llama" in message and "set HF_TOKEN" in message
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    message = asked_for(monkeypatch, gated)
    assert "account whose token is in use (HF_TOKEN)" in message and "hf_x" not in message


def test_download_config_suggests_the_spelling(monkeypatch, hub_cache):
    absent = http_error(errors.RepositoryNotFoundError, 401)
    assert "check the spelling" in asked_for(monkeypatch, absent, "Qwen/Qwen3-0.6b-base")
    assert "OWNER/NAME" in asked_for(monkeypatch, absent, "Qwen3")
    keep(hub_cache, "Qwen/Qwen3-0.6B", "other/model")
    message = asked_for(monkeypatch, absent, "Qwen/Qwen3-06B")
    assert "did you mean Qwen/Qwen3-0.6B?" in message and "HF_TOKEN" in message


def test_download_config_offline_says_what_is_in_the_cache(monkeypatch, hub_cache):
    offline = caused(
        errors.LocalEntryNotFoundError("cannot find"), errors.OfflineModeIsEnabled("offline")
    )
    message = asked_for(monkeypatch, offline)
    assert message.startswith("HF_HUB_OFFLINE is set") and "which is empty" in message
    keep(hub_cache, "a/b", "meta/llama-2")
    message = asked_for(monkeypatch, offline)
    assert str(hub_cache) in message and "holds meta/llama-2, a/b" in message
    keep(hub_cache, "meta/llama")
    assert "holds only a part of meta/llama" in asked_for(monkeypatch, offline)


def test_download_config_without_a_connection_says_why(monkeypatch):
    lost = caused(errors.LocalEntryNotFoundError("an error"), ConnectionError("Name\nunknown"))
    message = asked_for(monkeypatch, lost)
    assert message.startswith("Hugging Face cannot be reached (Name unknown)")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"model-Q4__gguf": 1}, "GGUF files only"),
        ({"adapter_config__json": 1}, "is an adapter, not a model"),
        ({"data__parquet": 1}, "no config.json; is it a causal language model"),
    ],
)
def test_download_config_says_what_a_repository_without_one_is(monkeypatch, files, words):
    repository(monkeypatch, **files)
    assert words in asked_for(monkeypatch, http_error(errors.RemoteEntryNotFoundError))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (http_error(errors.HfHubHTTPError, 401), "renew or unset HF_TOKEN"),
        (http_error(errors.HfHubHTTPError, 429), "(429)"),
        (http_error(errors.HfHubHTTPError, 500, "broken"), "does not give meta/llama: 500"),
        (http_error(errors.DisabledRepoError, 403), "was disabled"),
        (
            caused(
                errors.LocalEntryNotFoundError("x"), http_error(errors.HfHubHTTPError, 503, "y")
            ),
            "does not give meta/llama: 503",
        ),
        (errors.HFValidationError("bad id"), "cannot be reached (bad id)"),
    ],
)
def test_explain_tells_refusals_apart(error, words):
    assert words in explain("meta/llama", error)


def test_errors_of_the_system_stay_what_they_are(monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device", "blob")
    monkeypatch.setattr(hub, "snapshot_download", answer(full))
    with pytest.raises(OSError) as caught:
        download_model("some/model")
    assert caught.value is full


def test_downloads_ask_for_safetensors_and_small_files_only(monkeypatch, tmp_path):
    asked = []

    def download(repo, **patterns):
        asked.append(patterns["allow_patterns"])
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert download_model("some/model") == download_small_files("some/model") == tmp_path
    assert "*.safetensors" in asked[0] and "*.safetensors" not in asked[1]
    assert not any("bin" in pattern or pattern == "*" for patterns in asked for pattern in patterns)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"pytorch_model__bin": 9, "config__json": 1}, "pickled weights only"),
        ({"model__gguf": 9, "config__json": 1}, "GGUF files only"),
        ({"consolidated__safetensors": 9, "config__json": 1}, "no weights in .safetensors"),
    ],
)
def test_check_download_refuses_weights_that_cannot_be_read(monkeypatch, tmp_path, files, words):
    repository(monkeypatch, **files)
    assert words in refusal(check_download, "some/model", tmp_path, 0)


def test_check_download_counts_what_is_not_in_the_cache_yet(monkeypatch, tmp_path, hub_cache):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: SimpleNamespace(free=12 * GB))
    repository(monkeypatch, a__safetensors=8 * GB, b__safetensors=8 * GB, c__bin=99 * GB)
    message = refusal(check_download, "some/model", tmp_path, 0)
    assert "downloading some/model needs 16.0 GB" in message and "12.0 GB are free" in message
    snapshot = hub_cache / "models--some--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "a.safetensors").touch()
    monkeypatch.setattr(
        hub, "try_to_load_from_cache", _cached_in(hub.try_to_load_from_cache, hub_cache)
    )
    check_download("some/model", tmp_path, 4 * GB)
    message = refusal(check_download, "some/model", tmp_path, 5 * GB)
    assert "and its quantised copy needs 13.0 GB" in message and "--cache_dir" in message
    assert "--quantized_copy false" in message


def _cached_in(function, folder):
    return lambda model_id, name, revision: function(model_id, name, folder, revision=revision)


def test_check_download_of_a_whole_model_needs_no_room(monkeypatch, tmp_path):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    monkeypatch.setattr(hub, "_is_cached", lambda *args: True)
    repository(monkeypatch, model__safetensors=8 * GB)
    check_download("some/model", tmp_path, 5 * GB)


def test_check_download_goes_on_where_the_hub_does_not_answer(tmp_path):
    check_download("some/model", tmp_path, 10**18)


def test_check_space_keeps_two_disks_apart(monkeypatch, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    disks = {one: SimpleNamespace(st_dev=1), two: SimpleNamespace(st_dev=2)}
    places = {path: SimpleNamespace(stat=answer(stat)) for path, stat in disks.items()}
    monkeypatch.setattr(hub, "_existing", places.get)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * GB))
    check_space("x", (one, 9 * GB), (two, 9 * GB))
    assert f"in {two}" in refusal(check_space, "x", (one, 9 * GB), (two, 11 * GB))


def test_check_space_looks_at_the_nearest_folder_that_is_there(tmp_path):
    check_space("x", (tmp_path / "not" / "yet", 1), (tmp_path / "nor" / "this", 0))
    assert "needs" in refusal(check_space, "x", (tmp_path / "not" / "yet", 10**18), (tmp_path, 0))
    assert list(tmp_path.iterdir()) == []


def test_download_config_without_a_network_waits_half_a_minute_at_most(monkeypatch):
    """The hub's own code, and a port of this machine where nobody listens."""
    waits = []
    monkeypatch.setattr(hub, "get_hf_file_metadata", huggingface_hub.get_hf_file_metadata)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *args: pytest.fail("asked once more"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hf_hub_url", lambda *args: "http://127.0.0.1:9/config.json")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waits.append)
    message = refusal(download_config, "some/model")
    assert message.startswith("Hugging Face cannot be reached (") and "refused" in message
    assert waits == [1, 2, 4, 8, 8]


def test_download_config_of_what_is_cached_asks_no_more_than_the_library_does(monkeypatch):
    monkeypatch.setattr(hub, "_is_cached", lambda *args: True)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *args: "cached/config.json")
    assert download_config("some/model") == Path("cached/config.json")


def test_check_download_does_not_wait_for_ever(monkeypatch, tmp_path):
    asked = []
    api = SimpleNamespace(model_info=lambda *args, **options: asked.append(options) or 1 / 0)
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    check_download("some/model", tmp_path, 0)
    assert 0 < asked[0]["timeout"] <= 10


@pytest.mark.parametrize(
    ("name", "call", "what"),
    [
        ("get_hf_file_metadata", download_config, "config.json"),
        ("snapshot_download", download_small_files, "the tokenizer"),
        ("snapshot_download", download_model, "the weights"),
        ("HfApi", lambda model_id: check_download(model_id, Path(), 0), "the list of files"),
    ],
    ids=["config", "small files", "model", "check"],
)
def test_wait_for_the_hub_is_said_while_it_lasts(monkeypatch, name, call, what):
    said, lines = threading.Event(), []

    def say(line):
        lines.append(line)
        said.set()

    def late(*args, **options):
        assert said.wait(timeout=60)
        raise ConnectionError("late")

    monkeypatch.setattr(console, "say", say)
    monkeypatch.setattr(console, "SECONDS_BEFORE_A_WAIT_IS_SAID", 0.0)
    monkeypatch.setattr(hub, name, late)
    with contextlib.suppress(ValueError):
        call("some/model")
    assert lines == [
        f"waiting for Hugging Face: {what} of some/model (HF_HUB_OFFLINE=1 takes what is cached)"
    ]
