"""Covariances, spectra and factors: from a dense model and text to everything a rank plan can be cut from."""
