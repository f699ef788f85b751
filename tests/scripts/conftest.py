"""The programs are run by the test, not imported as test data."""

collect_ignore = ["programs", "zygote.py"]
