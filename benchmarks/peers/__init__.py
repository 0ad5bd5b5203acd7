"""This package beside its peers: same slide, same tissue mask, same network, one machine.

::

    python -m benchmarks.peers.environment FOLDER        # once: an environment for each peer
    python -m benchmarks.peers --slide SLIDE --out FOLDER --environments FOLDER

=================  =============================================================================
``ours``           this package: the engine that ``wsi-run`` drives
``tiatoolbox``     TIAToolbox's ``MultiTaskSegmentor`` with the same network wrapped
``original``       Cerberus' own whole-slide flow, written anew from its description
``hovernext``      post-processing alone, as HoVer-NeXt does it, on the maps that ``ours`` made
=================  =============================================================================

Each run is a process of its own that ``process`` measures from outside, alike for all.
"""
