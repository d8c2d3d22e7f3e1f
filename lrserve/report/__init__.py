"""What people look at: the model card, the report of a search, figures, and lines on the terminal."""
