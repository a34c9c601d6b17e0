"""python -m pytest --slow test_all.py also runs the tests that take minutes each."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")    # for small models a second thread only waits
os.environ.setdefault("HF_HUB_OFFLINE", "1")     # no test asks the network for anything

import pytest


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; --slow runs it"))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes, run with --slow")
