"""A Vision Transformer from scratch on a small image set: data · augment · train."""
