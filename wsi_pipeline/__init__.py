"""Whole-slide histology images into tables of nuclei, glands, lumina and tissue."""
