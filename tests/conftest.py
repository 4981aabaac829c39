from __future__ import annotations

import os
import signal

import pytest
from hypothesis import settings

# torch and transformers are imported late: the process that only directs pytest-xdist's workers needs neither.
# The models are too small to be worth more threads; this is for doctests and subprocesses too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci")


def pytest_addoption(parser):
    parser.addoption("--skipped", action="store_true", help="run what the last run skipped; more may be installed now")


def skipped_before(config):
    """Ids of tests, and of files that were skipped as a whole."""
    return set(config.cache.get("tests/skipped", []))


def pytest_configure(config):
    if config.option.skipped and not skipped_before(config):
        raise pytest.UsageError("the last run skipped nothing, or there was none")


def pytest_ignore_collect(collection_path, config):
    if config.option.skipped and collection_path.is_file():
        files = {name.partition("::")[0] for name in skipped_before(config)}
        return True if collection_path.relative_to(config.rootpath).as_posix() not in files else None
    return None


def pytest_collection_modifyitems(config, items):
    if config.option.skipped:
        wanted = skipped_before(config)
        names = {item: {item.nodeid, item.nodeid.partition("::")[0]} & wanted for item in items}
        if lost := wanted.difference(*names.values()):
            raise pytest.UsageError(f"skipped by the last run, and not found now: {sorted(lost)}")
        items[:] = [item for item in items if names[item]]


def pytest_terminal_summary(terminalreporter, config):  # with pytest-xdist: where the workers are directed
    if not config.option.skipped and hasattr(config, "cache"):
        reports = terminalreporter.stats.get("skipped", [])
        config.cache.set("tests/skipped", [report.nodeid for report in reports])


@pytest.fixture(autouse=True, scope="session")
def _quiet():
    from transformers.utils import logging

    logging.disable_progress_bar()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell started this in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny():
    """See :func:`models.tiny_model`; 24 ids, of which the mask is 1."""
    from models import tiny_model

    return tiny_model()


@pytest.fixture(scope="session")
def embedded():
    from nap_decode import demo

    return demo.load()
