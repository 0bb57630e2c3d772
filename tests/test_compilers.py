"""What the machine brings: compilers that cannot build, and private names of PyTorch that may go."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longlive_opt.errors import NotAvailable
from longlive_opt.kernels import torch_internals
from longlive_opt.kernels.compilers import build_fault, check_cpp, check_triton

NO_HEADERS = "echo 'probe.src:1:10: fatal error: Python.h: No such file or directory' >&2; exit 1"
# Leaves a file that is no library, as one is none where nothing may be executed.
NOT_LOADED = 'while [ "$1" != -o ]; do shift; done; echo text > "$2"'


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text + "\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_a_compiler_that_builds_is_found() -> None:
    """Every machine would be without torch.compile."""
    assert build_fault("g++", "c++") is None
    check_cpp("use_torch_compile")


@pytest.mark.parametrize("text, says", [
    (NO_HEADERS, "Python.h: No such file"),
    (NOT_LOADED, "cannot load what.*TMPDIR"),
    (None, "is not installed"),
])
def test_a_compiler_that_cannot_build_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                 text: str | None, says: str) -> None:
    """g++ without python3-dev: three hundred lines of Inductor's in the first block, and no n/a."""
    compiler = script(tmp_path / "cxx", text) if text else str(tmp_path / "gone")
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(NotAvailable, match="use_torch_compile: .*; install g.. and python3-dev") as caught:
        check_cpp("use_torch_compile")
    assert re.search(says, str(caught.value)) and "\n" not in str(caught.value)
    with pytest.raises(NotAvailable, match=f"use_fused_kernels: .*; install gcc and python3-dev.*{says}"):
        check_triton("use_fused_kernels")


def test_the_compiler_is_asked_once(tmp_path: Path) -> None:
    """A second of compiling for every pipeline of an ablation."""
    compiler = script(tmp_path / "cxx", f"echo once >> {tmp_path / 'calls'}; exit 1")
    assert build_fault(compiler, "c++") == build_fault(compiler, "c++")
    assert (tmp_path / "calls").read_text() == "once\n"


def test_campaign_goes_on_without_a_compiler(tmp_path: Path) -> None:
    """A preset that cannot be compiled here is an error with a traceback, not n/a with a reason."""
    code = """if True:
        from longlive_opt.config import ExperimentConfig
        from longlive_opt.errors import NotAvailable
        from longlive_opt.optimizations import build_pipeline
        try:
            build_pipeline(ExperimentConfig(use_static_kv=True, use_torch_compile=True))
        except NotAvailable as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"CXX": script(tmp_path / "cxx", NO_HEADERS)})
    assert done.stdout.startswith("use_torch_compile: compiling for the CPU needs") and not done.stderr


# ---- PyTorch's private names


@pytest.mark.parametrize("path", ["_scaled_mm", "_addmm_activation", "cuda.memory._set_allocator_settings",
                                  "_dynamo.utils.counters", "_dynamo.utils.compilation_time_metrics",
                                  "_dynamo.convert_frame.compile_lock", "_dynamo.config.recompile_limit",
                                  "_dynamo.maybe_mark_dynamic",
                                  "_C._distributed_c10d._SymmetricMemory.empty_strided_p2p",
                                  "_C._distributed_c10d._SymmetricMemory.rendezvous"])
def test_private_names_are_there(path: str) -> None:
    """A name that the newest PyTorch has lost, found by the first user with a GPU."""
    torch_internals.private(path, "This test")


@pytest.mark.parametrize("path, version", [("_scaled_mm", "2.9.1"), ("_scaled_mm", "2.16.0+cu130"),
                                           ("_scaled_mm", "unknown"), ("_gone", torch.__version__)])
def test_unknown_versions_are_refused_in_one_sentence(path: str, version: str) -> None:
    """An AttributeError, or other numbers, from a PyTorch that was never tried."""
    says = f"^Speed needs torch.{path}, .* 2.10 to 2.14, and this is {re.escape(version)}; install"
    with pytest.raises(NotAvailable, match=says):
        torch_internals.private(path, "Speed", version)


def test_8_bit_product_is_a_product() -> None:
    """Arguments in another order, or a scale that is lost. (The CPU's product takes one scale a factor.)"""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 32, generator=generator).to(torch.float8_e4m3fn) for rows in (16, 48))
    scales = torch.full((1, 1), 0.75), torch.full((1, 1), 1.5)
    bias = torch.randn(48, generator=generator).bfloat16()
    expected = (a.float() @ b.float().t()) * scales[0] * scales[1] + bias.float()
    product = torch_internals.scaled_mm(a, b.t(), *scales, bias, use_fast_accum=False)
    torch.testing.assert_close(product.float(), expected, rtol=2e-2, atol=2e-2)


def test_gelu_product_is_gelu_of_a_product() -> None:
    """Weight and activations in each other's place, or ReLU, this operator's default."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((6, 8), (4, 8), (4,)))
    expected = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias))
    torch.testing.assert_close(torch_internals.gelu_linear(x, weight, bias), expected, rtol=1e-3, atol=1e-3)


def test_a_group_is_found_under_its_new_name() -> None:
    """PyTorch looks memory that GPUs share up by the name of a process group. Under the group's own, ranks
    that are started again would meet at the store of the first.
    """
    resolve = torch._C._distributed_c10d._resolve_process_group
    for name in ("first", "second"):
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            torch_internals.name_symmetric_group(name, dist.group.WORLD, store)
            assert resolve(name) is dist.group.WORLD
        finally:
            dist.destroy_process_group()


def test_compilation_is_counted(cheap_compile: None) -> None:
    """What is compiled inside a measurement passes as latency, because counters of that name stay at 0."""
    graphs, seconds = torch_internals.compiled_graphs(), torch_internals.compile_seconds()
    torch.compile(lambda x: x + 1, fullgraph=True, dynamic=False)(torch.ones(3))
    assert torch_internals.compiled_graphs() == graphs + 1 and torch_internals.compile_seconds() > seconds


def test_recompiles_are_limited_inside_only() -> None:
    """A limit that outlives its call, or none."""
    config = torch._dynamo.config
    before = config.recompile_limit
    with torch_internals.many_recompiles(before + 7):
        assert config.recompile_limit == before + 7
    assert config.recompile_limit == before
