"""Where tokens go in models of other people's libraries: one file a family, found by being here."""
