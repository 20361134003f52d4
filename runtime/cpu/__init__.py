"""What runs on the CPU: the kernels, and how torch calls them."""
