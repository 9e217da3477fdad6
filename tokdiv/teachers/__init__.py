"""Teachers: which one (spec, zoo), where its weights are, and the loaded network (teacher)."""
