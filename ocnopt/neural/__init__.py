"""Neural ODEs: a field of any kind as a layer that carries a state along a path."""
