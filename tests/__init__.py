"""A package, so that tests.support is found before any other package called tests."""
