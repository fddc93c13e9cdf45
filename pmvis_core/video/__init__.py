"""Frames of videos: where they lie, how they are decoded."""
