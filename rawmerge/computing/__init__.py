"""What computes the rows of a changed tensor: by the kernel, by torch, or on another device."""
