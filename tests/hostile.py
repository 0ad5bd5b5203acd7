"""Pickles that do something when they are read: each leaves a marker behind."""

import pickle


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


def bomb_bytes(marker, protocol=4):
    return pickle.dumps({"desc": Bomb(marker), "Nuclei": Bomb(marker)}, protocol)


def goes_off(data, marker):
    """Prove that Python's own unpickler falls for it: else a test of ours would show nothing."""
    pickle.loads(data)
    fell = marker.exists()
    marker.unlink(missing_ok=True)
    return fell
