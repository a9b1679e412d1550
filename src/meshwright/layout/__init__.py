"""Who holds which slice of a tensor, and the moves between two layouts."""
