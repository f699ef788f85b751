"""One offline HTML page from a run, from an audit's report, or from both."""

from learnables.report.html import write_html

__all__ = ["write_html"]
