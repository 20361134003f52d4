"""The CUDA kernels: loops only. They know no torch; importing one imports the compiler."""
