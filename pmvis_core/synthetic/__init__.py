"""The embedded micro-benchmark: drawn stills and videos in the real formats."""
