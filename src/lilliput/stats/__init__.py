"""Folds over the inputs of a site: what calibration leaves behind."""
