"""Whether kernels do what the ops say: a suite for packages that bring some of their own."""
