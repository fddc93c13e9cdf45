"""pmvis: video instance segmentation without a single video annotation (PM-VIS+)."""

__version__ = "0.1.0"
