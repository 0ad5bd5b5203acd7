"""``python -m wsi_pipeline``: the same as ``wsi``, for launchers that start modules."""

from wsi_pipeline.cli import main_wsi

if __name__ == "__main__":
    main_wsi()
