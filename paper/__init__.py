"""The paper's figures and numbers: the runs that they need, what these runs gave, and how the two compare."""
