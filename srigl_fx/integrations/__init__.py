"""Thin adapters to training frameworks and loggers: import the one you need, each asks for its own extra."""
