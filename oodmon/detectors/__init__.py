"""Detectors, one file per mechanism."""
