"""Training DeAOT on pseudo-clips drawn from stills."""
