"""Renderings of a compressed model for the engines that serve it. Third parties register theirs under `lrserve.exporters`."""
