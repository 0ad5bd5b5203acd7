"""From annotated images to a bundle: datasets, targets, losses, transfer, the loop, scores.

Begin with ``fit.py``, the loop; ``recipe.py`` says what it can be told.
"""
