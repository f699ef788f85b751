"""How each parameter is trained: defaults by kind, what was declared, optimizer groups, hooks."""
