"""A model's weights as blocks see them: as stored, turned, and with pending folds."""
