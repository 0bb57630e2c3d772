"""Before any test module is imported: no network, no caches of this user, no display, one thread."""

import gc
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest

_HOME = tempfile.TemporaryDirectory(prefix="longlive-tests-")
os.environ |= {
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",  # tensors as small as the tests' only wait for a second thread
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # workers of pytest share the cores
    "HF_HUB_OFFLINE": "1",
    **{name: os.path.join(_HOME.name, name.lower())
       for name in ("HF_HOME", "TORCH_HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")},
}
# Where JupyterLab is installed, nbformat takes four seconds to read this grammar of web addresses.
sys.modules.setdefault("rfc3987_syntax", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--browser-tests", action="store_true",
                     help="run the tests that drive JupyterLab in Chromium, for minutes")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Modules live as long as the process: without them, the library's own gc.collect() takes no quarter of
    a second.
    """
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU or a browser; torch takes seconds to import, so only such a test asks it."""
    if item.get_closest_marker("browser"):
        if not item.config.getoption("--browser-tests"):
            pytest.skip("make test-browser runs it: JupyterLab in Chromium, for minutes")
        _require_browser()
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")


def _require_browser() -> None:
    """Who asked for these tests wants no green without them."""
    if importlib.util.find_spec("playwright") is None:
        pytest.fail("playwright is missing: pip install -e '.[browser]'", pytrace=False)
    from playwright.sync_api import sync_playwright

    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))):
        with sync_playwright() as playwright:
            if not os.path.exists(playwright.chromium.executable_path):
                pytest.fail("Chromium is missing: apt install chromium, or playwright install chromium",
                            pytrace=False)


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
