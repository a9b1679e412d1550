"""Who does what in which order, as data."""
