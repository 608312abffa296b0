"""Control: what should run (its database) and what runs (its registry), and the steps from one to the other."""
