"""Run tests with funcparam's parametrizations: `pytest -p funcparam.compat.pytest_plugin`."""

from funcparam.compat import install, uninstall


def pytest_configure() -> None:
    """Install before any test file is imported."""
    install()


def pytest_unconfigure() -> None:
    """Leave torch as it was."""
    uninstall()
