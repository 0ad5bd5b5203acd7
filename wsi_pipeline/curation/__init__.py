"""Own annotations: crops of slides in which named objects are outlined completely.

::

    predictions -> new -> crop (GeoJSON) -> overlay -> eye -> corrections -> crop -> ...
"""
