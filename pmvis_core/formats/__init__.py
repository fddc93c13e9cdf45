"""Exchange formats of the field, one module each, all read into and written from `types`."""
