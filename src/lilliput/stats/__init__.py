"""Folds over the inputs of a site: the statistics that calibration collects."""
