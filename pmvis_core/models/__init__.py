"""Networks, one file each, read from the top."""
