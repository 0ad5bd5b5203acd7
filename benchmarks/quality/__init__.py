"""One command that judges a bundle on all there is to judge it on; see ``__main__``."""
