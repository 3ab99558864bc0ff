"""Run tests with funcparam's parametrizations: `pytest -p funcparam.compat.pytest_plugin`."""

import pytest

from funcparam.compat import install, uninstall


def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Install before a conftest imports anything."""
    _install_for(early_config)


def pytest_configure(config: pytest.Config) -> None:
    """Install where a conftest names the plugin, which is then too late for the hook above."""
    _install_for(config)


def _install_for(config: pytest.Config) -> None:
    install()
    config.add_cleanup(uninstall)
