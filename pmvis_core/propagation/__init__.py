"""Carrying masks through a video: by optical flow, by DeAOT, by SAM 2."""
