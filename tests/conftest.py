"""Shared set-up: one thread, a fixed seed, Triton's interpreter where there is no GPU, and what a bare machine lacks.

The tests are collected on a machine that has PyTorch and the packages of the kernels, the SAEs, the caches and the
training, and nothing else: a module that needs another package is skipped there, with the package's name.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import sys
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest

# Also for the processes that tests start. Threads that wait for one another in a loop stall where other tests have the
# cores: a notebook took eight times the time with two.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without compiled files each of them would compile the whole package.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

torch.set_num_threads(1)
sys.dont_write_bytecode = False  # nor are the tests compiled again for each collection of them
os.fsync = lambda handle: None  # no test takes the power away, and waiting for the disk takes half a minute

# Annotated shapes are checked while testing; users pay nothing for them.
CHECKED = ["saelab.sparse", "saelab.sae", "saelab.losses", "saelab.metrics"]
with contextlib.suppress(ImportError):
    import beartype  # noqa: F401
    from jaxtyping import install_import_hook

    install_import_hook(CHECKED, "beartype.beartype")


def missing_package(error: BaseException | None) -> str | None:
    """The package of another project without which a module cannot be imported; None where something else failed."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            package = error.name.split(".")[0]
            return package if package not in ("saelab", "tests") and not _installed(package) else None
        error = error.__cause__ or error.__context__
    return None


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


# The conftest of the app's tests needs streamlit: without it there is nothing to collect there.
collect_ignore = [] if _installed("streamlit") else ["app"]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    report = yield
    call = getattr(report, "call", None)
    if report.outcome == "failed" and call is not None and call.excinfo is not None:
        package = missing_package(call.excinfo.value)
        if package is not None:
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 1, f"Skipped: {package} is not installed")
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what takes minutes, and begin with the files that take long: begun last, one of them would run alone.

    Then come those with the most tests. Both in the order of the folders, whose fixtures are made once.
    """
    many = Counter(item.path for item in items)
    long = {item.path for item in items if any(map(item.get_closest_marker, ("browser", "slow", "smollm2")))}
    items.sort(key=lambda item: (item.path not in long, 0 if item.path in long else -many[item.path], item.path))
    if "SAELAB_SLOW" not in os.environ:
        for item in items:
            if item.get_closest_marker("minutes"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; set SAELAB_SLOW=1"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One worker more than there are cores (``-n auto``): tests wait for browsers, servers and other processes."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """By files, and all tests in a browser in one worker: a server and a browser in each take longer than they save."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            scope, browser = super()._split_scope(nodeid), "tests/app/browser"
            return browser if scope.startswith(browser) else scope

    return ByFile(config, log)


@pytest.fixture(scope="module", autouse=True)
def _seed_module() -> None:
    """For the module's own fixtures: they run before any test of it, and must not depend on what ran before."""
    _seed_all()


@pytest.fixture(autouse=True)
def _seed() -> None:
    _seed_all()


def _seed_all() -> None:
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # the other function formats the stack for devices that may be used later: seconds for so many tests
        torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session")
def s3_server() -> Generator[Any]:
    """The way to an S3 server, one for all tests."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    from botocore.loaders import JSONFileLoader

    from tests.s3 import Way

    # Each test's own connection would read the description of the service again: megabytes of JSON.
    once = functools.cache(functools.partial(JSONFileLoader._load_file, None))  # pyright: ignore
    JSONFileLoader._load_file = lambda _, *which: once(*which)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    way = Way(*server.get_host_and_port())
    yield way
    way.front.shutdown()
    way.front.server_close()
    server.stop()


@pytest.fixture
def bucket(s3_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, request: Any) -> Generator[str]:
    """The URL of a new bucket."""
    import s3fs

    from saelab import stores
    from tests.s3 import KEYS

    for name, value in {"AWS_ENDPOINT_URL": s3_server.url, "SAELAB_CACHE": str(tmp_path / "home"), **KEYS}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    stores._answered.clear()
    name = f"bucket-{abs(hash(request.node.nodeid))}"
    s3fs.S3FileSystem().mkdir(name)
    yield f"s3://{name}"
    s3_server.fault = None
    s3fs.S3FileSystem.clear_instance_cache()
