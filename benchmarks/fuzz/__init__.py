"""Hostile inputs of every kind, each in a process with limits; see ``__main__``."""
