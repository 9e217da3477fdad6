"""RUN/report.html: the result of a ranking on one page that loads nothing."""
