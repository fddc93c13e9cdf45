"""Training data: stills and videos as key/reference pairs, augmented and mixed."""
