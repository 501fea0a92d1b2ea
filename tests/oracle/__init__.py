"""H2Tune once more, in NumPy: written from the specification, to hold the library against."""
