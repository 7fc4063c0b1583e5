"""The ops of the kernels by families; `Kernels` (kernels/interface.py) has all of them."""
