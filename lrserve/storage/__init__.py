"""Files on disk: artifacts that are staged, published and verified as a whole, and the work folder."""
