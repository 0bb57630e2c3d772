"""Before any test module is imported: no network, no caches of this user, no display, two threads."""

import os
import tempfile
from collections.abc import Iterator

import pytest

_HOME = tempfile.TemporaryDirectory(prefix="longlive-tests-")
os.environ |= {
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "2",
    "MKL_NUM_THREADS": "2",
    "HF_HUB_OFFLINE": "1",
    **{name: os.path.join(_HOME.name, name.lower())
       for name in ("HF_HOME", "TORCH_HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")},
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU; torch takes seconds to import, so only such a test asks it."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors as small as these spend their time waiting for a second thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cheap_compile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile that traces as Inductor does and then runs the trace."""
    import torch

    compile = torch.compile

    def traced(function, *, fullgraph, dynamic, options=None):
        assert fullgraph and dynamic is False
        return compile(function, fullgraph=True, dynamic=False, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
