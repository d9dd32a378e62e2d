"""Fixtures of the project's own tests live in ``tests/``; this file is what makes the root one."""

pytest_plugins = ["pytester"]
