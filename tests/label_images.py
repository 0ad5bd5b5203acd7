"""Small label images for the tests of scores: drawn by hand, and at random."""

import numpy as np


def drawn(text: str) -> np.ndarray:
    """A label image from rows of digits; dots are background."""
    rows = text.split()
    return np.array([[0 if mark == "." else int(mark) for mark in row] for row in rows])


def scene(seed: int, size: int = 36, objects: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Truth and a prediction: moved, missed, invented, merged and split objects."""
    rng = np.random.default_rng(seed)
    true = np.zeros((size, size), np.int32)
    pred = np.zeros((size, size), np.int32)
    for number in range(1, int(rng.integers(0, objects + 1)) + 1):
        y, x = rng.integers(0, size, 2)
        height, width = rng.integers(1, 11, 2)
        fate = rng.random()
        if fate < 0.9:
            true[y : y + height, x : x + width] = 7 * number
        dy, dx, dh, dw = rng.integers(-2, 3, 4)
        top, left = max(0, y + dy), max(0, x + dx)
        if fate > 0.15:
            own = number if rng.random() < 0.8 else max(1, number - 1)
            pred[top : max(0, y + dy + height + dh), left : max(0, x + dx + width + dw)] = own
            if fate > 0.85:
                pred[top : top + 2, left : x + dx + width] = 50 + number
    return true, pred


def renamed(labels: np.ndarray, seed: int) -> np.ndarray:
    """The same objects under other, scattered, unordered numbers."""
    ids = np.unique(labels[labels > 0])
    rng = np.random.default_rng(seed)
    names = rng.choice(10**6, ids.size, replace=False) * 10**4 + 1
    result = np.zeros(labels.shape, np.int64)
    for old, new in zip(ids, names, strict=True):
        result[labels == old] = new
    return result


def masks(labels: np.ndarray) -> list[np.ndarray]:
    """One mask an object, in the order of their numbers."""
    return [labels == number for number in np.unique(labels[labels > 0])]
