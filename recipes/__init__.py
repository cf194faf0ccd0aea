"""One paper technique, one folder; ``python -m recipes`` lists them. Names that start with _ are machinery."""
