"""Bytes that outlive a process: object stores, transfers and run directories."""
