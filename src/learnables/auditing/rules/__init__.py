"""The rules, one file each; adding a file here is the whole registration."""
