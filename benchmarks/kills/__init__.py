"""Whether a slide's work can be killed at any instant and comes out the same; see ``__main__``."""
