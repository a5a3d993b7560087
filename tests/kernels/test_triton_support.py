import sys
import types

import pytest
import torch

from lowmem_dpo_kernels import token_logps_path, triton_support
from lowmem_dpo_kernels.triton_support import (
    RehearsedCard,
    capability_of,
    is_rehearsing,
    launch,
    missing_for_compiling,
    rehearsing,
    runs_triton,
    triton_problem,
)


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


def test_a_rehearsal_notes_launches_and_has_a_card_of_its_own():
    noted = []
    card = RehearsedCard((8, 9), lambda name, tensors, flops: noted.append((name, tensors, flops)))
    kernel = types.SimpleNamespace(fn=types.SimpleNamespace(__name__="_op_kernel"))
    x = torch.ones(3)
    with rehearsing(card):
        assert is_rehearsing()
        assert capability_of(torch.device("cuda", 0)) == (8, 9)
        assert runs_triton(torch.device("cuda")) and not runs_triton(torch.device("cpu"))
        launch(kernel, (1,), x, 7, flops=5.0, num_warps=4)
    assert noted == [("op_kernel", [x], 5.0)]
    assert not is_rehearsing()
    with rehearsing(RehearsedCard((7, 5), lambda *_: None)):
        assert not runs_triton(torch.device("cuda"))
