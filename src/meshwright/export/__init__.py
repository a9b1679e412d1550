"""Plans as the settings of other tools, where these can express them."""
