"""Drawings of tracks and of runs, and the page that holds them."""
