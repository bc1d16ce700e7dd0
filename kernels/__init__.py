"""Triton kernels, one file a stem; installs as `lomacs_fast.kernels`. Imported by `ops`, where Triton is."""
