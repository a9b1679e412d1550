"""Models to be trained: their layers, parameters and costs, and modules that compute them."""
