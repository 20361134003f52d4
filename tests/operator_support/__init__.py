"""Support for the tests of what a saved graph may call."""
