"""Cephalometric landmark detection (MAHT-Net) on the ISBI 2015 data set."""
