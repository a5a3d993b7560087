import sys

import pytest
import torch

from lowmem_dpo_kernels import token_logps_path, triton_support
from lowmem_dpo_kernels.triton_support import missing_for_compiling, triton_problem


@pytest.fixture
def headers(tmp_path):
    folder = tmp_path / "include"
    folder.mkdir()
    (folder / "Python.h").touch()
    return folder


@pytest.fixture
def compilers(tmp_path):
    """A folder for PATH with a compiler in it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "clang").touch(mode=0o755)
    return str(folder)


def test_missing_for_compiling_is_content_with_any_compiler_and_headers(headers, compilers):
    assert missing_for_compiling("linux", {"PATH": compilers}, headers) is None
    assert missing_for_compiling("linux", {"PATH": "", "CC": f"{compilers}/clang"}, headers) is None
    assert missing_for_compiling("win32", {"PATH": ""}, headers) is None


def test_missing_for_compiling_names_the_compiler_and_the_packages(tmp_path, headers, compilers):
    missing = missing_for_compiling("linux", {"PATH": str(tmp_path)}, headers)
    assert missing.startswith("Triton needs a C compiler;")
    assert "sudo apt install build-essential python3." in missing
    missing = missing_for_compiling("linux", {"PATH": compilers, "CC": "icc"}, headers)
    assert "CC=icc is not there" in missing


def test_missing_for_compiling_names_the_headers(tmp_path, compilers):
    missing = missing_for_compiling("linux", {"PATH": compilers}, tmp_path)
    assert f"no Python.h in {tmp_path}" in missing and "apt install" in missing
    assert "python.org" in missing_for_compiling("win32", {}, tmp_path)


def test_triton_problem_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert triton_problem.__wrapped__() == "Triton is not installed"


@pytest.mark.parametrize(("problem", "path"), [(None, "triton"), ("no compiler", "torch")])
def test_token_logps_path_is_torch_where_triton_cannot_compile(monkeypatch, problem, path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(triton_support, "triton_problem", lambda: problem)
    assert token_logps_path("cuda").startswith(f"{path}, ")
