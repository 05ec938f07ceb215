"""Studies: grids of runs that anyone can rerun, and what their numbers say of a claim."""
