"""This folder is a package, so that its conftest has another module name than tests/conftest.py."""
