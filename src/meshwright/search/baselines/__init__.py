"""Plans of others, which the search is compared with: made by hand, and by AMP."""
