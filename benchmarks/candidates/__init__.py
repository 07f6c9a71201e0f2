"""Triton kernels that could replace parts of AdaDoRA. The package has none: a GPU has to show first that they pay."""
